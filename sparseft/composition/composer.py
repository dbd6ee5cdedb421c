"""`Composer`: named adapters on one model; apply, switch, re-weight, and the exact base again."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparseft._integrity import bits_equal
from sparseft.adapter import Adapter
from sparseft.composition.coefficients import Coeffs, Which, as_coeffs
from sparseft.composition.fit import Dense, Fit, Fitter, Loaded, Missing
from sparseft.composition.placement import Composition, Placement
from sparseft.composition.plan import TensorPlan, UnionPlan, plan_tensor, prepared
from sparseft.composition.registry import Recipe, recipe_of
from sparseft.errors import CompositionError, StackOrderError

__all__ = ["Composer"]


class Composer:
    """Puts adapters on a model, several at a time, and takes them off exactly.

    On the union of the adapters' entries, with ``W0`` what the model had there:

    ``W[idx] = rn(W0[idx] + sum_i coeff_i * diff_i)``

    The sum runs in the canonical order (adapter's own name, then content digest), so neither the
    order of calls nor the names used here change a bit. Entries of mode "set" replace ``W0`` first.
    Dense tensors (heads) of an adapter with a coefficient other than 0 replace the model's whole.

    Args:
        model: any module; changed in place between apply and revert. Tied weights are written once.
        adapters: name -> adapter, or path of one; more with `add`.
        check_base: refuse adapters made on another base (by fingerprint, when first used).
        dense: "auto" loads dense tensors whose parameter exists; "require" wants all to exist;
            "skip" leaves the model's own.
        missing: diffs of parameters that the model lacks: "auto" leaves out those under a top-level
            module that the model does not have (a masked-LM head on a classifier), with a warning,
            and refuses others; "error" refuses all; "skip" leaves out all.
        plan_cache: how many sets of adapters keep their union (about 8 bytes an entry and adapter).

    Example:
        >>> import torch
        >>> from sparseft import Adapter, Composer, SparseDiff
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> change = SparseDiff.from_dense(torch.tensor([[0.0, 2.0]]))
        >>> before = layer.weight.detach().clone()
        >>> composer = Composer(layer, {"a": Adapter({"weight": change})})
        >>> with composer.composed({"a": 0.5}):
        ...     moved = (layer.weight - before).tolist()
        >>> moved, torch.equal(layer.weight, before)
        ([[0.0, 1.0]], True)

    Not safe to use from several threads at once. Applies and attaches on one parameter form a
    stack: whoever changed it last undoes first, others get `StackOrderError`.

    The weights themselves must not be trained while adapters are applied: a revert would undo the
    steps at the adapters' entries and keep them everywhere else. Evenly spaced ones of those
    entries (128 at most in each parameter) are compared before every apply, switch and revert, so a
    dense optimizer step is refused there, by `StackOrderError`, with the model left as it is. A
    change that misses them all passes: of a few entries, or of a few rows of an embedding and
    nothing else. Load the base again and `revert`, or keep the weights with `forget`. Train with
    `attach`, whose change is taken off before.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Adapter | str | os.PathLike[str]] | None = None,
        *,
        check_base: bool = True,
        dense: Dense = "auto",
        missing: Missing = "auto",
        plan_cache: int = 4,
    ) -> None:
        self.model = model
        self._fitter = Fitter(model, missing=missing, dense=dense, check_base=check_base)
        self._loaded: dict[str, Loaded] = {}
        self._fits: dict[str, Fit] = {}
        self._plans: OrderedDict[tuple[tuple[str, str], ...], UnionPlan] = OrderedDict()
        self._plan_cache = max(1, plan_cache)
        self._placement = Placement()
        self._frames: list[object] = []
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter)

    # The adapters.

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Add an adapter, or the path of one (folder or .safetensors file), under a new name.

        Raises:
            CompositionError: the name is taken.
            FileNotFoundError, AdapterFormatError: as in `Adapter.load`.
        """
        if not isinstance(name, str) or not name:
            raise CompositionError(f"{name!r} cannot name an adapter; wanted a non-empty string.")
        if name in self._loaded:
            raise CompositionError(
                f"an adapter called {name!r} is here already; remove({name!r}) first, or choose "
                "another name."
            )
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter, check="lazy")  # tensors are checked when first used
        self._loaded[name] = Loaded(name, adapter)

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownNameError: there is none of that name.
            CompositionError: it is active.
        """
        as_coeffs(name, None, self._loaded)
        if name in self.active:
            raise CompositionError(f"adapter {name!r} is active; revert or switch first.")
        if self._frames:
            raise CompositionError("adapters cannot be removed inside composed(...).")
        del self._loaded[name]
        self._fits.pop(name, None)

    def names(self) -> list[str]:
        """Return the names of the adapters, in the order they were added."""
        return list(self._loaded)

    def __getitem__(self, name: str) -> Adapter:
        as_coeffs(name, None, self._loaded)
        return self._loaded[name].adapter

    @property
    def active(self) -> dict[str, float]:
        """Name -> coefficient of what lies on the model now."""
        return dict(self._placement.composition.coeffs)

    @property
    def skipped(self) -> dict[str, tuple[str, ...]]:
        """Adapter -> its tensors that were left out because the model has no place for them."""
        return {name: fit.skipped for name, fit in self._fits.items() if fit.skipped}

    # The model.

    def apply(
        self, which: Which, coeffs: Coeffs = None, *, method: str = "linear", **options: Any
    ) -> None:
        """Put adapters on the model, beside those that are active.

        ``apply("a"); apply("b")`` gives the bits of ``apply(["a", "b"])``: one sum from the base.

        Args:
            which: a name, names (coefficient 1 each), or name -> coefficient.
            coeffs: coefficients of names: one for all, one each in order, or by name. Negative ones
                subtract; 0 leaves the adapter out.
            method: a registered composition method; the same for all that are active together.
            options: the method's options.

        Raises:
            UnknownNameError: no such adapter, method, option or parameter.
            CompositionError: coefficients that fit no adapter, an adapter that is active already,
                entries or heads that contradict each other.
            BaseMismatchError: an adapter of another base or other shapes.
            StackOrderError: somebody changed the parameters after us.

        Whatever is raised, the model is as it was before the call.
        """
        new = as_coeffs(which, coeffs, self._loaded)
        now = self._placement.composition
        for name in new:
            if name in now.coeffs:
                raise CompositionError(
                    f"adapter {name!r} is active already, with coefficient {now.coeffs[name]}; "
                    "switch(...) says what is to be active altogether."
                )
        if now.coeffs and (method, options) != (now.method_name, dict(now.options)):
            raise CompositionError(
                f"{now.method_name!r} is active and {method!r} was asked for; adapters that are "
                "active together share one method and its options. Use switch(...)."
            )
        self._go_to(self._compose({**now.coeffs, **new}, method, options), "apply to")

    def switch(
        self, which: Which, coeffs: Coeffs = None, *, method: str = "linear", **options: Any
    ) -> None:
        """Put exactly these adapters on the model, whatever was active; cost O(entries touched).

        Arguments and errors as in `apply`. The same adapters with other coefficients are
        re-weighted in place, without a new union or capture. ``switch([])`` is `revert`.
        """
        coeffs_by_name = as_coeffs(which, coeffs, self._loaded)
        self._go_to(self._compose(coeffs_by_name, method, options), "switch")

    def revert(self) -> None:
        """Take everything off: the base again, bit for bit. Does nothing when nothing is active.

        A parameter may hold the base already, because it was loaded over the adapters.

        Raises:
            StackOrderError: somebody changed the parameters after us; the message names them.
        """
        self._go_to(Composition(), "revert")

    def forget(self) -> None:
        """Give up the way back: nothing is active any more, and no weight is written.

        What the parameters hold now, adapters included, is the model's own from here on: later
        adapters are checked against it, and `attach` names no parents. For weights that were
        changed or replaced while adapters lay on them. Blocks of `composed` that are open put
        nothing back when they end.

        Raises:
            StackOrderError: somebody changed the parameters after us; the message names them.
        """
        self._placement.forget()
        self._frames.clear()
        self._reindex()

    @contextmanager
    def composed(
        self, which: Which, coeffs: Coeffs = None, *, method: str = "linear", **options: Any
    ) -> Iterator[Composer]:
        """Switch for the length of a ``with`` block; afterwards what was active before is back
        (nothing is after a `forget` inside).

        Blocks nest; inside, apply, switch and revert may be used. Arguments and errors as in
        `apply`.

        Raises:
            StackOrderError: on leaving, if a block entered later is still open.
        """
        before = self._placement.composition
        self.switch(which, coeffs, method=method, **options)
        frame = object()
        self._frames.append(frame)
        try:
            yield self
        finally:
            if frame in self._frames:  # else forgotten
                if self._frames[-1] is not frame:
                    raise StackOrderError(
                        "composed(...) blocks were left out of order: "
                        f"{len(self._frames) - 1 - self._frames.index(frame)} entered later are "
                        "still open. Leave the innermost first."
                    )
                self._frames.pop()
                self._go_to(before, "switch")

    def __repr__(self) -> str:
        return f"Composer(adapters={self.names()}, active={self.active})"

    # How.

    def _check_held(self, action: str, *, leaving: bool = False) -> set[str]:
        """Check that what we changed is still the model's, and that nobody changed it since."""
        based = self._placement.require_top(action, leaving=leaving)
        if lost := self._fitter.replaced(self._placement.names):
            raise StackOrderError(
                f"cannot {action} {lost[0]!r}: {self._placement.composition.label} lies on a "
                "parameter that was replaced by another object since (a resized embedding, "
                "load_state_dict(assign=True)), so the base cannot be put back. Load it again and "
                "forget(), which writes nothing; resize or replace before adapters are applied."
            )
        return based

    def _go_to(self, target: Composition, action: str) -> None:
        based = self._check_held(action, leaving=not target.coeffs)
        index = self._fitter.index
        names = [*target.plans, *target.dense]
        self._placement.replace(target, {name: index.get(name) for name in names}, based)

    def _refresh(self) -> None:
        """Index the model anew if parameters have been replaced by other objects."""
        names = [n for fit in self._fits.values() for n in (*fit.diffs, *fit.dense)]
        old = self._fitter
        if old.replaced(dict.fromkeys(names)):
            self._check_held("switch")
            self._reindex()

    def _reindex(self) -> None:
        """Look at the model anew: its parameters' objects and base."""
        old = self._fitter
        self._fitter = Fitter(
            self.model, missing=old.missing, dense=old.dense, check_base=old.check_base
        )
        self._fits.clear()
        self._plans.clear()

    def _compose(
        self, coeffs: dict[str, float], method: str, options: dict[str, Any]
    ) -> Composition:
        """Check everything and prepare the composition; the model is only read."""
        recipe = recipe_of(method, options)
        self._refresh()
        chosen = sorted((self._loaded[name] for name in coeffs), key=lambda x: x.order)
        for loaded in chosen:
            if loaded.name not in self._fits:
                self._fits[loaded.name] = self._fitter.fit(loaded)
        order = [loaded.name for loaded in chosen]
        plans = self._plan(chosen, recipe, (method, repr(sorted(options.items()))))
        ordered = [coeffs[name] for name in order]
        for plan in plans.values():
            plan.check(ordered, order)
        return Composition(
            coeffs=coeffs,
            label=f"Composer({' + '.join(order)})",
            order=order,
            digests=[loaded.digest for loaded in chosen],
            plans=plans,
            dense=self._dense(chosen, coeffs, plans),
            recipe=recipe,
            method_name=method,
            options=dict(options),
        )

    def _plan(self, chosen: list[Loaded], recipe: Recipe, method: tuple[str, str]) -> UnionPlan:
        """Return the union of a set of adapters, from the cache if it is there and still fits."""
        how = () if recipe.prepare is None else (method,)
        key = (*how, *((loaded.name, loaded.digest) for loaded in chosen))
        index = self._fitter.index
        plans = self._plans.get(key)
        if plans is None or any(p.indices.device != index.get(n).device for n, p in plans.items()):
            touched: dict[str, list[tuple[int, str]]] = {}
            for ordinal, loaded in enumerate(chosen):
                for name, own in self._fits[loaded.name].diffs.items():
                    touched.setdefault(name, []).append((ordinal, own))
            built = {}
            for name in sorted(touched):
                parameter = index.get(name)
                diffs = [
                    (
                        i,
                        prepared(chosen[i].adapter[own], recipe, name=own, digest=chosen[i].digest),
                    )
                    for i, own in touched[name]
                ]
                built[name] = plan_tensor(
                    name, diffs, dtype=parameter.dtype, device=parameter.device
                )
            plans = UnionPlan(built, len(chosen))
        self._plans[key] = plans
        self._plans.move_to_end(key)
        while len(self._plans) > self._plan_cache:
            self._plans.popitem(last=False)
        return plans

    def _dense(
        self, chosen: list[Loaded], coeffs: Mapping[str, float], plans: Mapping[str, TensorPlan]
    ) -> dict[str, tuple[int, Tensor]]:
        """Return the dense tensors that replace parameters whole."""
        found: dict[str, tuple[int, Tensor]] = {}
        for ordinal, loaded in enumerate(chosen):
            if not coeffs[loaded.name]:
                continue
            for name, own in self._fits[loaded.name].dense.items():
                tensor = loaded.adapter.dense[own]
                if name in found and not bits_equal(tensor, found[name][1]):
                    other = chosen[found[name][0]].name
                    raise CompositionError(
                        f"adapters {other!r} and {loaded.name!r} both hold all of {name!r}, with "
                        "different values; give one of them coefficient 0, or pass dense='skip'."
                    )
                if name in plans:
                    sharing = [chosen[s.ordinal].name for s in plans[name].shares]
                    raise CompositionError(
                        f"adapter {loaded.name!r} holds all of {name!r} while {sharing[0]!r} has a "
                        "diff of it; the two cannot be active together. Pass dense='skip' to leave "
                        "the head out."
                    )
                found.setdefault(name, (ordinal, tensor))
        return found
