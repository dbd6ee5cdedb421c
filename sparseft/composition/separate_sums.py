"""Compositions as deltas of parameters, for a model whose weights are only read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sparseft._integrity import bits_equal
from sparseft.composition.fit import Fit, Fitter, Loaded
from sparseft.composition.plan import plan_tensor, prepared
from sparseft.composition.registry import Recipe, Rule
from sparseft.errors import BaseMismatchError, CompositionError
from sparseft.modules import ParameterIndex
from sparseft.modules.deltas import Delta, spread
from sparseft.modules.separate import (
    SeparateIndex,
    is_opaque,
    shape_of,
    why_not_separate,
)
from sparseft.ops import gather_entries
from sparseft.ops._streams import settle
from sparseft.ops.apply_diff import sum_entries

__all__ = ["Blender"]


class _SeparateFitter(Fitter):
    """Fits adapters to a model whose weights may be quantised: those are known by shape only."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.index = SeparateIndex(model)
        every = [n for name in self.index.names for n in (name, *self.index.aliases(name))]
        self._parts = {self._part(name) for name in every}

    def _check_shape(
        self, loaded: Loaded, kind: str, own: str, shape: tuple[int, ...], name: str
    ) -> None:
        weight = self.index.get(name)
        if not is_opaque(weight):
            return super()._check_shape(loaded, kind, own, shape, name)
        module, attr = self.index.owners(name)[0]
        wanted = shape_of(module, attr, weight)
        if wanted != shape:
            raise BaseMismatchError(
                f"adapter {loaded.name!r}: the {kind} of {own!r} has shape {shape} but the model's "
                f"quantised layer takes {wanted}. Load the model it was trained on."
            )

    def _check_base(self, loaded: Loaded, fit: Fit) -> None:
        readable = {n: own for n, own in fit.diffs.items() if not is_opaque(self.index.get(n))}
        super()._check_base(loaded, Fit(readable, fit.dense, fit.skipped))


