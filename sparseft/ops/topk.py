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

That is the reference. Tensors that all lie on one GPU are read in place by Triton kernels instead
(sparseft_kernels/topk.py), twice as a rule; the patterns are the same bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparseft.diff import SparsePattern, index_dtype_for
from sparseft.errors import MaskError
from sparseft.ops._backend import Resolved, current_backend, resolve_backend

__all__ = [
    "StreamingTopK",
    "TopK",
    "topk_differences",
    "topk_patterns",
    "topk_reference",
    "topk_single",
]

# Scores looked at together: 1 Mi entries, so temporaries stay near 12 MiB.
_CHUNK = 1 << 20

# What the kernels read. float64 keys have twice the bits: they stay on the reference.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NamedScores = Iterable[tuple[str, Tensor]]
NamedPairs = Iterable[tuple[str, Tensor, Tensor]]


class TopK(NamedTuple):
    """A selection.

    Args:
        patterns: name -> kept entries, in the order given.
        zeros: how many kept entries have score 0: they only fill the count.
    """

    patterns: dict[str, SparsePattern]
    zeros: int


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


def _check_tensor(name: str, tensor: Tensor, known: Container[str]) -> None:
    if name in known:
        raise MaskError(f"scores for {name!r} were added twice")
    if not tensor.is_floating_point():
        raise MaskError(f"scores for {name!r} have dtype {tensor.dtype}; they should be floating")


def _check_pair(name: str, theta1: Tensor, theta0: Tensor) -> None:
    if theta1.shape != theta0.shape:
        raise MaskError(
            f"theta1 of {name!r} has shape {tuple(theta1.shape)} but theta0 has "
            f"{tuple(theta0.shape)}; they should be one tensor before and after training"
        )
    if not theta0.is_floating_point():
        raise MaskError(f"theta0 of {name!r} has dtype {theta0.dtype}; it should be floating")


def _check_room(nnz: int, seen: int) -> None:
    if seen < nnz:
        raise MaskError(f"nnz={nnz} entries were asked for but only {seen} scores were added")


def _negative(name: str, at: int) -> str:
    return f"scores for {name!r} hold negative values; pass abs=True to rank magnitudes"


def _nan_score(name: str, at: int) -> str:
    return (
        f"scores for {name!r} hold NaN (first seen at flat index {at}); a selection cannot rank it"
    )


def _nan_difference(name: str, at: int) -> str:
    return (
        f"differences of {name!r} are NaN (first at flat index {at}); a selection cannot rank "
        "them. Did training diverge?"
    )


def difference(theta1: Tensor, theta0: Tensor) -> Tensor:
    """Return theta1 - theta0 on theta1's device, in fp32, or fp64 if either side is fp64."""
    wide = torch.promote_types(torch.promote_types(theta1.dtype, theta0.dtype), torch.float32)
    return theta1.to(wide) - theta0.to(device=theta1.device, dtype=wide)


