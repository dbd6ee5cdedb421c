"""From names and coefficients to a composition that can be written: checks, fits, unions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparseft._integrity import bits_equal
from sparseft.composition.fit import Dense, Fit, Fitter, Loaded, Missing
from sparseft.composition.placement import Composition
from sparseft.composition.plan import UnionPlan, plan_tensor, prepared
from sparseft.composition.registry import Recipe, recipe_of
from sparseft.composition.residency import Residency
from sparseft.diff import SparseDiff
from sparseft.errors import CompositionError, OptionError
from sparseft.modules.weight_storage import is_sharded
from sparseft.ops import pack_diffs
from sparseft.ops.packed import PackedUnion

__all__ = ["Planner"]


class Planner:
    """Prepares compositions for one model, which it only reads.

    Args:
        model: the model.
        residency: where the adapters' tensors are taken from, by name.
        plan_cache: how many sets of adapters keep their union.
        missing, dense, check_base: as in `Fitter`.
    """

    def __init__(
        self,
        model: nn.Module,
        residency: Residency,
        *,
        missing: Missing,
        dense: Dense,
        check_base: bool,
        plan_cache: int,
    ) -> None:
        self.model = model
        self.fitter = Fitter(model, missing=missing, dense=dense, check_base=check_base)
        self.fits: dict[str, Fit] = {}
        self.unions_built = 0
        self._residency = residency
        self._plans: OrderedDict[tuple[tuple[str, str], ...], UnionPlan] = OrderedDict()
        if isinstance(plan_cache, bool) or not isinstance(plan_cache, int) or plan_cache < 1:
            raise OptionError(
                f"plan_cache is {plan_cache!r}, wanted a number of sets of adapters, 1 or more."
            )
        self._plan_cache = plan_cache
        self._packed: dict[tuple[str, tuple[str, ...], torch.device], PackedUnion] = {}

    def reindex(self) -> None:
        """Look at the model anew: its parameters' objects and base."""
        old = self.fitter
        self.fitter = Fitter(
            self.model, missing=old.missing, dense=old.dense, check_base=old.check_base
        )
        self.fits.clear()
        self._plans.clear()
        self._packed.clear()

    def forget(self, name: str) -> None:
        """Drop what is kept of an adapter that is removed."""
        self.fits.pop(name, None)
        for key in [k for k in self._plans if any(name == part[0] for part in k)]:
            del self._plans[key]

    def fit(self, one: Loaded) -> Fit:
        """Return where an adapter's tensors go; checked when first asked for."""
        if one.name not in self.fits:
            self.fits[one.name] = self.fitter.fit(one)
        return self.fits[one.name]

    def diff(self, name: str, own: str, device: torch.device) -> SparseDiff:
        """Return one diff of an adapter on a device."""
        return self._residency.diff(name, own, device)

    def packed_diffs(
        self, name: str, digests: tuple[str, ...], diffs: Sequence[SparseDiff]
    ) -> PackedUnion:
        """Return `pack_diffs` of one parameter's diffs, kept for the last set of adapters."""
        key = (name, digests, diffs[0].device)
        if key not in self._packed:
            self._packed = {k: v for k, v in self._packed.items() if k[0] != name}
            self._packed[key] = pack_diffs(diffs)
        return self._packed[key]

    def compose(
        self,
        loaded: Mapping[str, Loaded],
        coeffs: Mapping[str, float],
        method: str,
        options: Mapping[str, Any],
    ) -> Composition:
        """Check everything and prepare the composition.

        Args:
            loaded: the adapters by name; those of ``coeffs`` at least.
            coeffs: name -> coefficient.
            method, options: the composition method and its options.

        Raises:
            UnknownNameError, OptionError, CompositionError, BaseMismatchError: as `Composer.apply`.
        """
        recipe = recipe_of(method, dict(options))
        chosen = sorted((loaded[name] for name in coeffs), key=lambda x: x.order)
        for one in chosen:
            self.fit(one)
        order = [one.name for one in chosen]
        plans = self._plan(chosen, recipe, (method, repr(sorted(options.items()))))
        ordered = [coeffs[name] for name in order]
        for plan in plans.replacing:
            plan.check(ordered, order)
        return Composition(
            coeffs=dict(coeffs),
            label=f"Composer({' + '.join(order)})",
            order=order,
            digests=[one.digest for one in chosen],
            plans=plans,
            dense=self._dense(chosen, coeffs, plans),
            recipe=recipe,
            method_name=method,
            options=dict(options),
        )

    def _plan(self, chosen: list[Loaded], recipe: Recipe, method: tuple[str, str]) -> UnionPlan:
        """Return the union of a set of adapters, from the cache if it is there and still fits."""
        how = () if recipe.prepare is None else (method,)
        key = (*((one.name, one.digest) for one in chosen), *how)
        index = self.fitter.index
        plans = self._plans.get(key)
        if (
            plans is None
            or any(p.indices.device != index.get(n).device for n, p in plans.items())
            or any(p.dtype != index.get(p.name).dtype for p in plans.replacing)
        ):
            plans = self._build(chosen, recipe)
            self.unions_built += 1
        self._plans[key] = plans
        self._plans.move_to_end(key)
        while len(self._plans) > self._plan_cache:
            self._plans.popitem(last=False)
        return plans

    def _build(self, chosen: list[Loaded], recipe: Recipe) -> UnionPlan:
        touched: dict[str, list[tuple[int, str]]] = {}
        for ordinal, one in enumerate(chosen):
            for name, own in self.fits[one.name].diffs.items():
                touched.setdefault(name, []).append((ordinal, own))
        self._check_apart(touched)
        built = {}
        with self._residency.using(*(one.name for one in chosen)):
            for name in sorted(touched):
                parameter = self.fitter.index.get(name)
                diffs = []
                for ordinal, own in touched[name]:
                    one = chosen[ordinal]
                    diff = self.diff(one.name, own, parameter.device)
                    diffs.append((ordinal, prepared(diff, recipe, name=own, digest=one.digest)))
                built[name] = plan_tensor(
                    name, diffs, dtype=parameter.dtype, device=parameter.device
                )
        return UnionPlan(built, len(chosen))

    def _check_apart(self, names: Iterable[str]) -> None:
        """Check that no two parameters lie on the same memory: each would undo the other's change.

        Raises:
            CompositionError: two do.
        """
        spans = []
        for name in names:
            p = self.fitter.index.get(name)
            if is_sharded(p):
                raise CompositionError(
                    f"{name!r} is sharded, and a composition writes whole weights. Apply it before "
                    "fully_shard, or train from one adapter: attach(model, adapter)."
                )
            extent = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            if p.numel():
                spans.append((p.device, p.data_ptr(), extent * p.element_size(), name))
        spans.sort(key=lambda span: (str(span[0]), span[1]))
        for (device, start, size, name), (other_device, other_start, _, other) in pairwise(spans):
            if device == other_device and other_start < start + size:
                raise CompositionError(
                    f"{name!r} and {other!r} are two parameters on the same memory, and adapters "
                    "change both; make them one parameter (tie them), or copy one."
                )

    def _dense(
        self, chosen: list[Loaded], coeffs: Mapping[str, float], plans: Mapping[str, object]
    ) -> dict[str, tuple[int, Tensor]]:
        """Return the dense tensors that replace parameters whole."""
        found: dict[str, tuple[int, Tensor]] = {}
        for ordinal, one in enumerate(chosen):
            if not coeffs[one.name]:
                continue
            for name, own in self.fits[one.name].dense.items():
                device = self.fitter.index.get(name).device
                tensor = self._residency.dense(one.name, own, device)
                if name in found and not bits_equal(tensor, found[name][1]):
                    other = chosen[found[name][0]].name
                    raise CompositionError(
                        f"adapters {other!r} and {one.name!r} both hold all of {name!r}, with "
                        "different values; give one of them coefficient 0, or pass dense='skip'."
                    )
                if name in plans:
                    sharing = next(x.name for x in chosen if name in self.fits[x.name].diffs)
                    raise CompositionError(
                        f"adapter {one.name!r} holds all of {name!r} while {sharing!r} has a "
                        "diff of it; the two cannot be active together. Pass dense='skip' to leave "
                        "the head out."
                    )
                found.setdefault(name, (ordinal, tensor))
        return found
