"""The sampled gradients on a GPU: from a mask's tiles to the launchers.

Imported where a kernel is about to run, never at import of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.ops._tiles import Tiles, tiles_of
from sparseft_kernels._configs import TILE
from sparseft_kernels._launch import target_of
from sparseft_kernels.sampled_grad import (
    aligned,
    is_copied,
    launch_dot_grad,
    launch_embedding_grad,
    launch_tile_grad,
)

__all__ = ["sampled_embedding_triton", "sampled_grad_triton"]

sampled_embedding_triton = launch_embedding_grad


def _precision(a: Tensor, b: Tensor) -> str:
    """Return how products are taken: "half" for 16-bit operands, else as torch's own fp32 matmul
    is set: "ieee" unless the user allowed "tf32".
    """
    if a.dtype == b.dtype and a.element_size() == 2:
        return "half"
    # Not allow_tf32: reading it raises once a program has set the newer option.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
    return "tf32" if allowed else "ieee"


def _reads_loosely(a: Tensor, b: Tensor, tiles: Tiles) -> bool:
    """Say whether tiles will read an operand in pieces under 16 bytes: misaligned, and not copied
    to leave out inactive columns or to pad its rows.
    """
    rows, cols = tiles.rows, tiles.cols
    loose_a = rows.active is None and not (aligned(a) or is_copied(a, cols.size, whole=False))
    loose_b = cols.active is None and not (aligned(b) or is_copied(b, rows.size, whole=True))
    return loose_a or loose_b


def sampled_grad_triton(
    grad_output: Tensor, input: Tensor, indices: Tensor, out: Tensor, *, accumulate: bool
) -> None:
    """Write, or add, ``(grad_output.T @ input).flatten()[indices]`` to ``out``.

    Args:
        grad_output: (T, M) fp32, bf16 or fp16, T > 0, any strides.
        input: (T, N) likewise.
        indices: (nnz,) ascending flat positions in (M, N), contiguous, nnz > 0.
        out: (nnz,) fp32, contiguous.
        accumulate: add to ``out`` instead of overwriting it.
    """
    tiles = tiles_of(indices, grad_output.shape[1], input.shape[1])
    precision = _precision(grad_output, input)
    # packed operands are copies, and aligned
    if precision == "half" and _reads_loosely(grad_output, input, tiles):
        precision = "loose"
    itemsize = max(grad_output.element_size(), input.element_size())
    tokens = grad_output.shape[0]
    config, split = tiles.plan(tokens, itemsize, precision, target_of(out.device))
    if config is None:
        launch_dot_grad(grad_output, input, indices, out, accumulate=accumulate)
        return
    launch_tile_grad(
        tiles.rows.take(grad_output),
        tiles.cols.take(input),
        tiles.codes(indices),
        tiles.work[config.block_n // TILE],
        out,
        config,
        split=split,
        accumulate=accumulate,
        precision="tf32" if precision == "tf32" else "ieee",
    )
