"""The largest entries that a low-rank part leaves of a matrix, by blocks that stay in cache.

Two passes over the product, which is recomputed and never stored: one finds the key of the last
entry kept, one writes. A sample of rows brackets that key; the first pass counts the keys above the
bracket and lists those inside it, a few percent of the matrix. The sample steers and never decides:
where the key turns out to lie elsewhere, the pass runs again without a bracket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparseft.ops._svd_problem import full_precision

__all__ = ["BLOCK", "prune_blocks"]

# Entries of a block: with its low-rank part and its keys 3 MiB in fp32, which a core's L2 holds.
BLOCK = 1 << 18
# Columns of a block at most: with fewer rows than 64 the right factor is read as often as it is
# used. Rows wider than this are cut, which matters for embeddings.
_COLUMNS = 1 << 12
# One row in so many is sampled, of at least so many rows; at most about so many entries.
_SAMPLED, _LEAST_ROWS, _SAMPLE = 16, 16, 1 << 20

Refuse = Callable[[int], Exception]


class _Cut(NamedTuple):
    """What is kept: keys above ``key``, and the first ``room`` equal to it; ``all`` of these where
    there are no more.
    """

    key: int
    room: int
    all: bool


def prune_blocks(
    delta: Tensor, left: Tensor, right: Tensor, keep: Sequence[int], refuse: Refuse
) -> None:
    """Do what `prune_residual_` says, for checked arguments of one dtype.

    Args:
        refuse: makes what is raised for a matrix with NaN, from its number.
    """
    with torch.autocast(delta.device.type, enabled=False), full_precision(delta.device):
        # All before any is written: a NaN leaves every matrix as it was.
        cuts: list[_Cut | None] = []
        for i, k in enumerate(keep):
            ranked = 0 < k < delta[i].numel()
            cuts.append(_cut(delta[i], left[i], right[i], k, refuse, i) if ranked else None)
        for i, (k, cut) in enumerate(zip(keep, cuts, strict=True)):
            if cut is not None:
                _write(delta[i], left[i], right[i], cut)
            elif k == 0:
                # by blocks here, too: the low-rank part has the same bits whatever is kept
                for rows, columns in _blocks(delta[i]):
                    delta[i, rows, columns] = left[i, rows] @ right[i, :, columns]


def _blocks(delta: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns; whole matrices on GPUs, which have no such cache to keep to."""
    m, n = delta.shape
    wide = min(n, max(_COLUMNS, BLOCK // m)) if delta.device.type == "cpu" else n
    rows = max(1, BLOCK // wide) if delta.device.type == "cpu" else m
    for top in range(0, m, rows):
        for first in range(0, n, wide):
            yield slice(top, min(top + rows, m)), slice(first, min(first + wide, n))


def _keys(delta: Tensor, low: Tensor) -> Tensor:
    """Return the magnitude bits of ``delta - low``, flat: int32, or int64 of float64."""
    rest = (delta - low).reshape(-1)
    if rest.dtype == torch.float64:
        return rest.view(torch.int64).bitwise_and_(0x7FFF_FFFF_FFFF_FFFF)
    return rest.view(torch.int32).bitwise_and_(0x7FFF_FFFF)


def _infinity(keys: Tensor) -> int:
    return 0x7FF0_0000_0000_0000 if keys.dtype == torch.int64 else 0x7F80_0000


def _above(keys: Tensor, threshold: int) -> Tensor:
    """Return int64 positions of keys above the threshold, ascending."""
    if keys.device.type == "cpu":
        # 0.13 ms with the gather for 256 Ki, a tenth of them above, against 0.57 by torch's mask
        return torch.from_numpy(np.flatnonzero(keys.numpy() > threshold))
    return (keys > threshold).nonzero().view(-1)


def _ranked(keys: Tensor, ranks: Sequence[int]) -> list[int]:
    """Return the keys of these ranks, 1 the largest."""
    places = [keys.numel() - r for r in ranks]
    if keys.device.type == "cpu":
        array = np.partition(keys.numpy(), places)  # 29 times faster than torch.topk
        return [int(array[p]) for p in places]
    keys = keys.sort().values
    return [int(keys[p]) for p in places]


def _cut(
    delta: Tensor, left: Tensor, right: Tensor, keep: int, refuse: Refuse, number: int
) -> _Cut:
    m, n = delta.shape
    rows = max(1, min(_SAMPLED, m // _LEAST_ROWS))
    columns = max(1, (m // rows) * n // _SAMPLE)
    sample = _keys(delta[::rows, ::columns], left[::rows] @ right[:, ::columns])
    size = sample.numel()
    rank = max(1, keep * size // delta.numel())
    # Entries of a row are no independent samples: more than their standard deviation.
    margin = 4 * math.isqrt(rank) + size // 64 + 4
    high, low = _ranked(sample, (max(1, rank - margin), min(size, rank + margin)))
    del sample
    found = _between(delta, left, right, keep, low - 1, high, refuse, number)
    if found is None:
        found = _between(delta, left, right, keep, -1, None, refuse, number)
    if found is None:
        raise RuntimeError("prune_residual_: a matrix changed while it was read")
    return found


def _between(
    delta: Tensor, left: Tensor, right: Tensor, keep: int, low: int, high: int | None,
    refuse: Refuse, number: int,
) -> _Cut | None:  # fmt: skip
    """Return the cut, or None if its key is not in ``low < key <= high``."""
    above, listed, held, every = 0, [], 0, True
    for rows, columns in _blocks(delta):
        keys = _keys(delta[rows, columns], left[rows] @ right[:, columns])
        found = keys[_above(keys, low)]
        if found.numel() and int(found.max()) > _infinity(keys):
            raise refuse(number)
        if high is not None:
            inside = found[found <= high]
            above += found.numel() - inside.numel()
            found = inside
        if above >= keep:
            return None
        listed.append(found)
        held += found.numel()
        if held > 2 * keep + BLOCK:  # only where the bracket is wide: a sample that misled, or ties
            together = torch.cat(listed)
            (low,) = _ranked(together, (keep - above,))
            larger = together[together > low]
            # Keys equal to it that come later are not listed: enough of them are.
            listed = [larger, larger.new_full((keep - above - larger.numel(),), low)]
            held, every = keep - above, False
    keys = torch.cat(listed)
    if keys.numel() < keep - above:
        return None
    (key,) = _ranked(keys, (keep - above,))
    room = keep - above - int((keys > key).sum())
    return _Cut(key, room, every and room == int((keys == key).sum()))


def _write(delta: Tensor, left: Tensor, right: Tensor, cut: _Cut) -> None:
    """Replace by the low-rank part what is not kept."""
    before = None if cut.all else _ties_before(delta, left, right, cut.key)
    for number, (rows, columns) in enumerate(_blocks(delta)):
        block = delta[rows, columns]
        low = left[rows] @ right[:, columns]
        keys = _keys(block, low)
        kept = _above(keys, cut.key - 1)
        if before is not None:
            tied = (keys[kept] == cut.key).nonzero().view(-1)
            row = kept[tied] // low.shape[1]
            rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
            stay = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
            stay[tied[rank + before[number][row] >= cut.room]] = False
            kept = kept[stay]
        # scattered into the low-rank part: a quarter of the time of torch.where
        low.view(-1)[kept] = block.reshape(-1)[kept]
        block.copy_(low)


def _ties_before(delta: Tensor, left: Tensor, right: Tensor, key: int) -> list[Tensor]:
    """Return for each block and each of its rows how many ties precede them in flat order."""
    counts: list[Tensor] = []
    tops: list[int] = []
    for rows, columns in _blocks(delta):
        low = left[rows] @ right[:, columns]
        counts.append((_keys(delta[rows, columns], low) == key).view(low.shape).sum(1))
        tops.append(rows.start)
    beside = tops.count(tops[0])  # blocks of one run of rows
    total, out = 0, []
    for at in range(0, len(counts), beside):
        table = torch.stack(counts[at : at + beside], 1)  # (rows, blocks beside each other)
        ends = table.view(-1).cumsum(0).view_as(table) + total
        out += list((ends - table).unbind(1))
        total = int(ends[-1, -1])
    return out
