"""A layer with a diff kept apart: one diff for the batch, and one per group of its rows.

Merged weights are the baseline: what a layer costs when all rows want the same adapter. ``base +
spmm`` pays its product on top; the other contenders are ways to do without the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.benchmarking.checks import Check, as_accurate
from sparseft.benchmarking.masks import random_pattern
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared, attempt
from sparseft.diff import SparseDiff
from sparseft.ops import RowGroups, resolve_backend, spmm
from sparseft.ops.spmm import spmm_reference

__all__ = ["spmm_case"]

_DENSITY = 0.01

MERGED = "merged weight, one for all rows"
OURS = "base + spmm"
CSR = "base + torch.sparse CSR, group by group"
DENSE = "one merged weight per group, group by group"


def spmm_case(shape: tuple[int, int], batch: int, length: int, groups: int) -> Case:
    """Compare for a weight of ``shape`` (out, in) in bf16, at 1 %.

    Args:
        shape: of the weight.
        batch: rows.
        length: tokens of each.
        groups: different diffs; row r has diff r mod ``groups``.
    """

    def build(device: torch.device) -> Prepared:
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator)

        x = drawn(batch, length, shape[1]).to(torch.bfloat16)
        weight = (drawn(*shape) * shape[1] ** -0.5).to(torch.bfloat16)
        diffs = []
        for seed in range(groups):
            pattern = random_pattern(shape, _DENSITY, device=device, seed=seed)
            values = drawn(pattern.nnz) * shape[1] ** -0.5
            diffs.append(SparseDiff.from_pattern(pattern, values))
        lists = [list(range(g, batch, groups)) for g in range(groups)]
        rows = RowGroups.of(lists, batch, device)
        theirs, exact = _definition(x, weight, diffs, rows)

        def check(name: str, got: Tensor) -> list[Check]:
            return [as_accurate(name, got, theirs, exact)]

        def ours() -> Contender:
            run = partial(_spmm, x, weight, diffs, rows)
            backend = resolve_backend("segment_spmm", x, *(d.values for d in diffs))
            facts = {"backend": backend, "nnz": sum(d.nnz for d in diffs), "groups": groups}
            return Contender(run, check(OURS, run()), facts)

        def looped(name: str, make: Callable[..., Callable[[], Tensor]]) -> Contender:
            run = make(x, weight, diffs, lists)
            return Contender(run, check(name, run()))

        def derive(timing: Timing, name: str, contender: Contender) -> Facts:
            return {"us": timing.median(name) * 1e6}

        return Prepared(
            {
                MERGED: Contender(lambda: F.linear(x, weight)),
                OURS: attempt(ours),
                CSR: attempt(lambda: looped(CSR, _csr)),
                DENSE: attempt(lambda: looped(DENSE, _dense)),
            },
            MERGED,
            derive=derive,
        )

    size = f"{shape[0]}x{shape[1]}"
    return Case(f"spmm/{size}/B{batch}xT{length}/G{groups}", build)


def _spmm(x: Tensor, weight: Tensor, diffs: list[SparseDiff], rows: RowGroups) -> Tensor:
    return spmm(x, diffs, rows=rows, add_to=F.linear(x, weight))


def _definition(
    x: Tensor, weight: Tensor, diffs: list[SparseDiff], rows: RowGroups
) -> tuple[Tensor, Tensor]:
    """Return what torch makes of the same sum in bf16 and fp32, and the exact one in fp64.

    The base is the rounded bf16 product in both: it is the same for every contender but DENSE,
    which rounds its weights instead and loses as much.
    """
    base = F.linear(x, weight)

    def define(dtype: torch.dtype) -> Tensor:
        return spmm_reference(
            x.to(dtype), base.to(dtype), [d.values.to(dtype) for d in diffs],
            [d.indices for d in diffs], [], rows.order, rows.ends, *weight.shape,
        )  # fmt: skip

    return define(torch.float32).to(x.dtype), define(torch.float64)


def _csr(
    x: Tensor, weight: Tensor, diffs: list[SparseDiff], lists: list[list[int]]
) -> Callable[[], Tensor]:
    """torch.sparse takes fp32 on every device; its product is added before the one rounding."""
    parts = []
    for diff, rows in zip(diffs, lists, strict=True):
        pattern = diff.pattern
        sparse = torch.sparse_csr_tensor(
            pattern.row_offsets(),
            pattern.col_indices(),
            diff.values,
            diff.shape,
            check_invariants=False,
        )
        parts.append((sparse, torch.tensor(rows, device=x.device)))

    def run() -> Tensor:
        out = F.linear(x, weight)
        for sparse, rows in parts:
            taken = x.index_select(0, rows)
            product = torch.sparse.mm(sparse, taken.flatten(0, 1).float().t()).t()
            held = out.index_select(0, rows)
            out.index_copy_(0, rows, (held + product.view(held.shape)).to(out.dtype))
        return out

    return run


def _dense(
    x: Tensor, weight: Tensor, diffs: list[SparseDiff], lists: list[list[int]]
) -> Callable[[], Tensor]:
    """A merged copy of the weight for each group: as many copies in memory as groups."""
    parts = [
        ((weight.float() + diff.to_dense()).to(weight.dtype), torch.tensor(rows, device=x.device))
        for diff, rows in zip(diffs, lists, strict=True)
    ]

    def run() -> Tensor:
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        for merged, rows in parts:
            out.index_copy_(0, rows, F.linear(x.index_select(0, rows), merged))
        return out

    return run
