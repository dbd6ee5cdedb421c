"""A layer with a diff kept apart: one diff for the batch, and one per group of its rows.

Merged weights are the baseline: what a layer costs when all rows want the same adapter. Ours, base
and then `spmm`, pays the diffs' product on top; the others are ways to do without the kernel. A
merged weight per group costs the same at any density and is listed at one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.parts import csr_tensor, typical, where_torch_can
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, as_accurate
from sparseft.benchmarking.competitors import compiled
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.masks import random_pattern
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.diff import SparseDiff
from sparseft.ops import RowGroups, resolve_backend, spmm
from sparseft.ops.spmm import spmm_reference

__all__ = ["BENCH", "CSR", "DENSE", "MERGED", "ROWS", "spmm_case"]

_OP = "spmm"
_DIMS = "OUTxINxBATCHxLENGTHxGROUPS"
_DTYPES = ("bf16", "fp32", "fp16")
_DENSITIES = (0.0005, 0.001, 0.01, 0.1)

MERGED = "merged weight, one for all rows"
CSR = "base + torch.sparse CSR, group by group"
DENSE = "one merged weight per group, group by group"
ROWS = "one merged weight per group, row by row"


def spmm_case(
    shape: tuple[int, int],
    batch: int,
    length: int,
    groups: int,
    densities: tuple[float, ...] = _DENSITIES,
    dtype: str = "bf16",
) -> Case:
    """Compare for a weight of ``shape`` (out, in).

    Args:
        shape: of the weight.
        batch: rows.
        length: tokens of each.
        groups: different diffs; row r has diff r mod ``groups``.
        densities: of the diffs, whose values are fp32.
        dtype: of inputs and weights.
    """

    def build(device: torch.device) -> Prepared:
        kind, numel = torch_dtype(_OP, dtype, _DTYPES), shape[0] * shape[1]
        # merged weights; the definition in fp64, with a dense diff and what makes it; inputs and
        # outputs in all widths, several of each
        need = numel * (kind.itemsize * (1 + groups) + 3 * 8) + 40 * batch * length * sum(shape)
        require_memory(need + 24 * groups * sum(densities) * numel, device)
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(batch, length, shape[1], device=device, generator=generator).to(kind)
        weight = torch.randn(shape, device=device, generator=generator) * shape[1] ** -0.5
        sides = [_Sides(x, weight.to(kind), d, groups, generator) for d in densities]
        contenders = {MERGED: attempt(sides[0].merged)}
        for side in sides:
            label = percent(side.density)
            contenders[f"ours, {label}"] = attempt(side.ours)
            contenders[f"{CSR}, {label}"] = attempt(side.csr)
            if side.density == typical(densities):
                contenders[DENSE] = attempt(partial(side.dense, DENSE))
                contenders[ROWS] = attempt(partial(side.dense, ROWS))
                contenders[f"compiled: {DENSE}"] = attempt(side.compiled)
        return Prepared(contenders, MERGED)

    return Case(case_name(_OP, (*shape, batch, length, groups), dtype), build)


def counts(
    shape: tuple[int, int], rows: list[int], nnz: list[int], length: int, itemsize: int
) -> tuple[float, float]:
    """Return the least bytes of a layer with diffs, and its operations.

    Weight, inputs and outputs once, 8 bytes (index and fp32 value) per entry of a diff. Two
    operations per weight and position, two per entry and position of its rows.

    Args:
        shape: (out, in).
        rows: of each group.
        nnz: of each group's diff.
        length: positions of a row.
        itemsize: of weight, inputs and outputs.
    """
    numel, positions = shape[0] * shape[1], sum(rows) * length
    moved = itemsize * (numel + positions * sum(shape)) + 8 * sum(nnz)
    products = positions * numel + length * sum(r * n for r, n in zip(rows, nnz, strict=True))
    return float(moved), 2.0 * products


class _Sides:
    """The contenders at one density, each held against the layer in fp64."""

    def __init__(
        self, x: Tensor, weight: Tensor, density: float, groups: int, generator: torch.Generator
    ) -> None:
        self.x, self.weight, self.density = x, weight, density
        batch, length, inner = x.shape
        self.diffs = []
        for seed in range(groups):
            pattern = random_pattern(tuple(weight.shape), density, device=x.device, seed=seed)
            values = torch.randn(pattern.nnz, device=x.device, generator=generator)
            self.diffs.append(SparseDiff.from_pattern(pattern, values * inner**-0.5))
        self.lists = [list(range(g, batch, groups)) for g in range(groups)]
        self.at = [torch.tensor(rows, device=x.device) for rows in self.lists]
        self.groups = RowGroups.of(self.lists, batch, x.device)
        sizes, self.nnz = [len(rows) for rows in self.lists], [d.nnz for d in self.diffs]
        self.shape = (weight.shape[0], weight.shape[1])
        itemsize = x.element_size()
        self.bytes, self.flops = counts(self.shape, sizes, self.nnz, length, itemsize)
        self.plain = counts(self.shape, sizes, [0] * groups, length, itemsize)
        self._limits: tuple[Tensor, Tensor] | None = None

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return what torch makes of ``base + spmm`` in fp32, the base rounded as a layer gives it,
        and the exact result.
        """
        if self._limits is None:
            base = F.linear(self.x, self.weight)
            wide = F.linear(self.x.double(), self.weight.double())
            theirs = self._define(torch.float32, base).to(base.dtype)
            self._limits = (theirs, self._define(torch.float64, wide))
        return self._limits

    def _define(self, dtype: torch.dtype, base: Tensor) -> Tensor:
        return spmm_reference(
            self.x.to(dtype), base.to(dtype), [d.values.to(dtype) for d in self.diffs],
            [d.indices for d in self.diffs], [], self.groups.order, self.groups.ends, *self.shape,
        )  # fmt: skip

    def check(self, got: Tensor) -> list[Check]:
        return [as_accurate("result", got, *self.limits())]

    def merged(self) -> Contender:
        def run() -> Tensor:
            return F.linear(self.x, self.weight)

        theirs = F.linear(self.x.float(), self.weight.float()).to(self.x.dtype)
        exact = F.linear(self.x.double(), self.weight.double())
        checks = [as_accurate(MERGED, run(), theirs, exact)]
        return Contender(run, checks, bytes=self.plain[0], flops=self.plain[1])

    def ours(self) -> Contender:
        def run() -> Tensor:
            base = F.linear(self.x, self.weight)
            return spmm(self.x, self.diffs, rows=self.groups, add_to=base)

        backend = resolve_backend("segment_spmm", self.x, *(d.values for d in self.diffs))
        return Contender(
            run,
            self.check(run()),
            {"backend": backend, "nnz": sum(self.nnz), "groups": len(self.diffs)},
            ours=True,
            density=self.density,
            bytes=self.bytes,
            flops=self.flops,
        )

    def csr(self) -> Contender:
        """torch.sparse takes fp32 on every device; its product is added before the one rounding."""
        parts = [
            (csr_tensor(diff.pattern, diff.values), rows)
            for diff, rows in zip(self.diffs, self.at, strict=True)
        ]

        def run() -> Tensor:
            out = F.linear(self.x, self.weight)
            for sparse, rows in parts:
                taken = self.x.index_select(0, rows)
                product = torch.sparse.mm(sparse, taken.flatten(0, 1).float().t()).t()
                held = out.index_select(0, rows)
                out.index_copy_(0, rows, (held + product.view(held.shape)).to(out.dtype))
            return out

        return where_torch_can(
            run, self.check, density=self.density, bytes=self.bytes, flops=self.flops
        )

    def _merged_weights(self) -> list[Tensor]:
        """As many copies of the weight in memory as groups."""
        wide = self.weight.float()
        return [(wide + d.to_dense()).to(self.weight.dtype) for d in self.diffs]

    def _dense_bytes(self) -> float:
        more = (len(self.diffs) - 1) * self.weight.numel() * self.weight.element_size()
        return self.plain[0] + more

    def dense(self, name: str) -> Contender:
        weights = self._merged_weights()
        form: Callable[..., Tensor] = _by_group if name == DENSE else _by_row

        def run() -> Tensor:
            return form(self.x, weights, self.at, self.lists)

        return Contender(
            run,
            self.check(run()),
            bytes=self._dense_bytes(),
            flops=self.plain[1],
        )

    def compiled(self) -> Contender:
        made = compiled(
            _by_group,
            self.x,
            self._merged_weights(),
            self.at,
            self.lists,
            check=self.check,
        )
        made.bytes, made.flops = self._dense_bytes(), self.plain[1]
        return made


