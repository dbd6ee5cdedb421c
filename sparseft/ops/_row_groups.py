"""What products with sparse diffs share: which rows have which diff, checks, kernel tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseft.diff import SparseDiff
from sparseft.errors import DiffError
from sparseft.ops._common import Operator, accumulation_dtype, watched
from sparseft.ops._csr import csr_of

if TYPE_CHECKING:
    from sparseft_kernels.spmm import Segment

__all__ = [
    "RowGroups",
    "bias_of",
    "call_op",
    "checked",
    "flattened",
    "rows_of_group",
    "segments_of",
    "spans",
    "why_no_kernel",
    "wide_of",
]


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Which rows of a batch belong to which diff.

    Args:
        order: (n,) int32 or int64 rows of dim 0, group after group; None: rows 0 to n - 1.
        ends: where each group ends in that order.
        batch: rows of the batch; those in no group have no diff.
    """

    order: Tensor | None
    ends: tuple[int, ...]
    batch: int

    @classmethod
    def whole(cls, batch: int) -> RowGroups:
        """Return one group of all rows."""
        return cls(None, (batch,), batch)

    @classmethod
    def of(
        cls, groups: Sequence[Sequence[int]], batch: int, device: torch.device | str | None = None
    ) -> RowGroups:
        """Group rows by list.

        Args:
            groups: the rows of each group, no row twice.
            batch: how many rows there are.
            device: of the batch.

        Raises:
            DiffError: a row out of range or in two groups.
        """
        flat = [row for group in groups for row in group]
        if any(not 0 <= row < batch for row in flat) or len(set(flat)) < len(flat):
            raise DiffError(
                f"spmm: the groups {[list(g) for g in groups]} should name rows from 0 to "
                f"{batch - 1}, each once at most"
            )
        ends, total = [], 0
        for group in groups:
            total += len(group)
            ends.append(total)
        if flat == list(range(len(flat))):
            return cls(None, tuple(ends), batch)
        order = torch.tensor(flat, dtype=torch.int32).to(device or "cpu")
        return cls(order, tuple(ends), batch)


def checked(
    op: str, diffs: SparseDiff | Sequence[SparseDiff], rows: RowGroups | None, x: Tensor
) -> tuple[list[SparseDiff], RowGroups]:
    """Return diffs and groups that fit each other and the batch ``x``."""
    many = [diffs] if isinstance(diffs, SparseDiff) else list(diffs)
    if not many:
        raise DiffError(f"{op}: no diff was given; give at least one")
    if x.ndim < 1 or (rows is None and len(many) > 1):
        raise DiffError(f"{op}: {len(many)} diffs were given without rows=RowGroups.of(...)")
    groups = RowGroups.whole(x.shape[0]) if rows is None else rows
    if len(groups.ends) != len(many):
        raise DiffError(f"{op}: {len(groups.ends)} groups of rows were given {len(many)} diffs")
    if groups.batch != x.shape[0]:
        raise DiffError(
            f"{op}: the groups are of a batch of {groups.batch} rows but the input has shape "
            f"{tuple(x.shape)}"
        )
    for at, diff in enumerate(many):
        if len(diff.shape) != 2 or diff.shape != many[0].shape:
            raise DiffError(
                f"{op}: diff {at} has shape {tuple(diff.shape)}; it should have two dimensions, "
                f"like the first, {tuple(many[0].shape)}"
            )
        if diff.mode != "add":
            raise DiffError(
                f"{op}: diff {at} has mode 'set', which needs the weight's own entries; make it an "
                "'add' diff (set values minus the weight's)"
            )
        if diff.device != x.device:
            raise DiffError(
                f"{op}: diff {at} is on {diff.device} but the input is on {x.device}; move it "
                "there first"
            )
    if groups.order is not None and groups.order.device != x.device:
        raise DiffError(
            f"{op}: the groups are on {groups.order.device} but the input is on {x.device}; make "
            "them with device="
        )
    return many, groups


def wide_of(x: Tensor, other: Tensor | None, values: Sequence[Tensor]) -> torch.dtype:
    dtypes = [x.dtype, *(v.dtype for v in values)]
    return accumulation_dtype(*dtypes, *(() if other is None else (other.dtype,)))


def why_no_kernel(tensors: Sequence[Tensor], indices: Sequence[Tensor], rows: int) -> str | None:
    for t in tensors:
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"an operand is {t.dtype} and the kernels sum in float32"
    if any(i.numel() >= 2**31 for i in indices) or rows >= 2**31:
        return "a diff has 2**31 entries or rows"
    return None


def spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


def segments_of(
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    biases: Sequence[Tensor],
    ends: Sequence[int],
    rows: int,
    cols: int,
    transposed: bool,
) -> list[Segment]:
    from sparseft_kernels.spmm import Segment

    made = []
    for g, (start, end) in enumerate(spans(ends)):
        csr = csr_of(indices[g], rows, cols, transposed=transposed)
        held = csr.arranged(values[g].detach().float()).contiguous()
        bias = bias_of(biases, g)
        bias = None if bias is None else bias.float().contiguous()
        made.append(
            Segment(
                csr.offsets, csr.inputs, held, bias, csr.long_rows, csr.limit, start, end - start
            )
        )
    return made


def bias_of(biases: Sequence[Tensor], group: int) -> Tensor | None:
    """Return a group's bias; None where there are none, or an empty one stands in its place."""
    return biases[group].detach() if biases and biases[group].numel() else None


def flattened(x: Tensor) -> Tensor:
    """Return (B, ..., N) as contiguous (B, L, N)."""
    length = x.shape[1:-1].numel()
    return x.detach().reshape(x.shape[0], length, x.shape[-1]).contiguous()


def rows_of_group(x: Tensor, order: Tensor | None, start: int, end: int) -> Tensor:
    return x[start:end] if order is None else x.index_select(0, order[start:end])


def call_op(op: Operator, args: Sequence[Any]) -> Tensor:
    """Call an op like `Operator` does, with an eye on the tensors inside its lists."""
    flat = [t for a in args for t in (a if isinstance(a, list) else (a,))]
    return (op.overload if watched(*flat) else op.implementation)(*args)
