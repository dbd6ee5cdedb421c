"""Write a composition into a model and take it out, exactly; all of it or nothing.

Every change of a parameter goes through its storage stack: a holder with the overwritten bits is
pushed before the write and popped after they are back. A journal of how to go back is kept while a
change is under way, so that an exception in the middle (a full memory, Ctrl-C) leaves the model as
it was.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparseft._integrity import bits_equal
from sparseft.composition.plan import UnionPlan
from sparseft.composition.registry import Combine, Recipe, Rule
from sparseft.composition.witness import Witness
from sparseft.composition.writer import Writer, put_back, slots, writers_for
from sparseft.errors import CompositionError, StackOrderError
from sparseft.modules import Holder
from sparseft.modules.storage_stack import holders, pop, push, require_top
from sparseft.ops import gather_entries

logger = logging.getLogger(__name__)

__all__ = ["Change", "Composition", "Placement"]


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
    plans: UnionPlan = field(default_factory=lambda: UnionPlan({}, 0))
    dense: Mapping[str, tuple[int, Tensor]] = field(default_factory=dict)
    recipe: Recipe = Recipe()
    method_name: str = "linear"
    options: Mapping[str, object] = field(default_factory=dict)
    _parents: dict[tuple[int, ...], tuple[str, ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def ordered_coeffs(self) -> list[float]:
        """Coefficients by ordinal."""
        return [self.coeffs[name] for name in self.order]

    @cached_property
    def rule(self) -> Rule | Combine:
        """The rule, for as many adapters as take part."""
        return self.recipe.among(sum(c != 0 for c in self.coeffs.values()))

    def parents(self, ordinals: tuple[int, ...]) -> tuple[str, ...]:
        """Digests of those adapters, in ascending order, that have a coefficient other than 0."""
        if ordinals not in self._parents:
            coeffs = self.ordered_coeffs
            self._parents[ordinals] = tuple(self.digests[i] for i in ordinals if coeffs[i])
        return self._parents[ordinals]


class Change(NamedTuple):
    """What a change of the composition did to the model.

    Args:
        restored: entries whose saved bits were put back (0 where entries were only re-weighted).
        written: entries written anew, those of dense tensors included.
        nbytes: of both, in the weights' dtypes.
        reweighted: whether the same union was written over what was saved before.
    """

    restored: int
    written: int
    nbytes: int
    reweighted: bool


@dataclass
class _Place:
    """One changed parameter; ``writer`` is None where it was replaced whole."""

    parameter: nn.Parameter
    holder: Holder
    writer: Writer | None
    written: Witness | None = None  # of a parameter that was replaced whole


@contextmanager
def _journal() -> Iterator[list[Callable[[], None]]]:
    """Run the steps noted in the list, last first, if the block fails."""
    steps: list[Callable[[], None]] = []
    try:
        yield steps
    except BaseException:  # Ctrl-C too: a half-written model is worse than a late one
        for step in reversed(steps):
            try:
                step()
            except Exception:  # the others are needed all the more
                logger.exception("a step of going back failed; compare the model with its base")
        raise


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Forget autocast's casts of weights, which it keeps to the end of its outermost region."""
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class Placement:
    """The one composition that a composer has on its model; empty to begin with."""

    def __init__(self) -> None:
        self.composition = Composition()
        self._places: dict[str, _Place] = {}
        self._writers: list[Writer] = []

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
        for name, place in self._places.items():
            require_top(place.parameter, place.holder, name=name, action=action)
            now, then = place.parameter.dtype, place.holder.saved.dtype
            if now != then:
                raise CompositionError(
                    f"cannot {action} {name!r}: it was {then} when {place.holder.label} was "
                    f"applied and is {now} now. Cast the model back, or revert before casting."
                )
        changed = [name for writer in self._writers for name in writer.changed()]
        changed += [
            name
            for name, place in self._places.items()
            if place.written is not None and not place.written.agrees(place.parameter)
        ]
        based = set()
        for name in changed:
            place = self._places[name]
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
            self._places, self._writers, self.composition = {}, [], Composition()

    @torch.no_grad()
    def replace(
        self,
        target: Composition,
        parameters: Mapping[str, nn.Parameter],
        based: Collection[str] = (),
    ) -> Change:
        """Take off what lies on the model and put ``target`` on; call `require_top` first.

        Args:
            target: the composition to come.
            parameters: the model's, by canonical name; those of ``target`` at least.
            based: names that hold the base already, from `require_top`; ``target`` is empty then.

        Any exception leaves the model, the stacks and this object as they were.
        """
        before = self.composition
        with _fresh_casts(), _journal() as undo:
            reweighted = self._can_reweight(target, parameters)
            if reweighted:
                whole = [n for n, p in self._places.items() if p.writer is None]
                restored = self._take_off(whole, [], before, undo, based)
                for writer in self._writers:
                    self._reweight(writer, before, target, undo)
                written = [saved for writer in self._writers for saved in writer.saved]
            else:
                restored = self._take_off(list(self._places), self._writers, before, undo, based)
                written = self._put_on(target, parameters, undo)
            for name, (ordinal, tensor) in target.dense.items():
                saved = self._put_dense(name, parameters[name], ordinal, tensor, target, undo)
                written.append(saved)
            self.composition = target
        for device in {s.device for s in (*restored, *written)}:
            if device.type == "cuda":  # so that whoever takes the time takes all of it
                torch.cuda.current_stream(device).synchronize()
        return Change(
            sum(s.numel() for s in restored),
            sum(s.numel() for s in written),
            sum(s.numel() * s.element_size() for s in (*restored, *written)),
            reweighted,
        )

    def _can_reweight(self, target: Composition, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether the same entries are to be written, so that what is saved can stay."""
        now = self.composition
        return (
            bool(self._writers)
            and target.plans is now.plans
            and isinstance(target.recipe.rule, Rule) == isinstance(now.recipe.rule, Rule)
            and all(
                parameter is parameters[name]
                for writer in self._writers
                for name, parameter in zip(writer.names, writer.parameters, strict=True)
            )
        )

    def _take_off(
        self,
        names: Sequence[str],
        writers: Sequence[Writer],
        before: Composition,
        undo: list[Callable[[], None]],
        based: Collection[str],
    ) -> list[Tensor]:
        """Put saved bits back, leave the stacks and return those bits."""
        kept_writers = [w for w in self._writers if w not in writers]
        places = {name: self._places[name] for name in names}
        whole = {n: p.parameter.detach().clone() for n, p in places.items() if p.writer is None}
        old_places, old_writers = dict(self._places), list(self._writers)

        def again() -> None:
            self._places, self._writers = old_places, old_writers
            for name, place in places.items():
                _hold_again(place)
                if name in whole:
                    place.parameter.detach().copy_(whole[name])
            for writer in writers:
                if not all(name in based for name in writer.names):
                    writer.write(before)
            for name in based:  # these held the base, not what was written
                holder = places[name].holder
                if holder.indices is not None:
                    put_back(places[name].parameter, holder.indices, holder.saved)

        undo.append(again)
        for writer in writers:
            writer.restore()
        for name in whole:
            places[name].parameter.detach().copy_(places[name].holder.saved)
        for name, place in places.items():
            pop(place.parameter, place.holder, name=name)
        self._places = {n: p for n, p in self._places.items() if n not in places}
        self._writers = kept_writers
        return [place.holder.saved for place in places.values()]

    def _put_on(
        self,
        target: Composition,
        parameters: Mapping[str, nn.Parameter],
        undo: list[Callable[[], None]],
    ) -> list[Tensor]:
        """Capture and write the union's entries; return the captured ones."""
        writers = writers_for(target.plans, parameters, target.recipe.rule)
        for writer in writers:
            held: list[str] = []

            def let_go(writer: Writer = writer, held: list[str] = held) -> None:
                writer.restore()
                for name in held:
                    place = self._places.pop(name, None)
                    if place is not None and _is_held(place):
                        pop(place.parameter, place.holder, name=name)
                self._writers = [w for w in self._writers if w is not writer]

            undo.append(let_go)
            for name, parameter, indices, saved in slots([writer]):
                parents = target.parents(target.plans[name].ordinals)
                place = _Place(parameter, Holder(target.label, indices, saved, parents), writer)
                held.append(name)
                self._places[name] = place
                push(parameter, place.holder)
            self._writers.append(writer)
            writer.write(target)
        return [saved for writer in writers for saved in writer.saved]

    def _reweight(
        self,
        writer: Writer,
        before: Composition,
        target: Composition,
        undo: list[Callable[[], None]],
    ) -> None:
        """Write new sums over the same saved entries: nothing is captured or restored."""
        holders_ = {name: self._places[name].holder for name in writer.names}
        old = {name: (holder.label, holder.parents) for name, holder in holders_.items()}

        def put_back() -> None:
            for name, holder in holders_.items():
                holder.label, holder.parents = old[name]
            writer.write(before)

        undo.append(put_back)
        for name, holder in holders_.items():
            holder.label = target.label
            holder.parents = target.parents(target.plans[name].ordinals)
        writer.write(target)

    def _put_dense(
        self,
        name: str,
        parameter: nn.Parameter,
        ordinal: int,
        tensor: Tensor,
        target: Composition,
        undo: list[Callable[[], None]],
    ) -> Tensor:
        saved = parameter.detach().clone()
        if not bool(torch.isfinite(tensor.to(parameter.dtype)).all()):
            raise CompositionError(
                f"a value of {name!r}, which {target.order[ordinal]!r} holds whole, overflows "
                f"{parameter.dtype}; nothing was applied. Load the model in a wider dtype."
            )
        place = _Place(
            parameter, Holder(target.label, None, saved, target.parents((ordinal,))), None
        )

        def let_go() -> None:
            self._places.pop(name, None)
            if _is_held(place):
                parameter.detach().copy_(saved)
                pop(parameter, place.holder, name=name)

        undo.append(let_go)
        push(parameter, place.holder)
        self._places[name] = place
        parameter.detach().copy_(tensor)
        place.written = Witness.of(parameter, None)
        return saved


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
