"""What masks hold, tensor by tensor: the rows of `Attachment.report` and their table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.seen_entries import SeenEntries, seen_entries
from sparseft.modules.storage_stack import holders
from sparseft.ops import gather_entries

__all__ = ["MaskReport", "MaskReports", "report_masks"]


class MaskReport(NamedTuple):
    """One row of `Attachment.report`.

    Args:
        name: of the masked parameter; ``"total"`` in `MaskReports.total`.
        shape: of the parameter; ``()`` in the total.
        dtype: of the parameter, or how it is quantised; where several meet in the total, all of
            them.
        nnz: trained entries.
        density: nnz over all entries.
        changed: entries of the diff that are not zero.
        l1: sum of absolute diffs.
        max_abs: largest absolute diff.
        l2: Euclidean norm of the diff.
        rounded_away: entries whose diff is not zero but whose weight is still the base's: it is
            too small for the weight's dtype. The adapter has them nevertheless. None are, beside a
            quantised weight.
        no_gradient: entries that no gradient other than zero has reached so far; None where nobody
            has looked (`SparseCallback`, `track` and `TrainingMeter` look).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    density: float
    changed: int
    l1: float
    max_abs: float
    l2: float
    rounded_away: int
    no_gradient: int | None


_HEADER = (
    "parameter", "shape", "dtype", "nnz", "density", "changed", "l1", "l2", "max |diff|",
    "rounded away", "no gradient yet",
)  # fmt: skip


class MaskReports(list[MaskReport]):
    """The rows of `Attachment.report`: a list that prints as a table.

    Example:
        >>> import torch, sparseft
        >>> model = torch.nn.Linear(4, 3)
        >>> sparse = sparseft.attach(model, {"weight": torch.eye(3, 4) > 0})
        >>> print(sparse.report())
        parameter  shape    dtype  nnz  density  changed  l1  l2  max |diff|  rounded away  no gradient yet
        weight       3x4  float32    3      25%        0   0   0           0             0                -
        total             float32    3      25%        0   0   0           0             0                -
    """  # noqa: E501

    @property
    def total(self) -> MaskReport:
        """All rows as one."""
        entries = sum(math.prod(row.shape) for row in self)
        nnz = sum(row.nnz for row in self)
        unseen = [row.no_gradient for row in self if row.no_gradient is not None]
        return MaskReport(
            "total",
            (),
            ", ".join(sorted({row.dtype for row in self})),
            nnz,
            nnz / entries if entries else 0.0,
            sum(row.changed for row in self),
            math.fsum(row.l1 for row in self),
            max((row.max_abs for row in self), default=0.0),
            math.sqrt(math.fsum(row.l2**2 for row in self)),
            sum(row.rounded_away for row in self),
            sum(unseen) if unseen else None,
        )

    def __str__(self) -> str:
        lines = [_HEADER, *map(_cells, self), _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )

    def to_markdown(self) -> str:
        """Return the table in Markdown, for a card or an issue."""
        rule = [":--", *["--:"] * (len(_HEADER) - 1)]
        header = [cell.replace("|", r"\|") for cell in _HEADER]
        lines = [header, rule, *([f"`{c[0]}`", *c[1:]] for c in map(_cells, self))]
        lines.append(list(_cells(self.total)))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _repr_markdown_(self) -> str:  # what notebooks show
        return self.to_markdown()


def _cells(row: MaskReport) -> tuple[str, ...]:
    return (
        row.name,
        "x".join(map(str, row.shape)),
        row.dtype,
        f"{row.nnz:,}",
        f"{100 * row.density:.3g}%",
        f"{row.changed:,}",
        f"{row.l1:.4g}",
        f"{row.l2:.4g}",
        f"{row.max_abs:.4g}",
        f"{row.rounded_away:,}",
        "-" if row.no_gradient is None else f"{row.no_gradient:,}",
    )


def report_masks(masks: Iterable[MaskedParameter]) -> MaskReports:
    """Describe masked parameters; waits for each device once."""
    masks = list(masks)
    flags = [seen_entries(masked) for masked in masks]
    numbers = _fetch([_numbers(m, seen) for m, seen in zip(masks, flags, strict=True)])
    rows = MaskReports()
    for masked, seen, (changed, l1, largest, l2, rounded, unseen) in zip(
        masks, flags, numbers, strict=True
    ):
        if seen is not None:
            seen.settle(int(unseen))
        rows.append(
            MaskReport(
                masked.name,
                tuple(masked.pattern.shape),
                masked.scheme or str(masked.weight.dtype).removeprefix("torch."),
                masked.pattern.nnz,
                masked.pattern.density,
                int(changed),
                l1,
                largest,
                l2,
                int(rounded),
                None if seen is None else int(unseen),
            )
        )
    return rows


@torch.no_grad()
def _numbers(masked: MaskedParameter, seen: SeenEntries | None) -> Tensor:
    """Return (6,) float64 on the leaf's device: the computed columns of a row."""
    masked.follow_weight_()
    leaf = masked.leaf.detach()
    if not leaf.numel():
        return torch.zeros(6, dtype=torch.float64, device=leaf.device)
    changed = leaf != 0
    size = leaf.abs()
    none = leaf.new_zeros(())
    columns = (
        changed.sum(),
        size.sum(),
        size.max(),
        torch.linalg.vector_norm(leaf),
        none if masked.separate else (changed & (_entries(masked) == masked.base)).sum(),
        none if seen is None else seen.unseen(),
    )
    return torch.stack([column.to(torch.float64) for column in columns])


def _entries(masked: MaskedParameter) -> Tensor:
    """Return what a weight holds at its mask."""
    stack = holders(masked.weight)
    # (Of a sharded weight no process has all; a report is not to wait for the others.)
    if stack and stack[-1] is masked.holder and masked.shards is None:
        return gather_entries(masked.weight.detach(), masked.indices, backend=masked.backend)
    # Something lies on top: what the weight will hold without it.
    return masked.expected_entries(masked.leaf.detach())


def _fetch(numbers: Sequence[Tensor]) -> list[list[float]]:
    """Bring the numbers of all masks here, in one transfer for each device."""
    out: list[list[float]] = [[] for _ in numbers]
    for device in dict.fromkeys(t.device for t in numbers):
        where = [i for i, t in enumerate(numbers) if t.device == device]
        for i, row in zip(where, torch.stack([numbers[i] for i in where]).tolist(), strict=True):
            out[i] = row
    return out
