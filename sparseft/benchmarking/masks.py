"""Masks for benchmarks: uniformly random, and packed into a few tiles; drawn on their device."""

from __future__ import annotations

import torch

from sparseft.diff import SparsePattern

__all__ = ["packed_pattern", "random_pattern", "sectors_touched"]

TILE = 128
# Entries drawn at a time.
_CHUNK = 1 << 26


def random_pattern(
    shape: tuple[int, ...], density: float, *, device: torch.device, seed: int = 0
) -> SparsePattern:
    """Return each entry with the same chance; at least one."""
    generator = torch.Generator(device).manual_seed(seed)
    numel = torch.Size(shape).numel()
    parts = [torch.empty(0, dtype=torch.int64, device=device)]
    for start in range(0, numel, _CHUNK):
        length = min(_CHUNK, numel - start)
        drawn = torch.rand(length, device=device, generator=generator) < density
        parts.append(drawn.nonzero().view(-1) + start)
    indices = torch.cat(parts)
    if indices.numel() == 0:
        indices = torch.zeros(1, dtype=torch.int64, device=device)
    return SparsePattern.from_indices(indices, shape)


def packed_pattern(
    shape: tuple[int, int],
    density: float,
    *,
    device: torch.device,
    tiles: float = 0.1,
    seed: int = 0,
) -> SparsePattern:
    """Return a mask of that density with every entry in a share of the 128x128 tiles.

    At least one tile; where the tiles are too few for the density, they are full.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rows, cols = shape
    down, across = -(-rows // TILE), -(-cols // TILE)
    count = max(1, round(tiles * down * across))
    chosen = torch.zeros(down * across, dtype=torch.bool, device=device)
    chosen[torch.randperm(down * across, device=device, generator=generator)[:count]] = True
    inside = chosen.view(down, across).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    inside = inside[:rows, :cols]
    within = density * rows * cols / max(1, int(inside.sum()))
    drawn = torch.rand(shape, device=device, generator=generator) < within
    mask = inside & drawn
    if not bool(mask.any()):
        mask = inside
    return SparsePattern.from_mask(mask)


def sectors_touched(pattern: SparsePattern, itemsize: int) -> int:
    """Return how many 32-byte pieces of the tensor hold an entry: what memory moves at least."""
    sectors = pattern.indices // (32 // itemsize)
    return int((sectors[1:] != sectors[:-1]).sum()) + min(1, pattern.nnz)
