"""One use's share of a weight's gradient: by row tiles, or at given entries, never whole.

Each class here does three things. ``tiles(scratch)``: the gradient in flat order, by pieces
in scratch that the caller may overwrite. ``at(pattern)``: its entries. ``add_to(total)``: add it to
a dense sum that is there anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sparseft.diff import SparsePattern
from sparseft.ops import gather_entries, sampled_embedding_grad, sampled_weight_grad
from sparseft.ops._layout import TILE
from sparseft.ops.live_rows import live_rows
from sparseft.ops.score_keys import flat_part

__all__ = ["DenseGradient", "EmbeddingGradient", "Gradient", "LinearGradient", "Scratch", "pieces"]

# Entries of a tile off CPUs: 64 MiB of fp32, so that a GEMM of one tile fills a GPU.
_WIDE_TILE = 1 << 24


class Scratch:
    """One buffer a device and dtype, reused by every tile of every tensor."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return (size,) uninitialised entries, valid until the next call."""
        held = self._held.get((device, dtype))
        if held is None or held.numel() < size:
            held = torch.empty(size, device=device, dtype=dtype)
            self._held[device, dtype] = held
        return held[:size]


def _tile_entries(device: torch.device) -> int:
    return TILE if device.type == "cpu" else _WIDE_TILE


def pieces(flat: Tensor, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, copy) of the parts of a 1-D tensor."""
    step = _tile_entries(flat.device)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        yield start, scratch.take(part.numel(), flat.device, flat.dtype).copy_(part)


class Gradient(Protocol):
    """What a backward hands over for one tensor; sums are in fp32, in fp64 for an fp64 weight."""

    def tiles(self, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        """Yield (flat position of the first, (n,) entries in scratch), in order, without gaps."""
        ...

    def at(self, pattern: SparsePattern) -> Tensor:
        """Return (nnz,) the entries of a pattern."""
        ...

    def add_to(self, total: Tensor, scratch: Scratch) -> None:
        """Add everything to (numel,) ``total``."""
        ...


class LinearGradient:
    """``a.T @ b``: dY and X of a linear layer, or X and dY where the weight is stored (in, out).

    Args:
        a: (T, M) floating.
        b: (T, N) floating.
        wide: dtype of products and sums.
    """

    def __init__(self, a: Tensor, b: Tensor, wide: torch.dtype) -> None:
        self._a, self._b, self._wide = a, b, wide

    @classmethod
    def of_layer(
        cls, grad_output: Tensor, input: Tensor, *, transposed: bool, wide: torch.dtype
    ) -> LinearGradient:
        """Take (T, out) and (T, in); tokens whose output got no gradient are left out."""
        live = live_rows(grad_output, input)
        if live is not None:
            grad_output, input = grad_output[live], input[live]
        a, b = (input, grad_output) if transposed else (grad_output, input)
        return cls(a, b, wide)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        a, b = self._a, self._b
        # CUDA multiplies halves into fp32; elsewhere halves are widened once for all tiles.
        cuda = a.device.type == "cuda" and torch.version.hip is None
        if cuda and a.dtype == b.dtype and a.dtype.itemsize == 2:
            return a, b
        return a.to(self._wide), b.to(self._wide)

    def tiles(self, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        a, b = self._factors
        rows, cols = a.shape[1], b.shape[1]
        step = max(1, _tile_entries(a.device) // max(1, cols))
        for first in range(0, rows, step):
            part = a[:, first : first + step].t()
            tile = scratch.take(part.shape[0] * cols, a.device, self._wide)
            out = tile.view(part.shape[0], cols)
            if a.dtype == self._wide:
                torch.mm(part, b, out=out)
            else:
                torch.ops.aten.mm.dtype_out(part, b, self._wide, out=out)
            yield first * cols, tile

    def at(self, pattern: SparsePattern) -> Tensor:
        return sampled_weight_grad(self._a, self._b, pattern).to(self._wide)

    def add_to(self, total: Tensor, scratch: Scratch) -> None:
        a, b = self._factors
        if a.dtype == total.dtype:
            total.view(a.shape[1], b.shape[1]).addmm_(a.t(), b)
            return
        for start, tile in self.tiles(scratch):
            total[start : start + tile.numel()] += tile


class EmbeddingGradient:
    """Rows of dY summed by token.

    Args:
        grad_output: (T, d) floating.
        ids: (T,) integer.
        vocab: rows of the table.
        padding_idx: row without a gradient, None for none.
        by_frequency: divide by how often a token occurs.
        wide: dtype of sums.
    """

    def __init__(
        self,
        grad_output: Tensor,
        ids: Tensor,
        vocab: int,
        *,
        padding_idx: int | None,
        by_frequency: bool,
        wide: torch.dtype,
    ) -> None:
        self._grad, self._ids, self._vocab = grad_output, ids, vocab
        self._padding, self._by_frequency, self._wide = padding_idx, by_frequency, wide

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """(U,) distinct tokens, ascending, and (U, d) their sums: no more than dY takes."""
        tokens, places, counts = torch.unique(self._ids, return_inverse=True, return_counts=True)
        wide = self._grad.to(self._wide)
        if tokens.numel() == 0:
            return tokens, wide
        # torch's own backward of a small table, which is deterministic on GPUs, too.
        sums = torch.ops.aten.embedding_dense_backward(wide, places, tokens.numel(), -1, False)
        if self._by_frequency:
            sums.div_(counts[:, None])
        if self._padding is not None:
            sums.masked_fill_((tokens == self._padding)[:, None], 0)
        return tokens, sums

    def tiles(self, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        tokens, sums = self._sums
        dim = self._grad.shape[1]
        step = max(1, _tile_entries(sums.device) // max(1, dim))
        firsts = list(range(0, self._vocab, step))
        bounds = torch.tensor([*firsts, self._vocab], device=tokens.device, dtype=tokens.dtype)
        edges = torch.searchsorted(tokens, bounds).tolist()
        for first, lo, hi in zip(firsts, edges[:-1], edges[1:], strict=True):
            rows = min(step, self._vocab - first)
            tile = scratch.take(rows * dim, sums.device, self._wide).zero_()
            tile.view(rows, dim)[tokens[lo:hi] - first] = sums[lo:hi]
            yield first * dim, tile

    def at(self, pattern: SparsePattern) -> Tensor:
        return sampled_embedding_grad(
            self._grad,
            self._ids,
            pattern,
            padding_idx=self._padding,
            scale_grad_by_freq=self._by_frequency,
        ).to(self._wide)

    def add_to(self, total: Tensor, scratch: Scratch) -> None:
        tokens, sums = self._sums
        total.view(self._vocab, -1)[tokens] += sums


class DenseGradient:
    """The whole gradient as autograd made it, of any shape and strides; dropped after this."""

    def __init__(self, grad: Tensor, wide: torch.dtype) -> None:
        self._grad = grad.to_dense() if grad.is_sparse else grad
        self._wide = wide

    def tiles(self, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        step = _tile_entries(self._grad.device)
        for start in range(0, self._grad.numel(), step):
            part = flat_part(self._grad, slice(start, min(start + step, self._grad.numel())))
            yield start, scratch.take(part.numel(), part.device, self._wide).copy_(part)

    def at(self, pattern: SparsePattern) -> Tensor:
        return gather_entries(self._grad, pattern.indices).to(self._wide)

    def add_to(self, total: Tensor, scratch: Scratch) -> None:
        total.view(self._grad.shape).add_(self._grad)
