"""Stochastic rounding to bf16 and fp16 from a counter-based random stream."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["philox", "round_stochastically", "rounds_either_way"]

_WORD = 0xFFFFFFFF


def philox(seed: int, low: Tensor, high: Tensor, tensor: int, step: int) -> Tensor:
    """Return the first 32-bit word of Philox-4x32-7 at counter (low, high, tensor, step), in int64.

    Source: Salmon, Moraes, Dror & Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    c0, c1 = low & _WORD, high & _WORD
    c2, c3 = torch.full_like(c0, tensor & _WORD), torch.full_like(c0, step & _WORD)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(7):
        # products of 32-bit words wrap in int64, with the right bits
        one, two = c2 * 0xCD9E8D57, c0 * 0xD2511F53
        c0, c2 = ((one >> 32) & _WORD) ^ c1 ^ k0, ((two >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = one & _WORD, two & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0


def round_stochastically(
    x: Tensor, dtype: torch.dtype, address: Tensor, *, seed: int, tensor: int, step: int
) -> Tensor:
    """Round fp32 to one of its two neighbours in bf16 or fp16, the nearer the likelier.

    ``E[result] = x`` (below fp16's normal range to 2**-38). A value that the dtype has stays.

    Args:
        x: (n,) fp32.
        dtype: bfloat16 or float16; any other is rounded to nearest.
        address: (n,) flat positions in the weight.
        seed, tensor, step: with the position, the key of the random word: the packing of tensors
            does not matter.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    address = address.long()
    word = philox(seed, address, address >> 32, tensor, step)
    bits = x.view(torch.int32)
    kept = 16 if dtype == torch.bfloat16 else 13
    moved = (bits + (word & ((1 << kept) - 1)).int()) & -(1 << kept)
    finite = (bits & 0x7F800000) != 0x7F800000
    out = torch.where(finite, moved, bits).view(torch.float32)
    if dtype == torch.float16:
        size = x.abs()
        small = size < 2.0**-14
        units = ((torch.where(small, size, 0.0) * 2.0**38).long() + (word & 0x3FFF)) >> 14
        fine = units.float() * 2.0**-24
        out = torch.where(small, torch.where(x < 0, -fine, fine), out)
    return out.to(dtype)


def rounds_either_way(found: Tensor, base: Tensor, values: Tensor) -> bool:
    """Tell whether bf16 or fp16 entries are ``base + values``, rounded up or down."""
    if found.dtype not in (torch.bfloat16, torch.float16):
        return False
    exact = base.float() + values.detach().to(base.device).float()
    nearest = exact.to(found.dtype)

    def rank(x: Tensor) -> Tensor:  # consecutive integers for consecutive values
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    apart = rank(found) - rank(nearest)
    other_side = (exact - nearest.float()).sign().int()
    return bool(((apart == 0) | (apart == other_side)).all())
