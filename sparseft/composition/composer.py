"""`Composer`: named adapters on one model; apply, switch, re-weight, and the exact base again."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sparseft.adapter import Adapter
from sparseft.composition.coefficients import Coeffs, Which, as_choices, as_coeffs
from sparseft.composition.fit import Dense, Loaded, Missing
from sparseft.composition.overlap_pairs import OverlapReport, overlap_report
from sparseft.composition.placement import Composition, Placement
from sparseft.composition.planning import Planner
from sparseft.composition.registry import recipe_of
from sparseft.composition.residency import Moved, Residency, ResidencyReport
from sparseft.composition.separate import SeparateComposer
from sparseft.composition.switch_report import SwitchReport
from sparseft.composition.turns import Turns
from sparseft.errors import CompositionError, StackOrderError

__all__ = ["Composer"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _alone(
    method: Callable[Concatenate[Composer, _P], _T],
) -> Callable[Concatenate[Composer, _P], _T]:
    """Let one thread at a time into a composer's methods."""

    @wraps(method)
    def locked(self: Composer, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._turns.taken():
            return method(self, *args, **kwargs)

    return locked


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
        plan_cache: how many sets of adapters keep their union (about 8 bytes an entry and adapter;
            on GPUs 18, with the layout of the kernels).
        device_bytes, host_bytes: budgets for the adapters' tensors on the model's GPU and in host
            memory (pinned for GPUs): a number, or text such as "2GiB"; None: no limit. Those least
            recently used are moved down first, in the end to their files. Unions come on top.

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

    Safe to use from several threads: one changes the composition at a time, and the others wait
    while somebody is inside a `composed` block, so a forward pass in it sees that block's adapters.
    Asyncio tasks of one thread cannot wait for each other: the second is refused. (Rows, threads or
    tasks that want different adapters at the same time: `separate`.)

    Applies and attaches on one parameter form a
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
        device_bytes: int | str | None = None,
        host_bytes: int | str | None = None,
    ) -> None:
        self.model = model
        self.last_switch: SwitchReport | None = None
        self._turns = Turns()
        self._residency = Residency(device_bytes, host_bytes)
        self._planner = Planner(
            model,
            self._residency,
            missing=missing,
            dense=dense,
            check_base=check_base,
            plan_cache=plan_cache,
        )
        self._loaded: dict[str, Loaded] = {}
        self._placement = Placement()
        self._frames: list[object] = []
        if adapters is not None and (
            isinstance(adapters, Adapter) or not isinstance(adapters, Mapping)
        ):
            raise CompositionError(
                f"adapters is {type(adapters).__name__}, wanted name -> adapter, path or hub name."
            )
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter)

    # The adapters.

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Add an adapter, its path (folder or file) or its name on the hub, under a new name.

        Raises:
            CompositionError: the name is taken.
            FileNotFoundError, AdapterFormatError: as in `Adapter.load`.
        """
        one = Loaded.opened(name, adapter, self._loaded)  # tensors are checked when first used
        with self._turns.taken():
            self._residency.add(name, one.adapter)
            self._loaded[name] = one

    @_alone
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
        self._residency.remove(name)
        self._planner.forget(name)

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
    @_alone
    def skipped(self) -> dict[str, tuple[str, ...]]:
        """Adapter -> its tensors that were left out because the model has no place for them."""
        return {name: fit.skipped for name, fit in self._planner.fits.items() if fit.skipped}

    # The model.

    @_alone
    def apply(
        self, which: Which, coeffs: Coeffs = None, *, method: str = "linear", **options: Any
    ) -> SwitchReport:
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
        return self._to({**now.coeffs, **new}, method, options, "apply to")

    @_alone
    def switch(
        self, which: Which, coeffs: Coeffs = None, *, method: str = "linear", **options: Any
    ) -> SwitchReport:
        """Put exactly these adapters on the model, whatever was active; cost O(entries touched).

        Arguments and errors as in `apply`. The same adapters with other coefficients are
        re-weighted in place, without a new union or capture. ``switch([])`` is `revert`.
        """
        coeffs_by_name = as_coeffs(which, coeffs, self._loaded)
        if not coeffs_by_name:
            recipe_of(method, options)
            return self.revert()
        return self._to(coeffs_by_name, method, options, "switch")

    @_alone
    def revert(self) -> SwitchReport:
        """Take everything off: the base again, bit for bit. Does nothing when nothing is active.

        A parameter may hold the base already, because it was loaded over the adapters.

        Raises:
            StackOrderError: somebody changed the parameters after us; the message names them.
        """
        return self._go_to(Composition(), "revert", time.perf_counter(), self._residency.moved)

    @_alone
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
        self._planner.reindex()

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
        with self._turns.taken():
            before = self._placement.composition
            self.switch(which, coeffs, method=method, **options)
            frame = object()
            self._frames.append(frame)
            try:
                yield self
            finally:
                self._leave(frame, before)

    def _leave(self, frame: object, before: Composition) -> None:
        """Put back what was active before a block, unless it was forgotten."""
        if frame not in self._frames:
            return
        at = self._frames.index(frame)
        later = len(self._frames) - 1 - at
        del self._frames[at]
        if later:
            raise StackOrderError(
                f"composed(...) blocks were left out of order: {later} entered later are still "
                "open. Leave the innermost first; nothing was put back for this one."
            )
        self._go_to(before, "switch", time.perf_counter(), self._residency.moved)

    def grid(
        self,
        coeffs: Mapping[str, float | Sequence[float]],
        *,
        method: str = "linear",
        **options: Any,
    ) -> Iterator[dict[str, float]]:
        """Switch to every combination of coefficients in turn, and yield it.

        One union for all of them: after the first, entries are only written anew. What was active
        before is back after the last, and when the loop is left early.

        Args:
            coeffs: name -> coefficient, or several. The last name's change fastest.
            method, options: as in `apply`.

        Yields:
            name -> coefficient, while it is on the model.

        Raises:
            UnknownNameError, CompositionError: as `apply`, before anything is switched.

        Example:
            >>> import torch
            >>> from sparseft import Adapter, SparseDiff
            >>> layer = torch.nn.Linear(2, 1, bias=False)
            >>> diff = SparseDiff.from_dense(torch.tensor([[0.0, 2.0]]))
            >>> composer = Composer(layer, {"sw": Adapter({"weight": diff})})
            >>> [coeffs["sw"] for coeffs in composer.grid({"sw": [0.5, 1.0]})]
            [0.5, 1.0]
        """
        choices = as_choices(coeffs)
        as_coeffs(list(choices), None, self._loaded)
        recipe_of(method, options)
        return self._walk(choices, method, options)

    def _walk(
        self, choices: dict[str, list[float]], method: str, options: Mapping[str, Any]
    ) -> Iterator[dict[str, float]]:
        with self._turns.taken():
            before = self._placement.composition
            frame = object()
            self._frames.append(frame)
            try:
                for chosen in itertools.product(*choices.values()):
                    point = dict(zip(choices, chosen, strict=True))
                    self._to(dict(point), method, options, "switch")
                    yield point
            finally:
                self._leave(frame, before)

    # Looking at them.

    @_alone
    def overlap(self) -> OverlapReport:
        """Return how the adapters' masks and values overlap, pair by pair."""
        return overlap_report({name: one.adapter for name, one in self._loaded.items()})

    @_alone
    def separate(self) -> SeparateComposer:
        """Return a handle that runs the model under these adapters without touching a weight.

        For rows of one batch that want different adapters, and bases that must not be written. The
        two do not exclude each other: what lies on the model counts as its weights.
        """
        fitter = self._planner.fitter
        return SeparateComposer(
            self.model,
            {name: one.adapter for name, one in self._loaded.items()},
            check_base=fitter.check_base,
            dense=fitter.dense,
            missing=fitter.missing,
        )

    def residency(self) -> ResidencyReport:
        """Return where the adapters' tensors lie, against the budgets."""
        return self._residency.report()

    @_alone
    def weights(self, coeffs: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
        """Return composed weights as new tensors, differentiable in the coefficients.

        ``W + sum_i coeff_i * diff_i`` of every parameter that an adapter changes, for
        ``torch.func.functional_call(model, composer.weights(coeffs), inputs)``: coefficients are
        learned that way. The model is only read, and gets no gradient (`ops.compose_diffs` gives
        one to the base and the values, too); nothing may be active. Memory: a copy of each of those
        parameters.

        Args:
            coeffs: name -> coefficient; 0-d floating tensors may require grad.

        Returns:
            Canonical parameter name -> weight, in its dtype.

        Raises:
            UnknownNameError: no such adapter.
            CompositionError: something is active, or an adapter has "set" entries or dense tensors
                (they have no coefficient).
            BaseMismatchError: as in `apply`.
        """
        from sparseft.composition.functional import composed_weights

        if self.active:
            raise CompositionError(
                f"{', '.join(self.active)} lie on the model; revert before weights(...), which "
                "starts from the base."
            )
        as_coeffs(list(coeffs), None, self._loaded)
        self._refresh()
        return composed_weights(self._planner, self._loaded, coeffs)

    def __repr__(self) -> str:
        return f"Composer(adapters={self.names()}, active={self.active})"

    # How.

    def _check_held(self, action: str, *, leaving: bool = False) -> set[str]:
        """Check that what we changed is still the model's, and that nobody changed it since."""
        based = self._placement.require_top(action, leaving=leaving)
        if lost := self._planner.fitter.replaced(self._placement.names):
            raise StackOrderError(
                f"cannot {action} {lost[0]!r}: {self._placement.composition.label} lies on a "
                "parameter that was replaced by another object since (a resized embedding, "
                "load_state_dict(assign=True)), so the base cannot be put back. Load it again and "
                "forget(), which writes nothing; resize or replace before adapters are applied."
            )
        return based

    def _to(
        self, coeffs: dict[str, float], method: str, options: Mapping[str, Any], action: str
    ) -> SwitchReport:
        """Prepare a composition, put it on the model, and say what that took."""
        start, moved = time.perf_counter(), self._residency.moved
        unions = self._planner.unions_built
        # What is made here is kept and written to later on, outside of inference mode as well.
        with torch.inference_mode(False):
            self._refresh()
            target = self._planner.compose(self._loaded, coeffs, method, options)
        return self._go_to(target, action, start, moved, self._planner.unions_built > unions)

    def _go_to(
        self,
        target: Composition,
        action: str,
        start: float,
        moved: Moved,
        union_built: bool = False,
    ) -> SwitchReport:
        based = self._check_held(action, leaving=not target.coeffs)
        index = self._planner.fitter.index
        names = [*target.plans, *target.dense]
        parameters = {name: index.get(name) for name in names}
        with torch.inference_mode(False):
            change = self._placement.replace(target, parameters, based)
        self.last_switch = SwitchReport(
            active=dict(target.coeffs),
            method=target.method_name,
            tensors=len(names),
            restored=change.restored,
            written=change.written,
            weight_bytes=change.nbytes,
            reweighted=change.reweighted,
            union_built=union_built,
            moved=self._residency.moved - moved,
            seconds=time.perf_counter() - start,
        )
        return self.last_switch

    def _refresh(self) -> None:
        """Index the model anew if parameters have been replaced by other objects."""
        fits = self._planner.fits.values()
        names = [n for fit in fits for n in (*fit.diffs, *fit.dense)]
        if self._planner.fitter.replaced(dict.fromkeys(names)):
            self._check_held("switch")
            self._planner.reindex()
