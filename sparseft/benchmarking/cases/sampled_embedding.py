"""The gradient of an embedding table at a mask against torch's dense and sparse ones.

Tokens are drawn as text has them, a few often and most rarely. Dense: the whole table's gradient,
then the mask's entries of it. ``sparse=True``: a row per position, summed up by token
(``coalesce``), as `torch.optim.SparseAdam` does before it steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.parts import in_its_dtype, typical, where_torch_can
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, as_accurate
from sparseft.benchmarking.competitors import compiled
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.masks import random_pattern
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.diff import SparsePattern
from sparseft.ops import resolve_backend, sampled_embedding_grad

__all__ = ["BENCH", "DENSE", "SPARSE", "sampled_embedding_case"]

_OP = "sampled_embedding"
_DIMS = "VOCABxWIDTHxTOKENS"
_DTYPES = ("bf16", "fp32", "fp16")
_DENSITIES = (0.0005, 0.001, 0.01, 0.1)

DENSE = "dense embedding gradient"
SPARSE = "torch sparse=True, coalesced"


def sampled_embedding_case(
    shape: tuple[int, int],
    tokens: int,
    densities: tuple[float, ...] = _DENSITIES,
    dtype: str = "bf16",
) -> Case:
    """Compare for a table of ``shape`` (vocabulary, width); dY in ``dtype``."""

    def build(device: torch.device) -> Prepared:
        kind, (vocab, width) = torch_dtype(_OP, dtype, _DTYPES), shape
        # tables in fp64 and fp32 for the gate, two results; rows of the positions in three widths
        table, rows = 8 + 4 + 2 * kind.itemsize, 8 + 4 + 4 * kind.itemsize
        require_memory(table * vocab * width + rows * tokens * width, device)
        generator = torch.Generator(device).manual_seed(0)
        dy = torch.randn(tokens, width, device=device, generator=generator).to(kind)
        ids = zipf(vocab, tokens, generator)
        sides = _Sides(dy, ids, vocab)
        contenders = {DENSE: attempt(sides.dense), SPARSE: attempt(sides.sparse)}
        for density in densities:
            label, pattern = percent(density), random_pattern(shape, density, device=device)
            makers: dict[str, Callable[..., Contender]] = {
                f"dense, then gather, {label}": sides.gathered,
                f"ours, {label}": sides.ours,
            }
            if density == typical(densities):  # the gather is a small part: one compilation
                makers[f"compiled: dense, then gather, {label}"] = sides.compiled
            for name, make in makers.items():
                contenders[name] = attempt(partial(make, name, pattern, density))
        facts = {"tokens": tokens, "different tokens": int(ids.unique().numel())}
        return Prepared(contenders, DENSE, facts=facts)

    return Case(case_name(_OP, (*shape, tokens), dtype), build)


def zipf(vocab: int, count: int, generator: torch.Generator) -> Tensor:
    """Return token ids with a chance of about ``1 / (id + 1)`` each."""
    drawn = torch.rand(count, device=generator.device, generator=generator, dtype=torch.float64)
    return ((vocab + 1.0) ** drawn - 1).long().clamp_(max=vocab - 1)


def bytes_moved(pattern: SparsePattern, ids: Tensor, itemsize: int) -> tuple[int, int]:
    """Return the least bytes that ours moves, and its additions.

    Ids of 8 bytes; per position each 32-byte piece of its row of dY that holds a masked column;
    an index of 4 bytes for each entry whose token occurs, and a value of 4 for every entry.
    """
    vocab, width = pattern.shape
    per_sector = 32 // itemsize
    at = pattern.indices.long()
    rows, cols = at // width, at % width
    pieces = rows * -(-width // per_sector) + cols // per_sector
    first = torch.ones_like(pieces, dtype=torch.bool)
    first[1:] = pieces[1:] != pieces[:-1]
    per_row = torch.bincount(rows, minlength=vocab)
    touched = torch.bincount(rows[first], minlength=vocab)
    found = per_row[ids.unique()].sum()
    moved = 8 * ids.numel() + 32 * touched[ids].sum() + 4 * found + 4 * pattern.nnz
    return int(moved), int(per_row[ids].sum())


class _Sides:
    """The contenders on the same positions, each held against the sums in fp64."""

    def __init__(self, dy: Tensor, ids: Tensor, vocab: int) -> None:
        self.dy, self.ids, self.vocab = dy, ids, vocab
        self.exact = _summed(dy.double(), ids, vocab)
        self.theirs = _dense(dy.float(), ids, vocab).flatten()
        self.most = int(torch.bincount(ids).max())
        self.rows = dy.numel() * dy.element_size() + 8 * ids.numel()
        self.flops = float(dy.numel())

    def check(self, name: str, got: Tensor, at: Tensor | slice = slice(None)) -> list[Check]:
        """Of the sides that sum in ``dtype``: a token's rows one after the other, each rounded."""
        return [in_its_dtype(name, got.flatten(), self.exact[at], terms=self.most)]

    def dense(self) -> Contender:
        def run() -> Tensor:
            return _dense(self.dy, self.ids, self.vocab)

        moved = self.rows + self.vocab * self.dy.shape[1] * self.dy.element_size()
        return Contender(run, self.check(DENSE, run()), bytes=moved, flops=self.flops)

    def sparse(self) -> Contender:
        def run() -> Tensor:
            grad = torch.ops.aten.embedding_sparse_backward(
                self.dy, self.ids, self.vocab, -1, False
            )
            return grad.coalesce()

        held = self.ids.unique().numel()
        return where_torch_can(
            run,
            lambda got: self.check(SPARSE, got.to_dense()),
            bytes=self.rows + held * (8 + self.dy.shape[1] * self.dy.element_size()),
            flops=self.flops,
        )

    def moved(self, pattern: SparsePattern) -> int:
        """As if the dense gradient were never written: the rows, then indices and values."""
        return self.rows + pattern.nnz * (4 + self.dy.element_size())

    def gathered(self, name: str, pattern: SparsePattern, density: float) -> Contender:
        at = pattern.indices.long()

        def run() -> Tensor:
            return _gathered(self.dy, self.ids, at, self.vocab)

        checks = self.check(name, run(), at)
        moved = self.moved(pattern)
        return Contender(run, checks, density=density, bytes=moved, flops=self.flops)

    def compiled(self, name: str, pattern: SparsePattern, density: float) -> Contender:
        at = pattern.indices.long()
        made = compiled(
            partial(_gathered, vocab=self.vocab),
            self.dy,
            self.ids,
            at,
            check=lambda got: self.check(name, got, at),
            density=density,
        )
        made.bytes, made.flops = self.moved(pattern), self.flops
        return made

    def ours(self, name: str, pattern: SparsePattern, density: float) -> Contender:
        def run() -> Tensor:
            return sampled_embedding_grad(self.dy, self.ids, pattern)

        at = pattern.indices.long()
        moved, additions = bytes_moved(pattern, self.ids, self.dy.element_size())
        backend = resolve_backend("sampled_embedding_grad", self.dy, self.ids, pattern.indices)
        return Contender(
            run,
            [as_accurate(name, run(), self.theirs[at], self.exact[at])],
            {"backend": backend, "nnz": pattern.nnz},
            ours=True,
            density=density,
            bytes=moved,
            flops=float(additions),
        )


def _dense(dy: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """What ``nn.Embedding`` does backwards."""
    return torch.ops.aten.embedding_dense_backward(dy, ids, vocab, -1, False)


def _gathered(dy: Tensor, ids: Tensor, at: Tensor, vocab: int) -> Tensor:
    return _dense(dy, ids, vocab).flatten()[at]


def _summed(dy: Tensor, ids: Tensor, vocab: int) -> Tensor:
    return dy.new_zeros(vocab, dy.shape[1]).index_add_(0, ids, dy).flatten()


def _build(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    check_shape(_OP, _DIMS, shape)
    check_densities(_OP, densities)
    vocab, width, tokens = shape
    return sampled_embedding_case((vocab, width), tokens, densities, dtype)


BENCH = OpBench(
    name=_OP,
    summary="an embedding table's gradient at the mask against dense and sparse=True gradients",
    dims=_DIMS,
    shapes={
        "cuda": ((250_002, 768, 4096), (250_002, 768, 16384), (128_256, 4096, 16384)),
        "cpu": ((30_522, 256, 2048),),
        "tiny": ((200, 48, 64),),
    },
    dtypes=_DTYPES,
    densities=_DENSITIES,
    build=_build,
)
