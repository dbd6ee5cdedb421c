"""A weight's entries read, written, written as a sum, and a diff applied and undone.

Beside the ops: plain torch indexing, eager and compiled, and what one does without indices at all,
a pass over the whole tensor: a copy, or the sum with a dense or a COO tensor. Bytes are the least
that memory moves for the op, whoever does it: GB/s of one operation compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.parts import coo_tensor, typical, where_torch_can
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, as_accurate, equal_bits
from sparseft.benchmarking.competitors import compiled
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.masks import random_pattern, sectors_touched
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.ops import (
    apply_diff_,
    gather_entries,
    resolve_backend,
    sum_entries,
    undo_,
    write_entries_,
    write_sum_,
)

__all__ = ["BENCHES", "entries_case"]

_DIMS = "ROWSxCOLS"
_DTYPES = ("bf16", "fp32", "fp16")
_DENSITIES = (0.0005, 0.001, 0.01, 0.1)
_BACKENDS = {
    "capture": "gather_entries",
    "restore": "write_entries_",
    "write_sum": "write_sum_",
    "apply_diff": "write_sum_",
}
# The pass over the whole tensor, the baseline.
_WHOLE = {
    "capture": "dense: weight.clone()",
    "restore": "dense: weight.copy_(base)",
    "write_sum": "dense: weight.copy_(base + diff)",
    "apply_diff": "dense: weight += diff, weight.copy_(base)",
}


def entries_case(
    op: str,
    shape: tuple[int, int],
    densities: tuple[float, ...] = _DENSITIES,
    dtype: str = "bf16",
) -> Case:
    """Compare one of ``capture``, ``restore``, ``write_sum``, ``apply_diff`` on a tensor.

    Diffs are fp32. ``apply_diff``: adds a diff to the weight, keeps what was there, and undoes it.
    """

    def build(device: torch.device) -> Prepared:
        kind, numel = torch_dtype(op, dtype, _DTYPES), shape[0] * shape[1]
        # the weight, its base, a diff and three results; entries: index twice, values, COO
        per_entry = 4 + 8 + 16 + 16 + 3 * kind.itemsize
        require_memory(numel * (6 * kind.itemsize + 16 + sum(densities) * per_entry), device)
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(shape, device=device, generator=generator).to(kind)
        contenders = {_WHOLE[op]: attempt(partial(_whole, op, weight, generator))}
        for density in densities:
            pattern = random_pattern(shape, density, device=device)
            values = 0.1 * torch.randn(pattern.nnz, device=device, generator=generator)
            side = _Entries(op, weight, pattern, values, density)
            label = percent(density)
            contenders[f"torch indexing, {label}"] = attempt(side.indexed)
            if op in ("write_sum", "apply_diff"):
                contenders[f"torch.sparse COO add, {label}"] = attempt(side.coo)
            contenders[f"ours, {label}"] = attempt(side.ours)
            if density == typical(densities):
                contenders[f"compiled: torch indexing, {label}"] = attempt(side.compiled)
        return Prepared(contenders, _WHOLE[op])

    return Case(case_name(op, shape, dtype), build)


def bytes_moved(op: str, pattern: SparsePattern, itemsize: int) -> int:
    """Return the least bytes: per entry an index of 4 and its values; the weight's 32-byte pieces
    that hold an entry, in, and out again where they are written.

    Values: those captured or restored; base and diff of a sum. Applying a diff reads it and keeps
    what was there; undoing reads that and the indices again.
    """
    values = {
        "capture": itemsize,
        "restore": itemsize,
        "write_sum": itemsize + 4,
        "apply_diff": 4 + itemsize + 4 + itemsize,
    }[op]
    passes = {"capture": 1, "restore": 2, "write_sum": 2, "apply_diff": 4}[op]
    return pattern.nnz * (4 + values) + passes * 32 * sectors_touched(pattern, itemsize)


def _whole(op: str, weight: Tensor, generator: torch.Generator) -> Contender:
    """Without indices: every entry is read and written."""
    base, size = weight.clone(), weight.numel() * weight.element_size()
    diff = 0.1 * torch.randn(weight.shape, device=weight.device, generator=generator)
    exact = base.double() + diff.double()
    diff = diff.to(weight.dtype)
    target = weight.clone()

    if op == "capture":
        checks = [equal_bits(op, weight.clone(), weight)]
        return Contender(weight.clone, checks, bytes=2 * size)
    if op == "restore":

        def restore() -> Tensor:
            return target.copy_(base)

        return Contender(restore, [equal_bits(op, restore(), base)], bytes=2 * size)
    theirs = (base.float() + diff.float()).to(base.dtype)

    def write_sum() -> Tensor:
        return torch.add(base, diff, out=target)

    summed = as_accurate(op, write_sum(), theirs, exact)
    if op == "write_sum":
        return Contender(write_sum, [summed], bytes=3 * size)

    def apply_diff() -> Tensor:
        target.add_(diff)
        return target.copy_(base)

    return Contender(apply_diff, [summed, equal_bits("undone", apply_diff(), base)], bytes=5 * size)


@dataclass
class _Entries:
    """The contenders at one density. They write one weight, the same entries at every call."""

    op: str
    weight: Tensor
    pattern: SparsePattern
    values: Tensor
    density: float

    def __post_init__(self) -> None:
        self.at = self.pattern.indices
        self.wide = self.at.long()
        self.base = self.weight.view(-1)[self.wide]
        self.saved = self.values.to(self.weight.dtype)
        self.moved = bytes_moved(self.op, self.pattern, self.weight.element_size())

    def wanted(self) -> Tensor:
        """What the op returns, or makes of the weight, by its definition."""
        if self.op == "capture":
            return self.base
        wanted = self.weight.clone()
        if self.op == "restore":
            wanted.view(-1)[self.wide] = self.saved
        elif self.op == "write_sum":
            summed = sum_entries(self.base, self.values, wanted.dtype)
            wanted.view(-1)[self.wide] = summed
        return wanted  # applied and undone: the weight itself

    def same(self, got: Tensor) -> list[Check]:
        return [equal_bits(self.op, got, self.wanted())]

    def contender(self, run: Callable[[Tensor], Tensor], *, ours: bool = False) -> Contender:
        """Checked on a copy; timed on one as well, as the weight is everyone's."""
        checks = self.same(run(self.weight.clone()))
        target = self.weight if self.op == "capture" else self.weight.clone()
        return Contender(
            lambda: run(target), checks, ours=ours, density=self.density, bytes=self.moved
        )

    def ours(self) -> Contender:
        diff = SparseDiff.from_pattern(self.pattern, self.values)
        applied: list[Check] = []

        def run(target: Tensor) -> Tensor:
            if self.op == "capture":
                return gather_entries(target, self.at)
            if self.op == "restore":
                write_entries_(target, self.at, self.saved)
            elif self.op == "write_sum":
                write_sum_(target, self.at, self.base, self.values)
            else:
                undo_(target, self.at, apply_diff_(target, diff))
            return target

        if self.op == "apply_diff":  # undone it shows nothing of the sum
            target = self.weight.clone()
            apply_diff_(target, diff)
            wanted = self.weight.clone()
            wanted.view(-1)[self.wide] = sum_entries(self.base, self.values, wanted.dtype)
            applied = [equal_bits("applied", target, wanted)]
        made = self.contender(run, ours=True)
        made.checks += applied
        backend = resolve_backend(_BACKENDS[self.op], self.weight, self.at)
        made.facts = {"backend": backend, "nnz": self.pattern.nnz}
        return made

    def torch_form(self) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
        return {
            "capture": _capture,
            "restore": _restore,
            "write_sum": _write_sum,
            "apply_diff": _apply_and_undo,
        }[self.op]

    def indexed(self) -> Contender:
        form = self.torch_form()
        return self.contender(
            lambda target: form(target, self.wide, self.base, self.values, self.saved)
        )

    def compiled(self) -> Contender:
        target = self.weight.clone()
        made = compiled(
            self.torch_form(),
            target,
            self.wide,
            self.base,
            self.values,
            self.saved,
            check=self.same,
            density=self.density,
        )
        made.bytes = self.moved
        return made

    def coo(self) -> Contender:
        """Its sums stay in the weight's dtype; subtracting does not bring every bit back, so that
        the undoing is not checked.
        """
        target, at = self.weight.clone(), self.wide
        sparse = coo_tensor(self.pattern, self.saved)
        exact = self.base.double() + self.values.double()
        theirs = (self.base.float() + self.saved.float()).to(target.dtype)

        def check(got: Tensor) -> list[Check]:
            rest = got.clone()
            rest.view(-1)[at] = self.base
            found = as_accurate(self.op, got.view(-1)[at], theirs, exact)
            return [found, equal_bits("the rest", rest, self.weight)]

        made = where_torch_can(
            lambda: target.add_(sparse), check, density=self.density, bytes=self.moved
        )
        if made.run is not None:
            made.run = partial(_there_and_back, target, sparse, self.op == "apply_diff")
        return made


