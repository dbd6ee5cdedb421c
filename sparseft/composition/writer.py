"""Write compositions over the entries of parameters, and put the captured bits back.

A `TensorWriter` serves one parameter by torch operations, on any device. A `PackedWriter` serves
all parameters of one dtype on one GPU by one launch per call. Both keep what they overwrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from sparseft._integrity import bits_equal
from sparseft.composition.plan import TensorPlan, UnionPlan
from sparseft.composition.registry import Rule
from sparseft.composition.witness import Witness
from sparseft.errors import CompositionError
from sparseft.ops import _compose_cpu, gather_entries, write_entries_
from sparseft.ops.compose import (
    STATE,
    capture_many,
    compose_many_,
    restore_many_,
    runs_packed,
)

if TYPE_CHECKING:
    from sparseft.composition.placement import Composition

__all__ = ["PackedWriter", "TensorWriter", "Writer", "writers_for"]


class Writer(Protocol):
    """Writes compositions over the entries of some parameters.

    ``saved`` are the parameters' own vectors of overwritten bits; they hold them once `captured`.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    indices: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]

    @property
    def captured(self) -> bool: ...

    def write(self, composition: Composition) -> None: ...

    def restore(self) -> None: ...

    def changed(self) -> list[str]: ...


def writers_for(
    plans: UnionPlan, parameters: Mapping[str, nn.Parameter], rule: object
) -> list[Writer]:
    """Return writers for all parameters of a plan, none of which has captured anything.

    Args:
        plans: by canonical name.
        parameters: the model's, by canonical name.
        rule: a function of one's own as a rule runs tensor by tensor.
    """
    groups: dict[tuple[torch.device, torch.dtype, bool], list[str]] = {}
    for name, plan in plans.items():
        parameter = parameters[name]
        groups.setdefault((parameter.device, parameter.dtype, plan.wide), []).append(name)
    writers: list[Writer] = []
    for (_, _, wide), names in groups.items():
        fused = isinstance(rule, Rule) and not wide
        if fused and runs_packed([parameters[n] for n in names]):
            writers.append(PackedWriter(plans, {n: parameters[n] for n in names}))
        else:
            writers += [TensorWriter(n, parameters[n], plans[n]) for n in names]
    return writers


class TensorWriter:
    """Writes one parameter."""

    def __init__(self, name: str, parameter: nn.Parameter, plan: TensorPlan) -> None:
        self.names: tuple[str, ...] = (name,)
        self.parameters: tuple[nn.Parameter, ...] = (parameter,)
        self.indices: tuple[Tensor, ...] = (plan.indices,)
        self._done = [0]  # entries captured: those may be put back
        self._saved = torch.empty(
            plan.indices.shape, dtype=parameter.dtype, device=plan.indices.device
        )
        self.saved: tuple[Tensor, ...] = (self._saved,)
        self._written: Witness | None = None

    @property
    def captured(self) -> bool:
        return self._done[0] == self._saved.numel()

    def write(self, composition: Composition) -> None:
        """Write base + combined diffs over the saved entries, which are captured first if need be.

        Raises:
            CompositionError: a sum that the dtype cannot hold.
        """
        name, weight = self.names[0], self.parameters[0]
        plan, fresh = composition.plans[name], not self.captured
        indices = plan.indices.to(weight.device)
        self._written = None
        coeffs = composition.ordered_coeffs
        if self._in_blocks(weight, composition, coeffs):
            layout = composition.plans.blocks(name)
            own = [coeffs[s.ordinal] for s in plan.shares]
            if fresh:
                _compose_cpu.apply(weight, layout, own, out=self._saved, done=self._done)
            else:
                _compose_cpu.rewrite(weight, layout, self._saved, own)
            self._written = Witness.of(weight, indices)
            return
        if fresh:
            self._saved.copy_(gather_entries(weight.detach(), indices))
            self._done[0] = self._saved.numel()
        saved = self._saved.to(weight.device)
        write_entries_(weight, indices, plan.composed(saved, coeffs, composition.rule))
        self._written = Witness.of(weight, indices)

    def _in_blocks(self, weight: Tensor, composition: Composition, coeffs: list[float]) -> bool:
        """Whether the CPU's fast path serves: plain sums that cannot overflow."""
        plan = composition.plans[self.names[0]]
        if weight.dtype == torch.float16 or not _compose_cpu.suits(weight, composition.rule):
            return False
        if plan.sets or self._saved.device != weight.device:
            return False
        own = [coeffs[s.ordinal] for s in plan.shares]
        return composition.plans.blocks(self.names[0]).surely_finite(own)

    def restore(self) -> None:
        """Write the saved bits back, as far as they were captured."""
        done, weight = self._done[0], self.parameters[0]
        indices, saved = self.indices[0][:done], self._saved[:done]
        if weight.device.type == "cpu" and saved.device == indices.device == weight.device:
            _compose_cpu.restore(weight, indices, saved)
        elif done:
            put_back(weight, indices, saved)

    def changed(self) -> list[str]:
        """Return the names of parameters that no longer hold what was written."""
        kept = self._written is None or self._written.agrees(self.parameters[0])
        return [] if kept else list(self.names)


