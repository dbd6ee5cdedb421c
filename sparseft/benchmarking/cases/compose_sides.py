"""The sides of the composition cases: copies of one model, adapters, what each must show."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.benchmarking import catalogue
from sparseft.benchmarking.cases import composable_sft as peer
from sparseft.benchmarking.cases.encoders import MODELS, Model, build_model
from sparseft.benchmarking.checks import Check, as_accurate, equal_bits, worst
from sparseft.benchmarking.masks import sectors_touched
from sparseft.benchmarking.suite import Facts
from sparseft.composition import Composer
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.ops import gather_entries, resolve_backend, write_entries_

__all__ = [
    "DTYPES",
    "MODELS",
    "Active",
    "Add",
    "Move",
    "Sides",
    "build_model",
    "random_adapters",
    "walked",
]

DTYPES = {name: getattr(torch, dtype) for name, dtype in catalogue.DTYPES.items()}

# Place of an adapter -> its coefficient.
Active = Mapping[int, float]
# Adds an adapter, by place, with a coefficient to the weights of the plain side.
Add = Callable[[int, float], object]


class Move(NamedTuple):
    """From one composition to another: what a plain side takes off and puts on, and where to."""

    off: Active
    on: Active
    to: Active


def walked(add: Add, runs: Sequence[Sequence[Move]]) -> Callable[[], None]:
    """Return a plain side's unit of work: the next run's moves, by subtraction and addition."""
    turns = itertools.cycle(runs)

    @torch.no_grad()
    def run() -> None:
        for off, on, _ in next(turns):
            for i, coeff in reversed(list(off.items())):
                add(i, -coeff)
            for i, coeff in on.items():
                add(i, coeff)

    return run


class Sides:
    """Two copies of one model, the adapters, and a composer on one of the copies.

    All plain sides change the other copy. Each adds and subtracts what is its own, so that they do
    not meet: sums commute up to rounding, and only what was checked before is timed.
    """

    def __init__(
        self, count: int, model: Model, dtype: str, density: float, device: torch.device
    ) -> None:
        self.device, self.dtype = device, DTYPES[dtype]
        self.ours = build_model(model, device).to(self.dtype)
        self.theirs = build_model(model, device).to(self.dtype)
        self.theirs.load_state_dict(self.ours.state_dict())
        shapes = {n: p.shape for n, p in self.ours.named_parameters()}
        self.adapters = random_adapters(count, shapes, self.dtype, density, device)
        self.diffs: list[peer.Diffs] = [peer.as_coo(a, device) for a in self.adapters.values()]
        self.composer = Composer(self.ours, self.adapters)
        self._unions: dict[tuple[int, ...], dict[str, SparsePattern]] = {}

    def names(self, active: Active) -> dict[str, float]:
        keys = list(self.adapters)
        return {keys[i]: coeff for i, coeff in active.items()}

    def unions(self, active: Active) -> dict[str, SparsePattern]:
        """Return the union of the adapters' entries, by parameter."""
        key = tuple(active)
        if key not in self._unions:
            chosen = [list(self.adapters.values())[i] for i in active]
            self._unions[key] = {
                name: SparsePattern.from_indices(
                    torch.unique(torch.cat([a[name].indices for a in chosen])),
                    chosen[0][name].shape,
                )
                for name in chosen[0]
            }
        return self._unions[key]

    def follow(self, runs: Sequence[Sequence[Move]]) -> Callable[[], None]:
        """Return the composer's unit of work for the same runs."""
        turns = itertools.cycle(runs)

        def run() -> None:
            for move in next(turns):
                if move.to:
                    self.composer.switch(self.names(move.to))
                else:
                    self.composer.revert()

        return run

    @torch.no_grad()
    def checked(self, compositions: list[Active]) -> tuple[list[Check], Facts]:
        """Go through the compositions and back to the base on both sides.

        Returns:
            What ours showed, and what is left of the competitor's round trip.
        """
        base = {n: p.detach().clone() for n, p in self.ours.named_parameters()}
        near, kept, undone = [], [], []
        before: Active = {}
        for active in compositions:
            self.composer.switch(self.names(active))
            peer.subtract_and_add(self.theirs, before, active, self.diffs)
            before = active
            for name, pattern in self.unions(active).items():
                at = pattern.indices
                exact = self._exact(name, base[name], at, active)
                ours = gather_entries(self.ours.get_parameter(name).detach(), at)
                theirs = gather_entries(self.theirs.get_parameter(name).detach(), at)
                near.append(as_accurate(f"composed {name}", ours, theirs, exact))
                wanted = base[name].clone()
                write_entries_(wanted, at, ours)
                whole = self.ours.get_parameter(name).detach()
                kept.append(equal_bits(f"untouched {name}", whole, wanted))
        self.composer.revert()
        peer.revert(self.theirs, before, self.diffs)
        for name, parameter in self.ours.named_parameters():
            undone.append(equal_bits(f"undone {name}", parameter.detach(), base[name]))
        drifted, furthest = 0, 0.0
        for name, parameter in self.theirs.named_parameters():
            away = (parameter.detach() - base[name]).abs()
            drifted += int(away.count_nonzero())
            furthest = max(furthest, float(away.max()))
        self.theirs.load_state_dict(base)
        facts: Facts = {"entries changed by going there and back": drifted, "by at most": furthest}
        return [worst(near), worst(kept), worst(undone)], facts

    @torch.no_grad()
    def plain_checks(self, add: Add, active: Active) -> list[Check]:
        """Put adapters on the other copy by additions; each of them may round once."""
        base = {n: p.detach().clone() for n, p in self.theirs.named_parameters()}
        for i, coeff in active.items():
            add(i, coeff)
        limit = len(active) ** 0.5 * torch.finfo(self.dtype).eps / 2
        error, size = 0.0, 0.0
        for name, pattern in self.unions(active).items():
            exact = self._exact(name, base[name], pattern.indices, active)
            got = gather_entries(self.theirs.get_parameter(name).detach(), pattern.indices)
            # over all tensors: some have one entry, which may nearly cancel
            error += float((got.double() - exact).square().sum())
            size += float(exact.square().sum())
        self.theirs.load_state_dict(base)
        return [Check("composed entries: error", (error / size) ** 0.5, limit)]

    def _exact(self, name: str, base: Tensor, at: Tensor, active: Active) -> Tensor:
        exact = gather_entries(base, at).double()
        for i, coeff in active.items():
            diff = list(self.adapters.values())[i][name]
            place = torch.searchsorted(at, diff.indices)
            exact.index_add_(0, place, diff.values.double() * coeff)
        return exact

    # The plain sides.

    def coo(self) -> Add:
        """composable-sft's, its diffs where the model is."""
        return lambda i, coeff: peer.subtract_and_add(self.theirs, {}, {i: coeff}, self.diffs)

    def index_adds(self, each: Callable[[Tensor, Tensor, Tensor, Tensor], object]) -> Add:
        """``each(flat weight, indices, values, coefficient)`` on every tensor of an adapter."""
        weights = {n: _flat(p) for n, p in self.theirs.named_parameters()}
        triples = [
            [
                (weights[name], diff.indices, diff.values)
                for name, diff in adapter.items()
                if diff.nnz
            ]
            for adapter in self.adapters.values()
        ]
        coeffs: dict[float, Tensor] = {}

        def add(i: int, coeff: float) -> None:
            if coeff not in coeffs:  # a number would be compiled in, anew for each
                coeffs[coeff] = torch.tensor(coeff, dtype=self.dtype, device=self.device)
            for weight, at, values in triples[i]:
                each(weight, at, values, coeffs[coeff])

        return add

    @torch.no_grad()
    def dense(self) -> Add:
        """Task vectors of the weights' size, one per adapter: what there is without sparsity."""
        weights = [p.detach() for p in self.theirs.parameters()]
        names = [n for n, _ in self.theirs.named_parameters()]
        vectors = [[a[n].to_dense() for n in names] for a in self.adapters.values()]
        return lambda i, coeff: torch._foreach_add_(weights, vectors[i], alpha=coeff)

    # What is moved.

    def facts(self, active: Active) -> Facts:
        weights = [p.detach() for p in self.ours.parameters()]
        union = sum(p.nnz for p in self.unions(active).values())
        return {"backend": resolve_backend("compose_many_", *weights), "union": union}

    def bytes_applied(self, active: Active) -> float:
        """What memory must move at least: per entry of the union an index, the saved value and how
        many adapters share it; per entry of an adapter value and adapter; and each 32-byte piece of
        the weights that holds an entry, in and out.
        """
        union = sum(p.nnz for p in self.unions(active).values())
        entries = sum(list(self.adapters.values())[i].nnz for i in active)
        size = self.dtype.itemsize
        return union * (4 + size + 1) + entries * (size + 1) + 64 * self._sectors(active)

    def bytes_restored(self, active: Active) -> float:
        """Index and saved value per entry, and the touched pieces of the weights in and out."""
        union = sum(p.nnz for p in self.unions(active).values())
        return union * (4 + self.dtype.itemsize) + 64 * self._sectors(active)

    def bytes_dense(self, runs: Sequence[Sequence[Move]]) -> float:
        """Weights in and out and a task vector in, per addition; of the mean run."""
        additions = sum(len(off) + len(on) for moves in runs for off, on, _ in moves) / len(runs)
        return 3 * additions * self.dtype.itemsize * sum(p.numel() for p in self.ours.parameters())

    def _sectors(self, active: Active) -> int:
        return sum(sectors_touched(p, self.dtype.itemsize) for p in self.unions(active).values())


