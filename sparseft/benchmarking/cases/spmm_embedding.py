"""An embedding with diffs of its table kept apart, one per group of rows, looked up in one call.

One merged table for all rows is the baseline; ours adds the diffs' rows to those of the base table.
The others keep a merged table per group, or look the diffs up in COO tensors. Every result has the
bits of the merged tables: one sum in fp32, one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.parts import coo_tensor, typical, where_torch_can
from sparseft.benchmarking.cases.sampled_embedding import zipf
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, equal_bits
from sparseft.benchmarking.competitors import compiled
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.masks import random_pattern
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.diff import SparseDiff
from sparseft.ops import RowGroups, embedding_diff, resolve_backend
from sparseft.ops.spmm_embedding import embedding_diff_reference

__all__ = ["BENCH", "COO", "DENSE", "MERGED", "ROWS", "spmm_embedding_case"]

_OP = "spmm_embedding"
_DIMS = "VOCABxWIDTHxBATCHxLENGTHxGROUPS"
_DTYPES = ("bf16", "fp32", "fp16")
_DENSITIES = (0.0005, 0.001, 0.01, 0.1)

MERGED = "merged table, one for all rows"
COO = "base + rows of torch.sparse COO, group by group"
DENSE = "one merged table per group, group by group"
ROWS = "one merged table per group, row by row"


def spmm_embedding_case(
    shape: tuple[int, int],
    batch: int,
    length: int,
    groups: int,
    densities: tuple[float, ...] = _DENSITIES,
    dtype: str = "bf16",
) -> Case:
    """Compare for a table of ``shape`` (vocabulary, width), in ``dtype``; diffs are fp32.

    Args:
        shape: of the table.
        batch: rows.
        length: tokens of each.
        groups: different diffs; row r has diff r mod ``groups``.
        densities: of the diffs.
        dtype: of the table.
    """

    def build(device: torch.device) -> Prepared:
        kind, numel = torch_dtype(_OP, dtype, _DTYPES), shape[0] * shape[1]
        # merged tables; the definition's dense diff in fp32; index and value twice per entry
        need = numel * (kind.itemsize * (1 + groups) + 3 * 4) + 24 * batch * length * shape[1]
        require_memory(need + 32 * groups * sum(densities) * numel, device)
        generator = torch.Generator(device).manual_seed(0)
        table = torch.randn(shape, device=device, generator=generator).to(kind)
        ids = zipf(shape[0], batch * length, generator).view(batch, length)
        sides = [_Sides(table, ids, d, groups, generator) for d in densities]
        contenders = {MERGED: attempt(sides[0].merged)}
        for side in sides:
            label = percent(side.density)
            contenders[f"ours, {label}"] = attempt(side.ours)
            contenders[f"{COO}, {label}"] = attempt(side.coo)
            if side.density == typical(densities):
                contenders[DENSE] = attempt(partial(side.dense, _by_group))
                contenders[ROWS] = attempt(partial(side.dense, _by_row))
                contenders[f"compiled: {DENSE}"] = attempt(side.compiled)
        return Prepared(contenders, MERGED)

    return Case(case_name(_OP, (*shape, batch, length, groups), dtype), build)


class _Sides:
    """The contenders at one density, each held against the definition, bit for bit."""

    def __init__(
        self, table: Tensor, ids: Tensor, density: float, groups: int, generator: torch.Generator
    ) -> None:
        self.table, self.ids, self.density = table, ids, density
        self.diffs = []
        for seed in range(groups):
            pattern = random_pattern(tuple(table.shape), density, device=table.device, seed=seed)
            values = torch.randn(pattern.nnz, device=table.device, generator=generator)
            self.diffs.append(SparseDiff.from_pattern(pattern, 0.1 * values))
        self.lists = [list(range(g, len(ids), groups)) for g in range(groups)]
        self.at = [torch.tensor(rows, device=table.device) for rows in self.lists]
        self.groups = RowGroups.of(self.lists, len(ids), table.device)
        self.wanted = embedding_diff_reference(
            F.embedding(ids, table), ids, [d.values for d in self.diffs],
            [d.indices for d in self.diffs], self.groups.order, self.groups.ends, table.shape[0],
        )  # fmt: skip

    def check(self, got: Tensor) -> list[Check]:
        return [equal_bits("result", got, self.wanted)]

    @property
    def looked_up(self) -> int:
        """Ids of 8 bytes; a row of the table in and one of the result out for each."""
        return self.ids.numel() * (8 + 2 * self.table.shape[1] * self.table.element_size())

    @property
    def bytes(self) -> int:
        """And 8 (index and fp32 value) for each entry of a row that its group looks up."""
        found = 0
        for diff, rows in zip(self.diffs, self.at, strict=True):
            offsets = diff.pattern.row_offsets()
            tokens = self.ids[rows].unique()
            found += int((offsets[tokens + 1] - offsets[tokens]).sum())
        return self.looked_up + 8 * found

    def merged(self) -> Contender:
        def run() -> Tensor:
            return F.embedding(self.ids, self.table)

        wanted = self.table.index_select(0, self.ids.flatten()).view(*self.ids.shape, -1)
        return Contender(run, [equal_bits(MERGED, run(), wanted)], bytes=self.looked_up)

    def ours(self) -> Contender:
        def run() -> Tensor:
            base = F.embedding(self.ids, self.table)
            return embedding_diff(base, self.ids, self.diffs, rows=self.groups)

        values = [d.values for d in self.diffs]
        backend = resolve_backend("embedding_diff", self.table, *values)
        nnz = sum(d.nnz for d in self.diffs)
        return Contender(
            run,
            self.check(run()),
            {"backend": backend, "nnz": nnz, "groups": len(self.diffs)},
            ours=True,
            density=self.density,
            bytes=self.bytes,
        )

    def coo(self) -> Contender:
        parts = [
            (coo_tensor(diff.pattern, diff.values), rows)
            for diff, rows in zip(self.diffs, self.at, strict=True)
        ]

        def run() -> Tensor:
            out = F.embedding(self.ids, self.table)
            for sparse, rows in parts:
                found = sparse.index_select(0, self.ids.index_select(0, rows).flatten())
                held = out.index_select(0, rows)
                summed = held.float() + found.to_dense().view(held.shape)
                out.index_copy_(0, rows, summed.to(out.dtype))
            return out

        return where_torch_can(run, self.check, density=self.density, bytes=self.bytes)

    def _merged_tables(self) -> list[Tensor]:
        wide = self.table.float()
        return [(wide + d.to_dense()).to(self.table.dtype) for d in self.diffs]

    def dense(self, form: Callable[..., Tensor]) -> Contender:
        tables = self._merged_tables()

        def run() -> Tensor:
            return form(self.ids, tables, self.at, self.lists)

        return Contender(run, self.check(run()), bytes=self.looked_up)

    def compiled(self) -> Contender:
        made = compiled(
            _by_group,
            self.ids,
            self._merged_tables(),
            self.at,
            self.lists,
            check=self.check,
        )
        made.bytes = self.looked_up
        return made


def _by_group(
    ids: Tensor, tables: list[Tensor], at: list[Tensor], lists: list[list[int]]
) -> Tensor:
    out = tables[0].new_empty(*ids.shape, tables[0].shape[1])
    for table, rows in zip(tables, at, strict=True):
        out.index_copy_(0, rows, F.embedding(ids.index_select(0, rows), table))
    return out


def _by_row(ids: Tensor, tables: list[Tensor], at: list[Tensor], lists: list[list[int]]) -> Tensor:
    out = tables[0].new_empty(*ids.shape, tables[0].shape[1])
    for table, rows in zip(tables, lists, strict=True):
        for row in rows:
            out[row] = F.embedding(ids[row], table)
    return out


def _build(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    check_shape(_OP, _DIMS, shape)
    check_densities(_OP, densities)
    vocab, width, batch, length, groups = shape
    if groups > batch:
        raise ValueError(f"{_OP}: {groups} groups of {batch} rows; each group needs a row")
    return spmm_embedding_case((vocab, width), batch, length, groups, densities, dtype)


BENCH = OpBench(
    name=_OP,
    summary="an embedding with diffs kept apart, one per group of rows, against merged tables",
    dims=_DIMS,
    shapes={
        "cuda": ((250_002, 768, 32, 128, 4), (128_256, 4096, 32, 1, 4)),
        "cpu": ((30_522, 256, 8, 64, 2),),
        "tiny": ((200, 48, 6, 4, 2),),
    },
    dtypes=_DTYPES,
    densities=_DENSITIES,
    build=_build,
)
