"""Exact top-k of non-negative scores over many tensors, one pass, without concatenating them.

Definition: sort all entries by (score descending, order of ``add``, flat index) and keep the first
k.

How: keys are the bits of the float, whose integer order is the order of magnitudes. Entries above
the running threshold join a buffer; when it holds 2k, an exact selection cuts it back to k and
raises the threshold to the k-th key. Later entries *equal* to the threshold can be dropped at once,
because ties go to whoever came first: so the buffer is bounded by 2k + one chunk even when every
score is the same. Each score is read once. A histogram of the bits with a second pass over the
scores was measured too: torch.bincount alone costs 2.9 ns an entry, this whole pass about 3, and it
needs no second evaluation of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparseft.diff import SparsePattern
from sparseft.errors import MaskError

__all__ = ["StreamingTopK", "topk_patterns", "topk_reference", "topk_single"]

# Scores looked at together: 1 Mi entries, so temporaries stay near 12 MiB.
_CHUNK = 1 << 20

NamedScores = Iterable[tuple[str, Tensor]]


def topk_reference(named_scores: NamedScores, nnz: int) -> dict[str, Tensor]:
    """The definition, by one stable sort of everything: name -> bool mask."""
    scores = dict(named_scores)
    everything = torch.cat([s.detach().flatten().abs().double() for s in scores.values()])
    keep = torch.zeros(everything.shape, dtype=torch.bool)
    keep[torch.argsort(everything, descending=True, stable=True)[:nnz]] = True
    parts = keep.split([s.numel() for s in scores.values()])
    return {n: part.view(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}


class _Segment(NamedTuple):
    ordinal: int  # which tensor, in order of add
    keys: Tensor  # int32 or int64
    indices: Tensor  # flat positions, ascending, in the tensor's index dtype


def _keys(scores: Tensor) -> Tensor:
    """Return the magnitude bits of a floating tensor: int32, or int64 for float64."""
    if scores.dtype == torch.float64:
        return scores.contiguous().view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF
    return scores.to(torch.float32).contiguous().view(torch.int32) & 0x7FFF_FFFF


def _infinity(keys: Tensor) -> int:
    return 0x7FF0_0000_0000_0000 if keys.dtype == torch.int64 else 0x7F80_0000


def _kth_largest(keys: Tensor, k: int) -> int:
    """Return the k-th largest of a 1-D integer tensor, 1 <= k <= len."""
    if keys.device.type == "cpu":
        # numpy's selection is vectorised: 1.0 ms for 1 Mi int32 against 29 ms for torch.topk, 17 ms
        # for kthvalue.
        place = keys.numel() - k
        return int(np.partition(keys.numpy(), place)[place])
    return int(torch.topk(keys, k, sorted=False).values.min())


def _above(keys: Tensor, threshold: int) -> Tensor:
    """Return int64 positions of keys above the threshold, ascending."""
    if keys.device.type == "cpu":
        # 1.7 ms for 1 Mi against 3.8 ms for torch's comparison and nonzero
        return torch.from_numpy(np.flatnonzero(keys.numpy() > threshold))
    return (keys > threshold).nonzero().view(-1)


def _check_count(nnz: int, what: str) -> None:
    if isinstance(nnz, bool) or not isinstance(nnz, int) or nnz < 0:
        raise MaskError(f"{what} is {nnz!r}; it should be an integer >= 0")


def _flat_chunks(scores: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first flat index, 1-D piece); a non-contiguous tensor is copied a piece at a time."""
    if scores.is_contiguous() or scores.ndim < 2:
        flat = scores.reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            yield start, flat[start : start + _CHUNK]
        return
    width = max(1, scores.numel() // max(1, scores.shape[0]))
    rows = max(1, _CHUNK // width)
    for row in range(0, scores.shape[0], rows):
        yield row * width, scores[row : row + rows].reshape(-1)


class StreamingTopK:
    """Exactly the ``nnz`` largest scores over all tensors added, ties by (order of ``add``, flat
    index).

    Args:
        nnz: how many entries to keep in total.

    Memory: 8 bytes for each of at most 2 nnz + 1 Mi buffered entries (16 with float64 scores) and
    as much again while cutting; nothing grows with the number or size of the tensors.

    Example:
        >>> top = StreamingTopK(2)
        >>> top.add("a", torch.tensor([1.0, 3.0]))
        >>> top.add("b", torch.tensor([3.0, 0.0]))
        >>> [p.indices.tolist() for p in top.finish().values()]
        [[1], [0]]
    """

    def __init__(self, nnz: int) -> None:
        _check_count(nnz, "nnz")
        self._nnz = nnz
        self._shapes: dict[str, torch.Size] = {}
        self._devices: list[torch.device] = []
        self._segments: list[_Segment] = []
        self._held = 0
        self._seen = 0
        self._threshold = -1  # keys above it are still in the running
        self._double = False

    def add(self, name: str, scores: Tensor, *, abs: bool = False) -> None:
        """Offer one tensor's scores. Call in canonical order: it decides ties.

        Args:
            name: key of the result; each name once.
            scores: any shape, floating, non-negative unless ``abs``.
            abs: take the magnitude of ``scores`` first.

        Raises:
            MaskError: NaN or (without ``abs``) negative scores, a dtype that is not floating, a
                repeated name.
        """
        if name in self._shapes:
            raise MaskError(f"scores for {name!r} were added twice")
        if not scores.is_floating_point():
            raise MaskError(
                f"scores for {name!r} have dtype {scores.dtype}; they should be floating"
            )
        scores = scores.detach()
        if scores.dtype == torch.float64 and not self._double:
            self._widen()
        ordinal = len(self._shapes)
        self._shapes[name] = scores.shape
        self._devices.append(scores.device)
        self._seen += scores.numel()
        dtype = torch.int32 if scores.numel() < 2**31 else torch.int64
        for start, piece in _flat_chunks(scores):
            if not abs and bool((piece < 0).any()):
                raise MaskError(
                    f"scores for {name!r} hold negative values; pass abs=True to rank magnitudes"
                )
            keys = _keys(piece.double() if self._double else piece)
            # NaN bits lie above every number's, so a NaN always passes the threshold: look among
            # those that do.
            found = _above(keys, self._threshold if self._nnz else _infinity(keys))
            keys = keys[found]
            if keys.numel() and int(keys.max()) > _infinity(keys):
                at = start + int(found[keys.argmax()])
                raise MaskError(
                    f"scores for {name!r} hold NaN (first seen at flat index {at}); a selection "
                    "cannot rank it"
                )
            if not self._nnz or not keys.numel():
                continue
            if keys.numel() > self._nnz:
                # One piece alone overflows the budget: cut it first, so that the buffer never
                # passes 2 nnz.
                keep = _cut([keys], self._nnz)[0]
                keys, found = keys[keep], found[keep]
            self._segments.append(_Segment(ordinal, keys, (found + start).to(dtype)))
            self._held += keys.numel()
            if self._held >= 2 * self._nnz:
                self._compact()

    def _widen(self) -> None:
        """Turn the buffered fp32 keys into fp64 keys: the first float64 tensor arrived."""
        self._double = True

        def widen(keys: Tensor) -> Tensor:
            return _keys(keys.view(torch.float32).double())

        self._segments = [s._replace(keys=widen(s.keys)) for s in self._segments]
        if self._threshold >= 0:
            bits = torch.tensor([self._threshold], dtype=torch.int32)
            self._threshold = int(widen(bits))

    def _compact(self) -> None:
        """Cut the buffer to the best ``nnz`` and raise the threshold to the worst of them."""
        if self._held <= self._nnz:
            return
        keeps = _cut([s.keys for s in self._segments], self._nnz)
        self._segments = [
            _Segment(s.ordinal, s.keys[keep], s.indices[keep])
            for s, keep in zip(self._segments, keeps, strict=True)
        ]
        self._segments = [s for s in self._segments if s.keys.numel()]
        self._held = self._nnz
        self._threshold = min(int(s.keys.min()) for s in self._segments)

    def finish(self) -> dict[str, SparsePattern]:
        """Return the chosen entries of every tensor added, in order of ``add``; the object is
        spent.

        Raises:
            MaskError: fewer scores were added than entries asked for.
        """
        if self._seen < self._nnz:
            raise MaskError(
                f"nnz={self._nnz} entries were asked for but only {self._seen} scores were added"
            )
        self._compact()
        parts: dict[int, list[Tensor]] = {}
        for segment in self._segments:
            parts.setdefault(segment.ordinal, []).append(segment.indices)
        self._segments = []
        result: dict[str, SparsePattern] = {}
        for ordinal, (name, shape) in enumerate(self._shapes.items()):
            dtype = torch.int32 if math.prod(shape) < 2**31 else torch.int64
            chosen = parts.pop(ordinal, [])
            indices = (
                torch.cat(chosen)
                if chosen
                else torch.empty(0, dtype=dtype, device=self._devices[ordinal])
            )
            result[name] = SparsePattern._trusted(indices, shape)
        return result


def _cut(keys: list[Tensor], k: int) -> list[Tensor]:
    """Return, per piece, ascending positions of the k largest keys over all pieces; ties to the
    earliest.
    """
    threshold = _kth_largest(
        torch.cat(keys)
        if len({t.device for t in keys}) == 1
        else torch.cat([t.cpu() for t in keys]),
        k,
    )
    # All from the threshold up, less the ties that there is no room for, ascending as it is:
    # putting ties among the larger ones by a sort took half the time of a selection.
    found = [_above(t, threshold - 1) for t in keys]
    tied = [(t[f] == threshold).nonzero().view(-1) for t, f in zip(keys, found, strict=True)]
    room = k - sum(f.numel() - e.numel() for f, e in zip(found, tied, strict=True))
    out = []
    for f, e in zip(found, tied, strict=True):
        if e.numel() > room:
            keep = torch.ones(f.numel(), dtype=torch.bool, device=f.device)
            keep[e[room:]] = False
            f = f[keep]
        room -= min(room, e.numel())
        out.append(f)
    return out


def topk_patterns(
    named_scores: NamedScores | Callable[[], NamedScores], nnz: int, *, abs: bool = False
) -> dict[str, SparsePattern]:
    """Return the patterns of the ``nnz`` largest scores over all named tensors; see
    :class:`StreamingTopK`.

    Args:
        named_scores: pairs (name, scores) in canonical order, or a function that returns them. Read
            once, one tensor at a time, so a generator may compute each score when asked.
        nnz: how many entries to keep in total.
        abs: rank magnitudes.

    Raises:
        MaskError: as in :meth:`StreamingTopK.add` and :meth:`StreamingTopK.finish`.
    """
    top = StreamingTopK(nnz)
    for name, scores in named_scores() if callable(named_scores) else named_scores:
        top.add(name, scores, abs=abs)
    return top.finish()


def topk_single(
    scores: Tensor, k: int, *, per_row: bool = False, abs: bool = False, name: str = "scores"
) -> SparsePattern:
    """Return the pattern of the k largest scores of one tensor, or of each of its rows.

    Args:
        scores: any shape, floating, non-negative unless ``abs``.
        k: entries to keep, in total or per row (a row is everything behind one index of dim 0).
        per_row: keep exactly k in every row; ties go to the lowest column.
        abs: rank magnitudes.
        name: used in error messages.

    Raises:
        MaskError: NaN or negative scores, or k larger than there are scores (per row).
    """
    if not per_row:
        return topk_patterns([(name, scores)], k, abs=abs)[name]
    _check_count(k, "k")
    rows = scores.shape[0] if scores.ndim > 1 else 1
    width = scores.numel() // rows if rows else 0
    if rows and k > width:
        raise MaskError(f"{k} entries per row were asked for but rows of {name!r} have {width}")
    dtype = torch.int32 if scores.numel() < 2**31 else torch.int64
    parts = [torch.empty(0, dtype=dtype, device=scores.device)]
    step = max(1, _CHUNK // max(1, width))
    table = scores.detach().reshape(rows, width)
    for row in range(0, rows, step):
        piece = table[row : row + step]
        if not abs and bool((piece < 0).any()):
            raise MaskError(
                f"scores for {name!r} hold negative values; pass abs=True to rank magnitudes"
            )
        keys = _keys(piece).view(piece.shape)
        if keys.numel() and int(keys.max()) > _infinity(keys):
            raise MaskError(f"scores for {name!r} hold NaN; a selection cannot rank it")
        if k:
            parts.append((_row_mask(keys, k).view(-1).nonzero().view(-1) + row * width).to(dtype))
    return SparsePattern._trusted(torch.cat(parts), scores.shape)


def _row_mask(keys: Tensor, k: int) -> Tensor:
    """Return the bool mask of the k largest keys in each row, ties to the lowest column."""
    threshold = torch.topk(keys, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = keys > threshold, keys == threshold
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))