class Blender:
    """Named adapters of one model, and what compositions of them do to each parameter.

    Args:
        model: the model; only read.
        cache: how many compositions keep their sums.
        options: of the fitter: ``check_base``, ``dense``, ``missing``.
    """

    def __init__(self, model: nn.Module, *, cache: int, **options: Any) -> None:
        self.model = model
        self.loaded: dict[str, Loaded] = {}
        self.fits: dict[str, Fit] = {}
        self._options = options
        self._blends: OrderedDict[Any, dict[str, Delta]] = OrderedDict()
        self._deltas: WeakValueDictionary[Any, Delta] = WeakValueDictionary()
        self._cache = max(1, cache)
        self.fitter = _SeparateFitter(model, **options)

    @property
    def index(self) -> ParameterIndex:
        """The model's parameters, quantised buffers among them."""
        return self.fitter.index

    def forget(self, name: str) -> None:
        """Drop an adapter and every composition kept."""
        del self.loaded[name]
        self.fits.pop(name, None)
        self._blends.clear()

    def refresh(self) -> bool:
        """Look at the model anew if parameters were replaced by other objects; tell whether."""
        names = [n for fit in self.fits.values() for n in (*fit.diffs, *fit.dense)]
        there = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
        if all(id(self.index.get(n)) in there for n in names):
            return False
        self.fitter = _SeparateFitter(self.model, **self._options)
        self.fits.clear()
        self._blends.clear()
        self._deltas.clear()
        return True

    def blend(
        self, coeffs: dict[str, float], recipe: Recipe, method: tuple[str, str]
    ) -> dict[str, Delta]:
        """Return what one composition does to each parameter; everything is checked first.

        Args:
            coeffs: adapter -> coefficient.
            recipe: the method's.
            method: its name and options, for the cache.

        Raises:
            CompositionError, BaseMismatchError, UnknownNameError: as in `Composer.switch`; also for
                parameters that cannot have a diff beside them.
        """
        used = [self.loaded[name] for name, coeff in coeffs.items() if coeff]
        chosen = sorted(used, key=lambda loaded: loaded.order)
        key = (tuple((x.name, x.digest, coeffs[x.name]) for x in chosen), method)
        for loaded in chosen:
            if loaded.name not in self.fits:
                self.fits[loaded.name] = self.fitter.fit(loaded)
        known = self._blends.get(key)
        if known is not None and all(_holds(d, self.index.get(n)) for n, d in known.items()):
            self._blends.move_to_end(key)
            return known
        touched: dict[str, list[tuple[Loaded, str]]] = {}
        whole: dict[str, list[tuple[Loaded, str]]] = {}
        for loaded in chosen:
            fit = self.fits[loaded.name]
            for name, own in fit.diffs.items():
                touched.setdefault(name, []).append((loaded, own))
            for name, own in fit.dense.items():
                whole.setdefault(name, []).append((loaded, own))
        for name in (*touched, *whole):
            self.places(name)
        blend: dict[str, Delta] = {}
        for name, parts in touched.items():
            if name in whole:
                raise CompositionError(
                    f"adapter {whole[name][0][0].name!r} holds all of {name!r} while "
                    f"{parts[0][0].name!r} has a diff of it; the two cannot be active together. "
                    "Pass dense='skip' to leave the head out."
                )
            # Another adapter in the set changes nothing here but how many could agree.
            rule = recipe.among(len(chosen))
            weights = tuple((x.name, x.digest, coeffs[x.name]) for x, _ in parts)
            own_key = (name, method, rule, weights)
            delta = self._deltas.get(own_key)
            if delta is None or not _holds(delta, self.index.get(name)):
                delta = self._delta(name, parts, coeffs, recipe, rule)
                if isinstance(delta.values, Tensor):
                    self._deltas[own_key] = delta
            blend[name] = delta
        for name, parts in whole.items():
            blend[name] = self._replaced(name, parts)
        for device in {delta.indices.device for delta in blend.values()}:
            settle(device)
        if all(isinstance(d.values, Tensor) for d in blend.values()):
            self._blends[key] = blend
            while len(self._blends) > self._cache:
                self._blends.popitem(last=False)
        return blend

    def _delta(
        self,
        name: str,
        parts: Sequence[tuple[Loaded, str]],
        coeffs: Mapping[str, float],
        recipe: Recipe,
        rule: Any,
    ) -> Delta:
        """Sum the diffs of one parameter; "set" entries become differences from the base's."""
        parameter = self.index.get(name)
        device = parameter.device
        diffs = [loaded.adapter[own] for loaded, own in parts]
        names = [loaded.name for loaded, _ in parts]
        ordered = [coeffs[n] for n in names]
        if any(d.values.requires_grad for d in diffs):
            return self._learning(name, diffs, ordered, recipe)
        ready = [
            prepared(d, recipe, name=own, digest=loaded.digest)
            for d, (loaded, own) in zip(diffs, parts, strict=True)
        ]
        replacing = [n for n, d in zip(names, ready, strict=True) if d.mode == "set"]
        if replacing and is_opaque(parameter):
            raise CompositionError(
                f"adapter {replacing[0]!r} replaces entries of {name!r} (mode 'set'), which is "
                f"quantised in this model ({parameter.dtype}): what they replace cannot be read. "
                "Use an adapter with 'add' diffs, or load the model unquantised."
            )
        dtype = torch.float32 if is_opaque(parameter) else parameter.dtype
        plan = plan_tensor(name, list(enumerate(ready)), dtype=dtype, device=device)
        plan.check(ordered, names)
        wide = torch.promote_types(dtype, torch.float32)
        if is_opaque(parameter):
            base = torch.zeros(plan.indices.numel(), dtype=dtype, device=device)
        else:
            base = gather_entries(parameter.detach(), plan.indices)
        put_in, total = plan.total(base, ordered, rule)
        values = total if total is not None else torch.zeros_like(base, dtype=wide)
        if replacing:
            values = values + (put_in.to(wide) - base.to(wide))
        written = sum_entries(base, values, dtype)
        finite = torch.isfinite(values) & (torch.isfinite(written) | ~torch.isfinite(base))
        if not bool(finite.all()):
            raise CompositionError(
                f"the sum of the diffs of {name!r} overflows {dtype} with coefficients "
                f"{dict(zip(names, ordered, strict=True))}; nothing was applied. Use smaller ones."
            )
        shape = tuple(diffs[0].shape)
        dense = spread(plan.indices, values, shape) if len(shape) == 1 else None
        indices, values = _ordinary(plan.indices), _ordinary(values)
        return Delta(
            indices, values, shape, parameter.dtype, base if replacing else None, spread=dense
        )

    def _learning(
        self, name: str, diffs: Sequence[Any], coeffs: Sequence[float], recipe: Recipe
    ) -> Delta:
        """Return a delta whose values are summed anew in every forward, for autograd."""
        is_sum = isinstance(recipe.rule, Rule) and recipe.rule.kind == "sum"
        if recipe.prepare is not None or not is_sum or any(d.mode == "set" for d in diffs):
            raise CompositionError(
                f"a diff of {name!r} requires grad, and only method 'linear' over 'add' diffs "
                "passes gradients on. Detach its values, or use method='linear'."
            )
        device = self.index.get(name).device
        detached = [type(d).from_pattern(d.pattern, d.values.detach()) for d in diffs]
        plan = plan_tensor(name, list(enumerate(detached)), dtype=torch.float32, device=device)
        places = [share.positions for share in plan.shares]
        indices, size = _ordinary(plan.indices), plan.indices.numel()

        def values() -> Tensor:
            total = torch.zeros(size, device=device)
            for diff, coeff, place in zip(diffs, coeffs, places, strict=True):
                term = diff.values.to(device, torch.float32) * coeff
                total = total + term if place is None else total.index_add(0, place, term)
            return total

        return Delta(indices, values, tuple(diffs[0].shape), self.index.get(name).dtype)

    def _replaced(self, name: str, parts: Sequence[tuple[Loaded, str]]) -> Delta:
        (first, own), *rest = parts
        tensor = first.adapter.dense[own]
        for other, theirs in rest:
            if not bits_equal(tensor, other.adapter.dense[theirs]):
                raise CompositionError(
                    f"adapters {first.name!r} and {other.name!r} both hold all of {name!r}, with "
                    "different values; give one of them coefficient 0, or pass dense='skip'."
                )
        key = (name, first.name, first.digest)
        delta = self._deltas.get(key)
        parameter = self.index.get(name)
        if delta is None or not _holds(delta, parameter):
            none = torch.empty(0, device=parameter.device)
            moved = _ordinary(tensor.detach().to(parameter.device))
            # A quantised weight's dtype says nothing of its layer's output.
            made = moved if is_opaque(parameter) else moved.to(parameter.dtype)
            if not bool((torch.isfinite(made) | ~torch.isfinite(moved)).all()):
                raise CompositionError(
                    f"adapter {first.name!r}: its {name!r} has values that {made.dtype}, the "
                    "model's dtype, cannot hold; nothing was applied. Load the model in a wider "
                    "one, or pass dense='skip' to leave the head out."
                )
            delta = Delta(none.int(), none, tuple(tensor.shape), parameter.dtype, replaced=made)
            self._deltas[key] = delta
        return delta

    def places(self, name: str) -> list[nn.Module]:
        """Return the layers that use a parameter.

        A module around such a layer may list its parameter, too (a language-model head its
        decoder's bias); that is no use of it.

        Raises:
            CompositionError: one that cannot have a diff beside it.
        """
        found, refused = [], []
        for module, attr in self.index.owners(name):
            reason = why_not_separate(module, attr)
            if reason is None:
                found.append(module)
            else:
                refused.append((module, reason))
        for module, reason in refused:
            inside = {id(m) for m in module.modules()}
            if not any(id(m) in inside for m in found):
                raise CompositionError(
                    f"separate mode cannot run {name!r}: {reason}. Use Composer, which writes the "
                    "weights, or leave that parameter out of the adapter."
                )
        return found


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that may be saved for backward, whatever mode an adapter was made in."""
    return tensor.clone() if tensor.is_inference() else tensor


def _holds(delta: Delta, parameter: Tensor) -> bool:
    """Whether a delta that was kept is still right for its parameter.

    Entries that were replaced are looked at, all of them: their delta is the difference from them,
    and the base may have been loaded anew or trained in place since.
    """
    if (delta.indices.device, delta.dtype) != (parameter.device, parameter.dtype):
        return False
    if delta.base is None:
        return True
    return bits_equal(gather_entries(parameter.detach(), delta.indices), delta.base)