class PackedWriter:
    """Writes all parameters of one dtype on one device."""

    def __init__(self, plans: UnionPlan, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names, self.parameters = tuple(parameters), tuple(parameters.values())
        self._plans = plans
        self._union = plans.packed(self.names)
        self._arena = self._union.empty(self.parameters[0].dtype)
        self.indices = plans.pieces(self.names)
        self.saved = tuple(self._union.pieces(self._arena))
        self._state = torch.zeros(len(STATE), dtype=torch.int32, device=self._arena.device)
        self._capture_asked = False
        self._samples = plans.samples(self.names)
        self._written: Tensor | None = None

    @property
    def captured(self) -> bool:
        # The launch that captures also writes: whether it ran is asked of the device.
        return self._capture_asked and bool(self._state[0])

    def _in_place(self) -> bool:
        """Whether the parameters still lie where the layout does."""
        device = self._arena.device
        return all(p.device == device and p.is_contiguous() for p in self.parameters)

    def write(self, composition: Composition) -> None:
        """As `TensorWriter.write`, for all parameters."""
        if not self._in_place():
            raise CompositionError(
                f"{self.names[0]!r} and others lie on {self.parameters[0].device} now; adapters "
                f"were applied on {self._arena.device}. Move the model back, or revert first."
            )
        weights, coeffs, rule = self.parameters, composition.ordered_coeffs, composition.rule
        plans = [composition.plans[n] for n in self.names]
        fresh = not self._capture_asked
        sets = bool(composition.plans.replacing) and any(p.sets for p in plans)
        if not isinstance(rule, Rule):  # cannot be: writers_for looks at it
            raise TypeError(f"{rule!r} is not a fused rule")
        self._written = None
        if fresh and sets:
            self._arena.copy_(capture_many(weights, self._union))
            self._state[0] = 1
            self._capture_asked = True
            fresh = False
        base = None if fresh else self._arena
        if sets:
            pieces = [p.base(s, coeffs) for p, s in zip(plans, self.saved, strict=True)]
            wide = pieces[0].dtype
            for piece in pieces[1:]:
                wide = torch.promote_types(wide, piece.dtype)
            base = self._union.join([p.to(wide) for p in pieces])
        self._capture_asked = True
        self._state[1:].zero_()
        compose_many_(
            weights, self._union, coeffs, rule, saved=self._arena, base=base, state=self._state
        )
        self._written = capture_many(weights, self._samples)
        if bool(self._state[1]):
            for plan, saved in zip(plans, self.saved, strict=True):
                plan.composed(saved, coeffs, rule)  # raises, with the tensor's name
            raise CompositionError(f"a sum overflows {self._arena.dtype}; nothing was applied.")

    def restore(self) -> None:
        """Write the saved bits back."""
        if not self.captured:
            return
        if self._in_place():
            restore_many_(self.parameters, self._union, self._arena)
            return
        for weight, indices, saved in zip(self.parameters, self.indices, self.saved, strict=True):
            put_back(weight, indices, saved)

    def changed(self) -> list[str]:
        """Return the names of parameters that no longer hold what was written."""
        if self._written is None:
            return []
        if self._in_place():
            now = capture_many(self.parameters, self._samples)
            if bits_equal(now, self._written):
                return []
        return [
            name
            for name, weight, at, then in zip(
                self.names,
                self.parameters,
                self._samples.pieces(self._samples.indices),
                self._samples.pieces(self._written),
                strict=True,
            )
            if not Witness(at, then).agrees(weight)
        ]


def put_back(weight: Tensor, indices: Tensor, saved: Tensor) -> None:
    """Write saved bits back, wherever the weight lies by now."""
    write_entries_(weight, indices.to(weight.device), saved.to(weight.device))


def slots(writers: Sequence[Writer]) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
    """Yield (name, parameter, indices, saved) of everything that writers write."""
    for writer in writers:
        yield from zip(writer.names, writer.parameters, writer.indices, writer.saved, strict=True)
