"""The random matrix of the block iteration: signs from a counter, the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.ops._backend import resolve_backend
from sparseft.ops._rounding import philox

__all__ = ["SKETCH_ROWS", "sign_sketch"]

# Keeps these random words apart from those of stochastic rounding, whose tensors and steps count
# from 0.
_TENSOR, _STEP = 0x5BD1E995, 0xFFFFFFFF

# Rows drawn at a time: their words and bits are int64, several times the size of the result.
SKETCH_ROWS = 1 << 14


def sign_sketch(
    rows: int,
    columns: range,
    seed: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
) -> Tensor:
    """Return columns of the infinite +-1 matrix of a seed, (rows, len(columns)).

    Entry (i, j) is bit ``j % 32`` of the Philox word of (seed, i, j // 32): a function of the seed
    and the position alone, exact in every dtype and the same bits on every backend. Signs serve the
    iteration as Gaussians do (error 1.007 of optimal against 1.0065, two power iterations, singular
    values i ** -0.5).
    """
    out = torch.empty((rows, len(columns)), dtype=dtype, device=device)
    if not out.numel():
        return out
    if resolve_backend("sign_sketch", out, backend=backend) == "triton":
        from sparseft_kernels.svd import launch_sign_sketch

        launch_sign_sketch(out, columns, seed, tensor=_TENSOR, step=_STEP)
        return out
    return out.copy_(sign_sketch_reference(rows, columns, seed, device=device))


def sign_sketch_reference(rows: int, columns: range, seed: int, *, device: torch.device) -> Tensor:
    """The definition of `sign_sketch`, in int64."""
    first, last = columns.start // 32, (columns.stop - 1) // 32
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    block = torch.arange(first, last + 1, dtype=torch.int64, device=device)[None, :]
    low, high = torch.broadcast_tensors(row, block)
    words = philox(seed, low, high, _TENSOR, _STEP)
    bit = torch.arange(32, dtype=torch.int64, device=device)
    bits = ((words[:, :, None] >> bit) & 1).view(rows, -1)
    start = columns.start - 32 * first
    return 2 * bits[:, start : start + len(columns)] - 1
