"""The union of the entries of a set of adapters: made once per set, re-weighted freely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from sparseft.composition.registry import Combine, Part, Recipe, Rule, Term
from sparseft.composition.witness import Witness
from sparseft.diff import Mode, SparseDiff
from sparseft.errors import CompositionError
from sparseft.ops._common import accumulation_dtype, bits
from sparseft.ops._compose_cpu import CpuLayout
from sparseft.ops.apply_diff import sum_entries
from sparseft.ops.combine import combine
from sparseft.ops.packed import EntryTable, PackedTerm, PackedUnion
from sparseft.ops.union import union_of

__all__ = ["Share", "TensorPlan", "UnionPlan", "plan_tensor", "prepared"]


@dataclass(frozen=True)
class Share:
    """One adapter's part in one tensor.

    Args:
        ordinal: the adapter's place in the canonical order of the set.
        values: (nnz,) its diff values.
        positions: (nnz,) int32 or int64 places in the union; None: the whole union.
        mode: "add" or "set".
    """

    ordinal: int
    values: Tensor
    positions: Tensor | None
    mode: Mode


@dataclass(frozen=True)
class TensorPlan:
    """One parameter under a set of adapters.

    Args:
        name: canonical name of the parameter.
        indices: (size,) union of the adapters' flat positions, ascending.
        shares: the adapters' parts, in canonical order.
        clashes: (ordinal, ordinal, flat position) of "set" entries with different values.
        dtype: the parameter's, in which clashes were looked for.
    """

    name: str
    indices: Tensor
    shares: tuple[Share, ...]
    clashes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype

    @cached_property
    def ordinals(self) -> tuple[int, ...]:
        """Whose parts these are."""
        return tuple(s.ordinal for s in self.shares)

    @cached_property
    def wide(self) -> bool:
        """Whether the weight or any part is fp64, so that rounding depends on who takes part."""
        return torch.float64 in (self.dtype, *(s.values.dtype for s in self.shares))

    @cached_property
    def sets(self) -> bool:
        """Whether any part replaces entries."""
        return any(s.mode == "set" for s in self.shares)

    def check(self, coeffs: Sequence[float], names: Sequence[str]) -> None:
        """Check that the coefficients mean something for "set" entries.

        Raises:
            CompositionError: a coefficient other than 0 or 1 on one; two of them disagree.
        """
        for share in self.shares:
            if share.mode == "set" and coeffs[share.ordinal] not in (0, 1):
                raise CompositionError(
                    f"adapter {names[share.ordinal]!r} replaces entries of {self.name!r} (mode "
                    f"'set'), so its coefficient {coeffs[share.ordinal]} has no meaning; wanted 1, "
                    "or 0 to leave it out."
                )
        for a, b, at in self.clashes:
            if coeffs[a] and coeffs[b]:
                raise CompositionError(
                    f"adapters {names[a]!r} and {names[b]!r} both replace entry {at} of "
                    f"{self.name!r} (mode 'set'), by different values; give one of them "
                    "coefficient 0."
                )

    def base(self, saved: Tensor, coeffs: Sequence[float]) -> Tensor:
        """Return what the rest is added to: the saved entries with "set" entries put in.

        Args:
            saved: (size,) entries of the weight beneath; not changed.
            coeffs: by ordinal.
        """
        replaced = [s for s in self.shares if s.mode == "set" and coeffs[s.ordinal]]
        if not replaced:
            return saved
        wide = saved.dtype
        for share in replaced:
            wide = torch.promote_types(wide, share.values.dtype)
        base = saved.to(wide, copy=True)
        for share in replaced:
            values = share.values.detach().to(wide)
            if share.positions is None:
                base.copy_(values)
            else:
                base.index_copy_(0, share.positions.long(), values)
        return base

    def adds(self, coeffs: Sequence[float]) -> list[Share]:
        """Return the parts that add something."""
        return [s for s in self.shares if s.mode == "add" and coeffs[s.ordinal]]

    def total(
        self, saved: Tensor, coeffs: Sequence[float], rule: Rule | Combine
    ) -> tuple[Tensor, Tensor | None]:
        """Return what to add up: (base entries with "set" entries put in, the rest or None).

        Args:
            saved: (size,) entries of the weight beneath; not changed.
            coeffs: by ordinal.
            rule: how the rest combines.
        """
        base = self.base(saved, coeffs)
        terms = [Term(coeffs[s.ordinal], s.values, s.positions) for s in self.adds(coeffs)]
        if not terms:
            return base, None
        size = self.indices.numel()
        return base, combine(terms, size, rule) if isinstance(rule, Rule) else rule(terms, size)

    def composed(self, saved: Tensor, coeffs: Sequence[float], rule: Rule | Combine) -> Tensor:
        """Return (size,) what is to be written: ``rn(base + combined)`` in the dtype of ``saved``.

        Arguments as in `total`.

        Raises:
            CompositionError: a sum or a replacement that the dtype cannot hold.
        """
        base, total = self.total(saved, coeffs, rule)
        dtype = saved.dtype
        made = base.to(dtype) if total is None else sum_entries(base, total, dtype)
        finite = torch.isfinite(made) | ~torch.isfinite(base)
        if total is not None:
            finite &= torch.isfinite(total)
        if not bool(finite.all()):
            for share in self.shares:
                if not bool(torch.isfinite(share.values).all()):
                    raise CompositionError(
                        f"a diff of {self.name!r} holds values that are not finite: they were "
                        "changed after it was loaded. Load the adapter again."
                    )
            raise CompositionError(
                f"the sum of the diffs of {self.name!r} overflows {dtype} with coefficients "
                f"{[coeffs[i] for i in self.ordinals]}; nothing was written. Use smaller ones."
            )
        return made


class UnionPlan(Mapping[str, TensorPlan]):
    """The plans of all parameters under one set of adapters, and what writers derive from them.

    Args:
        plans: canonical parameter name -> plan.
        adapters: how many adapters the set has.
    """

    def __init__(self, plans: Mapping[str, TensorPlan], adapters: int) -> None:
        self._plans = dict(plans)
        self._adapters = adapters
        self._packed: dict[tuple[str, ...], PackedUnion] = {}
        self._pieces: dict[tuple[str, ...], tuple[Tensor, ...]] = {}
        self._samples: dict[tuple[str, ...], EntryTable] = {}
        self._blocks: dict[str, CpuLayout] = {}

    def __getitem__(self, name: str) -> TensorPlan:
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    @cached_property
    def replacing(self) -> list[TensorPlan]:
        """The plans with "set" entries."""
        return [plan for plan in self._plans.values() if plan.sets]

    def blocks(self, name: str) -> CpuLayout:
        """Return the CPU path's layout of a parameter whose parts all add; built once."""
        if name not in self._blocks:
            plan = self._plans[name]
            shares = [(s.values, s.positions) for s in plan.shares]
            self._blocks[name] = CpuLayout.of(plan.indices, shares)
        return self._blocks[name]

    def packed(self, names: tuple[str, ...]) -> PackedUnion:
        """Return the kernels' layout of some parameters of one device; built once."""
        if names not in self._packed:
            plans = [self._plans[name] for name in names]
            terms = [
                [PackedTerm(s.ordinal, s.values, s.positions) for s in p.shares if s.mode == "add"]
                for p in plans
            ]
            self._packed[names] = PackedUnion.pack(
                [p.indices for p in plans], terms, self._adapters
            ).for_writing()
        return self._packed[names]

    def pieces(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Return the parameters' own indices, as views of that layout."""
        if names not in self._pieces:
            union = self.packed(names)
            self._pieces[names] = tuple(union.pieces(union.indices))
        return self._pieces[names]

    def samples(self, names: tuple[str, ...]) -> EntryTable:
        """Return the entries by which somebody else's write is noticed, laid out the same way."""
        if names not in self._samples:
            found = [Witness.sample(self._plans[name].indices) for name in names]
            self._samples[names] = EntryTable.of(found)
        return self._samples[names]


def prepared(diff: SparseDiff, recipe: Recipe, *, name: str, digest: str) -> SparseDiff:
    """Return a diff as a method prepares it; "set" diffs are left as they are.

    Args:
        diff: one adapter's diff of one tensor.
        recipe: the method's.
        name: the tensor's name in the adapter.
        digest: the adapter's.

    Raises:
        CompositionError: the method gives a value that is not finite (a rescaling overflows).
    """
    if recipe.prepare is None or diff.mode == "set":
        return diff
    values = diff.values.detach().to(accumulation_dtype(diff.dtype))
    part = recipe.prepare(Part(diff.indices, values, diff.shape, name, digest))
    if not bool(torch.isfinite(part.values).all()):
        raise CompositionError(
            f"the prepared diff of {name!r} is not finite: rescaling overflows "
            f"{part.values.dtype}. Keep a larger share of the entries."
        )
    return SparseDiff._trusted(part.indices, part.values, diff.shape, diff.mode)


def plan_tensor(
    name: str,
    diffs: Sequence[tuple[int, SparseDiff]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> TensorPlan:
    """Build the plan of one parameter.

    Args:
        name: canonical name.
        diffs: (ordinal, diff), in canonical order, at least one, all of the parameter's shape.
        dtype: the parameter's; "set" values that are equal in it do not clash.
        device: the parameter's.
    """
    moved = [(ordinal, diff.to(device)) for ordinal, diff in diffs]
    union, places = union_of([diff.indices for _, diff in moved])
    if any(union is diff.indices for _, diff in diffs):
        union = union.clone()  # what puts bits back must not change with an adapter, or its file
    shares = tuple(
        Share(ordinal, diff.values, place, diff.mode)
        for (ordinal, diff), place in zip(moved, places, strict=True)
    )
    replacing = [(o, d) for o, d in moved if d.mode == "set"]
    clashes = [
        (a, b, at)
        for (a, one), (b, other) in combinations(replacing, 2)
        if (at := _clash(one, other, dtype)) is not None
    ]
    return TensorPlan(name, union, shares, tuple(clashes), dtype)


def _clash(a: SparseDiff, b: SparseDiff, dtype: torch.dtype) -> int | None:
    """Return the first flat position that both replace by different values, or None."""
    in_b = torch.isin(a.indices, b.indices)
    common = a.indices[in_b]
    ours = a.values[in_b].to(dtype)
    theirs = b.values[torch.searchsorted(b.indices, common)].to(dtype)
    differ = (bits(ours) != bits(theirs)).nonzero()
    return int(common[differ[0, 0]]) if differ.numel() else None