def _there_and_back(target: Tensor, sparse: Tensor, back: bool) -> Tensor:
    target.add_(sparse)
    return target.sub_(sparse) if back else target


def _capture(weight: Tensor, at: Tensor, base: Tensor, values: Tensor, saved: Tensor) -> Tensor:
    return weight.view(-1)[at]


def _restore(weight: Tensor, at: Tensor, base: Tensor, values: Tensor, saved: Tensor) -> Tensor:
    weight.view(-1)[at] = saved
    return weight


def _write_sum(weight: Tensor, at: Tensor, base: Tensor, values: Tensor, saved: Tensor) -> Tensor:
    weight.view(-1)[at] = (base.float() + values).to(weight.dtype)
    return weight


def _apply_and_undo(
    weight: Tensor, at: Tensor, base: Tensor, values: Tensor, saved: Tensor
) -> Tensor:
    flat = weight.view(-1)
    before = flat[at]
    flat[at] = (before.float() + values).to(weight.dtype)
    flat[at] = before
    return weight


def _bench(op: str, summary: str) -> OpBench:
    def build(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
        check_shape(op, _DIMS, shape)
        check_densities(op, densities)
        rows, cols = shape
        return entries_case(op, (rows, cols), densities, dtype)

    return OpBench(
        name=op,
        summary=summary,
        dims=_DIMS,
        shapes={
            "cuda": ((250_002, 768), (4096, 11008)),
            "cpu": ((8192, 1024),),
            "tiny": ((64, 48),),
        },
        dtypes=_DTYPES,
        densities=_DENSITIES,
        build=build,
    )


BENCHES = (
    _bench("capture", "a weight's entries at the mask read (gather_entries) against indexing"),
    _bench("restore", "entries written back (write_entries_, undo_) against index assignment"),
    _bench("write_sum", "base plus diff written (write_sum_) against indexing and COO adds"),
    _bench("apply_diff", "a diff applied and undone (apply_diff_, undo_) against COO add and sub"),
)