def _by_group(x: Tensor, weights: list[Tensor], at: list[Tensor], lists: list[list[int]]) -> Tensor:
    out = x.new_empty(*x.shape[:-1], weights[0].shape[0])
    for merged, rows in zip(weights, at, strict=True):
        out.index_copy_(0, rows, F.linear(x.index_select(0, rows), merged))
    return out


def _by_row(x: Tensor, weights: list[Tensor], at: list[Tensor], lists: list[list[int]]) -> Tensor:
    out = x.new_empty(*x.shape[:-1], weights[0].shape[0])
    for merged, rows in zip(weights, lists, strict=True):
        for row in rows:
            out[row] = F.linear(x[row], merged)
    return out


def _build(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    check_shape(_OP, _DIMS, shape)
    check_densities(_OP, densities)
    out, inner, batch, length, groups = shape
    if groups > batch:
        raise ValueError(f"{_OP}: {groups} groups of {batch} rows; each group needs a row")
    return spmm_case((out, inner), batch, length, groups, densities, dtype)


BENCH = OpBench(
    name=_OP,
    summary="a layer with diffs kept apart, one per group of rows, against merged weights and CSR",
    dims=_DIMS,
    shapes={
        "cuda": ((4096, 4096, 32, 1, 8), (4096, 4096, 8, 128, 8), (768, 768, 32, 128, 2)),
        "cpu": ((768, 768, 8, 1, 4), (768, 768, 4, 64, 2)),
        "tiny": ((64, 48, 6, 4, 2),),
    },
    dtypes=_DTYPES,
    densities=_DENSITIES,
    build=_build,
)
