"""Random masks of an exact number of entries; only their sizes on fake tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparseft.diff import SparsePattern
from sparseft.pattern import index_dtype_for
from sparseft.profiling.models import faked

__all__ = ["count_at", "exact_pattern", "packed_mask"]

TILE = 128
# Of all tiles, how many a packed mask may use.
PACKED_TILES = 0.1


def count_at(density: float, numel: int) -> int:
    """Entries of a tensor in training: the nearest number to its share, at least one."""
    return min(numel, max(1, round(density * numel)))


def exact_pattern(
    shape: tuple[int, ...],
    density: float,
    *,
    device: torch.device,
    seed: int = 0,
    packed: bool = False,
) -> SparsePattern:
    """Return ``round(density * numel)`` positions, drawn uniformly.

    In stretches, each with its share of the count, so that drawing needs no memory of the tensor's
    size. Of one seed, the entries of a lower density are among those of a higher one wherever the
    stretches are whole.

    Args:
        shape: of the tensor.
        density: in (0, 1].
        device: where to draw.
        seed: of the draw.
        packed: within a tenth of the 128 x 128 tiles, or as many as the count needs.
    """
    numel = math.prod(shape)
    count = count_at(density, numel)
    dtype = index_dtype_for(numel)
    if faked():
        return SparsePattern._trusted(torch.empty(count, dtype=dtype, device=device), shape)
    generator = torch.Generator(device).manual_seed(seed)
    if packed and len(shape) == 2:
        allowed = packed_mask((shape[0], shape[1]), count, device=device, seed=seed)
        places = allowed.view(-1).nonzero().view(-1)
        kept = _positions(places.numel(), count, generator, device)
        return SparsePattern._trusted(places[kept].to(dtype), shape)
    return SparsePattern._trusted(_positions(numel, count, generator, device).to(dtype), shape)


def _positions(numel: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return ``count`` of ``range(numel)``, ascending."""
    if count == numel:
        return torch.arange(numel, device=device)
    dtype = index_dtype_for(numel)
    # On a CPU what fits its caches; on a GPU few launches.
    stretch = 1 << (20 if device.type == "cpu" else 24)
    parts, done = [], 0
    for start in range(0, numel, stretch):
        length = min(stretch, numel - start)
        until = count * (start + length) // numel
        order = torch.randperm(length, generator=generator, device=device, dtype=torch.int32)
        mask = torch.zeros(length, dtype=torch.bool, device=device)
        mask[order[: until - done]] = True
        parts.append(mask.nonzero().view(-1).add_(start).to(dtype))
        done = until
    return torch.cat(parts)


def packed_mask(shape: tuple[int, int], count: int, *, device: torch.device, seed: int) -> Tensor:
    """Return the entries of a random tenth of the tiles; of more where those hold too few."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, cols = shape
    down, across = -(-rows // TILE), -(-cols // TILE)
    order = torch.randperm(down * across, device=device, generator=generator)
    used = max(1, round(PACKED_TILES * down * across))
    while True:
        chosen = torch.zeros(down * across, dtype=torch.bool, device=device)
        chosen[order[:used]] = True
        grid = chosen.view(down, across).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        mask = grid[:rows, :cols].contiguous()
        held = int(mask.sum())
        if held >= count:
            return mask
        # Tiles at the edges are smaller: as many more as full ones would need, and again.
        used += max(1, math.ceil((count - held) / TILE**2))