def flat_part(tensor: Tensor, part: slice) -> Tensor:
    """Return entries ``part`` of a tensor in row-major order; only strided tensors are copied."""
    if tensor.is_contiguous() or tensor.ndim < 2:
        return tensor.reshape(-1)[part]
    # Whole rows around the part, so that no copy of the tensor is made.
    width = tensor.numel() // tensor.shape[0]
    first, last = part.start // width, -(-part.stop // width)
    rows = tensor[first:last].reshape(-1)
    return rows[part.start - first * width : part.stop - first * width]


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
        self.zeros = 0
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
        scores = scores.detach()
        ordinal = self._open(name, scores, scores.dtype)
        for start, piece in _flat_chunks(scores):
            if not abs and bool((piece < 0).any()):
                raise MaskError(_negative(name, start))
            self._offer(ordinal, start, piece, _nan_score)

    def add_difference(self, name: str, theta1: Tensor, theta0: Tensor) -> None:
        """Offer ``|theta1 - theta0|`` of one tensor, taken a piece at a time.

        Args:
            name: key of the result; each name once.
            theta1: any shape, floating; the result lies on its device.
            theta0: the same shape, floating, anywhere.

        Raises:
            MaskError: the difference is NaN somewhere, shapes differ, a dtype that is not floating,
                a repeated name.

        Numerics: in fp32 (fp64 if either side is fp64), whatever the tensors are.
        """
        _check_pair(name, theta1, theta0)
        theta1, theta0 = theta1.detach(), theta0.detach()
        double = torch.float64 in (theta1.dtype, theta0.dtype)
        ordinal = self._open(name, theta1, torch.float64 if double else theta1.dtype)
        for start, new in _flat_chunks(theta1):
            old = flat_part(theta0, slice(start, start + new.numel()))
            self._offer(ordinal, start, difference(new, old), _nan_difference)

    def _open(self, name: str, tensor: Tensor, dtype: torch.dtype) -> int:
        """Take in a tensor's name and shape; return its ordinal."""
        _check_tensor(name, tensor, self._shapes)
        if dtype == torch.float64 and not self._double:
            self._widen()
        self._shapes[name] = tensor.shape
        self._devices.append(tensor.device)
        self._seen += tensor.numel()
        return len(self._shapes) - 1

    def _offer(
        self, ordinal: int, start: int, piece: Tensor, nan: Callable[[str, int], str]
    ) -> None:
        """Put those entries of a 1-D piece into the buffer that are still in the running."""
        name = list(self._shapes)[ordinal]
        keys = _keys(piece.double() if self._double else piece)
        # NaN bits lie above every number's, so a NaN always passes the threshold: look among
        # those that do.
        found = _above(keys, self._threshold if self._nnz else _infinity(keys))
        keys = keys[found]
        if keys.numel() and int(keys.max()) > _infinity(keys):
            raise MaskError(nan(name, start + int(found[_above(keys, _infinity(keys))[0]])))
        if not self._nnz or not keys.numel():
            return
        if keys.numel() > self._nnz:
            # One piece alone overflows the budget: cut it first, so that the buffer never
            # passes 2 nnz.
            keep = _cut([keys], self._nnz)[0]
            keys, found = keys[keep], found[keep]
        dtype = index_dtype_for(math.prod(self._shapes[name]))
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
        spent. ``zeros`` then says how many of them have score 0.

        Raises:
            MaskError: fewer scores were added than entries asked for.
        """
        _check_room(self._nnz, self._seen)
        self._compact()
        self.zeros = sum(int((s.keys == 0).sum()) for s in self._segments)
        parts: dict[int, list[Tensor]] = {}
        for segment in self._segments:
            parts.setdefault(segment.ordinal, []).append(segment.indices)
        self._segments = []
        result: dict[str, SparsePattern] = {}
        for ordinal, (name, shape) in enumerate(self._shapes.items()):
            dtype = index_dtype_for(math.prod(shape))
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
    named_scores: NamedScores | Callable[[], NamedScores],
    nnz: int,
    *,
    abs: bool = False,
    backend: str | None = None,
) -> dict[str, SparsePattern]:
    """Return the patterns of the ``nnz`` largest scores over all named tensors.

    Args:
        named_scores: pairs (name, scores) in canonical order, or a function that returns them. An
            iterator is read once, one tensor at a time by `StreamingTopK`, so a generator may
            compute each score when asked. Scores that are there already (a list, ``items()`` of a
            dict) and lie on one GPU are read in place by the kernels.
        nnz: how many entries to keep in total.
        abs: rank magnitudes.
        backend: as in `resolve_backend`; "triton" takes the tensors of an iterator all at once.

    Raises:
        MaskError: as in :meth:`StreamingTopK.add` and :meth:`StreamingTopK.finish`.
        BackendError: "triton" was asked for and cannot run.
    """
    pairs = named_scores() if callable(named_scores) else named_scores
    if isinstance(pairs, Collection) or (backend or current_backend()) == "triton":
        pairs = list(pairs)
        if _resolve("topk_patterns", [s for _, s in pairs], backend) == "triton":
            return _launch(pairs, nnz, nonnegative=not abs).patterns
    top = StreamingTopK(nnz)
    for name, scores in pairs:
        top.add(name, scores, abs=abs)
    return top.finish()


def topk_differences(named_pairs: NamedPairs, nnz: int, *, backend: str | None = None) -> TopK:
    """Return the ``nnz`` entries that differ most, by ``|theta1 - theta0|``, over all tensors;
    ties to the first by (order, flat index).

    No difference is kept: the reference takes a million at a time, the kernels take them as they
    read. Extra memory is a small multiple of nnz on both (`StreamingTopK`,
    ``sparseft_kernels.topk``).

    Args:
        named_pairs: triples (name, theta1, theta0) in canonical order; theta1 and theta0 of one
            shape, floating. Read once; tensors on GPUs are all held until the end, others one
            pair at a time.
        nnz: how many entries to keep in total.
        backend: as in `resolve_backend`. Triton reads contiguous fp32, bf16 and fp16 tensors that
            all lie on one GPU.

    Raises:
        MaskError: a difference is NaN (the tensor and the place are named), shapes differ, a dtype
            that is not floating, a name given twice, fewer entries than asked for.
        BackendError: "triton" was asked for and cannot run.

    Numerics: differences are taken in fp32, in fp64 if either side is fp64; every backend keeps the
    same entries.

    Example:
        >>> theta1, theta0 = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([1.0, 1.0, 4.0])
        >>> topk_differences([("w", theta1, theta0)], 2).patterns["w"].indices.tolist()
        [1, 2]
    """
    stream = iter(named_pairs)
    asked = backend or current_backend()
    held: list[tuple[str, Tensor, Tensor]] = []
    for name, theta1, theta0 in stream if asked != "reference" else ():
        held.append((name, theta1.detach(), theta0.detach()))
        # One pair off the GPU decides: the others are then not gathered.
        if asked == "auto" and not (theta1.is_cuda and theta0.device == theta1.device):
            break
    tensors = [t for _, *pair in held for t in pair]
    if held and _resolve("topk_differences", tensors, backend) == "triton":
        for name, theta1, theta0 in held:
            _check_pair(name, theta1, theta0)
        new = [(name, theta1) for name, theta1, _ in held]
        return _launch(new, nnz, [theta0 for *_, theta0 in held])
    top = StreamingTopK(nnz)
    for name, theta1, theta0 in itertools.chain(held, stream):
        top.add_difference(name, theta1, theta0)
    patterns = top.finish()
    return TopK(patterns, top.zeros)


def _resolve(op: str, tensors: Sequence[Tensor], backend: str | None) -> Resolved:
    odd = [str(t.dtype) for t in tensors if t.dtype not in _KERNEL_DTYPES]
    why_not = None
    if odd:
        why_not = f"it reads fp32, bf16 and fp16, and one of its tensors is {odd[0]}"
    elif len({t.device for t in tensors}) > 1:
        why_not = "its tensors lie on different devices"
    return resolve_backend(op, *tensors, backend=backend, why_not=why_not)


def _launch(
    named: Sequence[tuple[str, Tensor]],
    nnz: int,
    theta0: Sequence[Tensor] | None = None,
    *,
    nonnegative: bool = False,
) -> TopK:
    """Select by the kernels; theta1 (or scores) by name, theta0 in the same order."""
    from sparseft_kernels.topk import Unrankable, launch_topk

    _check_count(nnz, "nnz")
    seen: dict[str, Tensor] = {}
    for name, tensor in named:
        _check_tensor(name, tensor, seen)
        seen[name] = tensor.detach()
    _check_room(nnz, sum(t.numel() for t in seen.values()))
    theta1 = list(seen.values())
    try:
        found = launch_topk(theta1, theta0, nnz, nonnegative=nonnegative)
    except Unrankable as bad:
        # The message is the reference's: look again at the place the kernel points to.
        part = slice(bad.start, bad.stop)
        values = flat_part(theta1[bad.tensor], part)
        if theta0 is not None:
            values = difference(values, flat_part(theta0[bad.tensor], part))
        negative = (values < 0) if nonnegative else torch.zeros_like(values, dtype=torch.bool)
        at = bad.start + int((negative | values.isnan()).to(torch.uint8).argmax())
        describe = _nan_difference if theta0 is not None else _nan_score
        if bool(negative.any()):
            describe = _negative
        raise MaskError(describe(list(seen)[bad.tensor], at)) from None
    patterns = {
        name: SparsePattern._trusted(indices, tensor.shape)
        for (name, tensor), indices in zip(seen.items(), found.indices, strict=True)
    }
    return TopK(patterns, found.zeros)


def topk_single(
    scores: Tensor,
    k: int,
    *,
    per_row: bool = False,
    abs: bool = False,
    name: str = "scores",
    backend: str | None = None,
) -> SparsePattern:
    """Return the pattern of the k largest scores of one tensor, or of each of its rows.

    Args:
        scores: any shape, floating, non-negative unless ``abs``.
        k: entries to keep, in total or per row (a row is everything behind one index of dim 0).
        per_row: keep exactly k in every row; ties go to the lowest column.
        abs: rank magnitudes.
        name: used in error messages.
        backend: as in `topk_patterns`; the best of each row have no kernel.

    Raises:
        MaskError: NaN or negative scores, or k larger than there are scores (per row).
        BackendError: "triton" was asked for and cannot run.
    """
    if not per_row:
        return topk_patterns([(name, scores)], k, abs=abs, backend=backend)[name]
    _check_count(k, "k")
    resolve_backend("topk_single(per_row=True)", scores, backend=backend)
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
