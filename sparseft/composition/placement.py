"""Write a composition into a model and take it out, exactly; all of it or nothing.

Every change of a parameter goes through its storage stack: a holder with the overwritten bits is
pushed before the write and popped after they are back. A journal of how to go back is kept while a
change is under way, so that an exception in the middle (a full memory, Ctrl-C) leaves the model as
it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparseft._integrity import bits_equal
from sparseft.composition.plan import TensorPlan
from sparseft.composition.registry import Combine, Recipe, Rule
from sparseft.composition.witness import Witness
from sparseft.errors import CompositionError, StackOrderError
from sparseft.modules import Holder
from sparseft.modules.storage_stack import holders, pop, push, require_top
from sparseft.ops import gather_entries, sum_entries, write_entries_, write_sum_

__all__ = ["Composition", "Placement"]


@dataclass(frozen=True)
class Composition:
    """What is to lie on the model.

    Args:
        coeffs: name -> coefficient, as the user named them.
        label: for errors of others, e.g. ``"Composer(sw + nli)"``.
        order: names in canonical order; the ordinals of the plans count along it.
        digests: content digests, in that order.
        plans: parameter -> plan of its diffs.
        dense: parameter -> (ordinal, tensor) of what replaces it whole, coefficients 0 left out.
        recipe: of the composition method.
        method_name, options: what the recipe was made of.
    """

    coeffs: Mapping[str, float] = field(default_factory=dict)
    label: str = "Composer"
    order: Sequence[str] = ()
    digests: Sequence[str] = ()
    plans: Mapping[str, TensorPlan] = field(default_factory=dict)
    dense: Mapping[str, tuple[int, Tensor]] = field(default_factory=dict)
    recipe: Recipe = Recipe()
    method_name: str = "linear"
    options: Mapping[str, object] = field(default_factory=dict)

    def ordered_coeffs(self) -> list[float]:
        return [self.coeffs[name] for name in self.order]

    def rule(self) -> Rule | Combine:
        """Return the rule, for as many adapters as take part."""
        return self.recipe.among(sum(c != 0 for c in self.coeffs.values()))

    def parents(self, ordinals: Sequence[int]) -> tuple[str, ...]:
        """Digests of those adapters that have a coefficient other than 0."""
        coeffs = self.ordered_coeffs()
        return tuple(self.digests[i] for i in sorted(ordinals) if coeffs[i])


@dataclass
class _Place:
    """One changed parameter."""

    parameter: nn.Parameter
    holder: Holder
    plan: TensorPlan | None  # None: replaced whole
    written: Witness | None = None  # None: not yet


@contextmanager
def _journal() -> Iterator[list[Callable[[], None]]]:
    """Run the steps noted in the list, last first, if the block fails."""
    steps: list[Callable[[], None]] = []
    try:
        yield steps
    except BaseException:  # Ctrl-C too: a half-written model is worse than a late one
        for step in reversed(steps):
            step()
        raise


class Placement:
    """The one composition that a composer has on its model; empty to begin with."""

    def __init__(self) -> None:
        self.composition = Composition()
        self._places: dict[str, _Place] = {}

    @property
    def names(self) -> list[str]:
        """Canonical names of the parameters that are changed now."""
        return list(self._places)

    def require_top(self, action: str, *, leaving: bool = False) -> set[str]:
        """Check that nobody changed any of our parameters since.

        Args:
            action: what is about to happen, for the messages.
            leaving: everything is to be taken off, so that a parameter may hold the base already:
                all its entries that we overwrote have their saved bits, as after loading the base.

        Returns:
            The names of the parameters that do; empty unless ``leaving``.

        Raises:
            StackOrderError: somebody did; the message names them if they are on the stack.
            CompositionError: the model was cast meanwhile, so the saved bits do not fit it.
        """
        based = set()
        for name, place in self._places.items():
            require_top(place.parameter, place.holder, name=name, action=action)
            now, then = place.parameter.dtype, place.holder.saved.dtype
            if now != then:
                raise CompositionError(
                    f"cannot {action} {name!r}: it was {then} when {place.holder.label} was "
                    f"applied and is {now} now. Cast the model back, or revert before casting."
                )
            if place.written is None or place.written.agrees(place.parameter):
                continue
            if not leaving or not _holds_saved(place):
                raise StackOrderError(
                    f"cannot {action} {name!r}: its values were changed (an optimizer step, "
                    f"load_state_dict, a cast and back) while {place.holder.label} lay on it. "
                    "Putting the base back would undo that at the adapters' entries and keep it "
                    "everywhere else. Save what is there with state_dict() if it matters; then "
                    "load the base with load_state_dict() and revert(), or keep the weights as "
                    "they are with forget(), which writes nothing. Next time revert before "
                    "changing the weights, or train with sparseft.attach, which takes its change "
                    "off again."
                )
            based.add(name)
        return based

    def forget(self) -> None:
        """Take our holders off and write nothing: what is there now is the model's own.

        Parameters that were replaced or cast since are let go of, too, and so are those of a deep
        copy, which no stack knows.

        Raises:
            StackOrderError: somebody changed a parameter after us; nothing is taken off then.
        """
        held = {name: place for name, place in self._places.items() if _is_held(place)}
        for name, place in held.items():
            require_top(place.parameter, place.holder, name=name, action="forget")
        with _journal() as undo:
            for name, place in held.items():
                undo.append(functools.partial(_hold_again, place))
                pop(place.parameter, place.holder, name=name)
            self._places, self.composition = {}, Composition()

    @torch.no_grad()
    def replace(
        self,
        target: Composition,
        parameters: Mapping[str, nn.Parameter],
        based: Collection[str] = (),
    ) -> None:
        """Take off what lies on the model and put ``target`` on; call `require_top` first.

        Args:
            target: the composition to come.
            parameters: the model's, by canonical name; those of ``target`` at least.
            based: names that hold the base already, from `require_top`; ``target`` is empty then.

        Any exception leaves the model, the stacks and this object as they were.
        """
        before = self.composition
        keep = {
            name
            for name, place in self._places.items()
            if place.plan is not None
            and (plan := target.plans.get(name)) is not None
            and plan.indices is place.plan.indices
            and plan.indices.device == place.parameter.device
        }
        with _journal() as undo:
            for name in [n for n in self._places if n not in keep]:
                self._take_off(name, before, undo, based=name in based)
            for name, plan in target.plans.items():
                if name in keep:
                    self._reweight(name, plan, before, target, undo)
                else:
                    self._put_on(name, parameters[name], plan, target, undo)
            for name, (ordinal, tensor) in target.dense.items():
                self._put_dense(name, parameters[name], ordinal, tensor, target, undo)
            self.composition = target

    def _write(self, place: _Place, plan: TensorPlan, composition: Composition) -> None:
        """Write a composition's entries over the saved ones."""
        weight = place.parameter
        indices = plan.indices.to(weight.device)
        saved = place.holder.saved.to(weight.device)
        base, total = plan.total(saved, composition.ordered_coeffs(), composition.rule())
        if total is None:
            write_entries_(weight, indices, base.to(weight.dtype))
            place.written = Witness.of(weight, indices)
            return
        written = total
        if weight.dtype == torch.float16:  # the one dtype with a range much below the sum's
            written = sum_entries(base, total, weight.dtype)
            written = written.where(torch.isfinite(base), 0)
        if not bool(torch.isfinite(written).all()):
            raise CompositionError(
                f"the sum of the diffs of {plan.name!r} overflows {written.dtype} with "
                f"coefficients {dict(composition.coeffs)}; nothing was applied. Use smaller ones."
            )
        write_sum_(weight, indices, base, total)
        place.written = Witness.of(weight, indices)

    def _take_off(
        self, name: str, before: Composition, undo: list[Callable[[], None]], *, based: bool
    ) -> None:
        place = self._places[name]
        plan = place.plan
        dense_now = place.parameter.detach().clone() if plan is None else None

        def put_back() -> None:
            self._places[name] = place
            _hold_again(place)
            if dense_now is not None:
                place.parameter.detach().copy_(dense_now)
            if plan is not None and not based:
                self._write(place, plan, before)

        undo.append(put_back)
        _restore(place)
        pop(place.parameter, place.holder, name=name)
        del self._places[name]

    def _put_on(
        self,
        name: str,
        parameter: nn.Parameter,
        plan: TensorPlan,
        target: Composition,
        undo: list[Callable[[], None]],
    ) -> None:
        saved = gather_entries(parameter.detach(), plan.indices.to(parameter.device))
        parents = target.parents([s.ordinal for s in plan.shares])
        place = _Place(parameter, Holder(target.label, plan.indices, saved, parents), plan)
        self._hold(name, place, undo)
        self._write(place, plan, target)

    def _put_dense(
        self,
        name: str,
        parameter: nn.Parameter,
        ordinal: int,
        tensor: Tensor,
        target: Composition,
        undo: list[Callable[[], None]],
    ) -> None:
        saved = parameter.detach().clone()
        holder = Holder(target.label, None, saved, target.parents([ordinal]))
        place = _Place(parameter, holder, None)
        self._hold(name, place, undo)
        parameter.detach().copy_(tensor)
        place.written = Witness.of(parameter, None)

    def _hold(self, name: str, place: _Place, undo: list[Callable[[], None]]) -> None:
        def let_go() -> None:
            self._places.pop(name, None)
            if _is_held(place):
                _restore(place)
                pop(place.parameter, place.holder, name=name)

        undo.append(let_go)
        push(place.parameter, place.holder)
        self._places[name] = place

    def _reweight(
        self,
        name: str,
        plan: TensorPlan,
        before: Composition,
        target: Composition,
        undo: list[Callable[[], None]],
    ) -> None:
        """Write new sums over the same saved entries: nothing is captured or restored."""
        place = self._places[name]
        old_plan, holder = before.plans[name], place.holder
        label, parents = holder.label, holder.parents

        def put_back() -> None:
            place.plan, holder.label, holder.parents = old_plan, label, parents
            self._write(place, old_plan, before)

        undo.append(put_back)
        place.plan, holder.label = plan, target.label
        holder.parents = target.parents([s.ordinal for s in plan.shares])
        self._write(place, plan, target)


def _is_held(place: _Place) -> bool:
    return any(h is place.holder for h in holders(place.parameter))


def _hold_again(place: _Place) -> None:
    if not _is_held(place):
        push(place.parameter, place.holder)


def _holds_saved(place: _Place) -> bool:
    """Whether every entry that we overwrote has its saved bits."""
    weight, holder = place.parameter.detach(), place.holder
    if holder.indices is not None:
        weight = gather_entries(weight, holder.indices.to(weight.device))
    return bits_equal(weight, holder.saved.to(weight.device))


def _restore(place: _Place) -> None:
    """Write the saved bits back."""
    weight, holder = place.parameter.detach(), place.holder
    saved = holder.saved.to(weight.device)
    if holder.indices is None:
        weight.copy_(saved)
    else:
        write_entries_(weight, holder.indices.to(weight.device), saved)
