"""Eight-bit optimizer moments: one byte an entry and one fp32 scale per 256.

The scale is the block's largest magnitude. Codes are spaced by powers, not evenly, so that small
moments keep their leading bits, and no table has to be looked up:

signed (first moments):     ``x = scale * c * |c| / 127**2``,   c in -127 .. 127;
unsigned (second moments):  ``x = scale * (c / 255)**4``,       c in 0 .. 255.

A second moment above zero never becomes zero: its step would be divided by eps alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["QUANTUM", "decode_moment", "encode_moment_", "scales_of"]

# Entries that share a scale; the kernels' number.
QUANTUM = 256


def scales_of(numel: int) -> int:
    """Return how many scales so many entries have."""
    return -(-numel // QUANTUM)


def _blocks(x: Tensor) -> Tensor:
    """View or pad a vector as (scales, QUANTUM)."""
    missing = -x.numel() % QUANTUM
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.view(-1, QUANTUM)


def decode_moment(codes: Tensor, scales: Tensor) -> Tensor:
    """Return (n,) fp32 moments of (n,) int8 (signed) or uint8 codes."""
    c = _blocks(codes).float()
    if codes.dtype == torch.int8:
        x = (c * c.abs()) * (scales / 16129.0).unsqueeze(1)
    else:
        c = c * c
        x = (c * c) * (scales / 4228250625.0).unsqueeze(1)
    return x.view(-1)[: codes.numel()]


def encode_moment_(moment: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write the codes and scales of (n,) moments; the inverse of :func:`decode_moment` up to
    rounding.
    """
    x = _blocks(moment.float())
    size = x.abs()
    torch.amax(size, dim=1, out=scales)
    root = (size / scales.masked_fill(scales == 0, 1).unsqueeze(1)).sqrt_()
    if codes.dtype == torch.int8:
        c = root.mul_(127.0).add_(0.5).floor_().copysign_(x)
    else:
        c = root.sqrt_().mul_(255.0).add_(0.5).floor_()
        c.masked_fill_((x > 0) & (c == 0), 1)
    codes.copy_(c.view(-1)[: codes.numel()])