def _flat(parameter: Tensor) -> Tensor:
    """Return a 1-D tensor of the same memory that is no view: compiled code is made anew for views
    of other shapes.
    """
    flat = parameter.new_empty(0)
    return flat.set_(parameter.detach().untyped_storage(), 0, (parameter.numel(),), (1,))


def random_adapters(
    count: int,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    density: float,
    device: torch.device,
) -> dict[str, Adapter]:
    made = {}
    for number in range(count):
        generator = torch.Generator(device).manual_seed(number)
        diffs = {}
        for name, shape in shapes.items():
            at = _positions(shape.numel(), density, generator)
            values = torch.randn(at.numel(), device=device, generator=generator).mul_(1e-3)
            diffs[name] = SparseDiff(at, values.to(dtype), shape)
        made[f"adapter{number}"] = Adapter(diffs, name=f"adapter{number}")
    return made


def _positions(numel: int, density: float, generator: torch.Generator) -> Tensor:
    """Return uniformly random positions, ascending: each with the chance ``density``, by steps."""
    if density >= 1:
        return torch.arange(numel, dtype=torch.int32, device=generator.device)
    most = int(numel * density + 10 * (numel * density) ** 0.5 + 10)
    steps = torch.empty(most, dtype=torch.float64, device=generator.device)
    at = steps.geometric_(density, generator=generator).long().cumsum(0) - 1
    return at[at < numel].int()
