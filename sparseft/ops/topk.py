"""Exact top-k of non-negative scores over many tensors, one pass, without concatenating them.

Definition: sort all entries by (score descending, order of ``add``, flat index) and keep the first
k.

How: keys are the bits of the float (`score_keys`), kept in a bounded buffer while the tensors pass
(`StreamingTopK`).

That is the reference. Tensors that all lie on one GPU are read in place by Triton kernels instead
(sparseft_kernels/topk.py), twice as a rule; the patterns are the same bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.diff import SparsePattern
from sparseft.errors import MaskError
from sparseft.ops import score_keys
from sparseft.ops._backend import Resolved, current_backend, resolve_backend
from sparseft.ops.score_keys import (
    check_count,
    check_pair,
    check_room,
    check_tensor,
    difference,
    flat_part,
    infinity,
    keys_of,
    nan_difference,
    nan_score,
    negative_score,
)
from sparseft.ops.streaming_topk import StreamingTopK

__all__ = [
    "TopK",
    "topk_differences",
    "topk_patterns",
    "topk_reference",
    "topk_single",
]

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
            check_pair(name, theta1, theta0)
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

    check_count(nnz, "nnz")
    seen: dict[str, Tensor] = {}
    for name, tensor in named:
        check_tensor(name, tensor, seen)
        seen[name] = tensor.detach()
    check_room(nnz, sum(t.numel() for t in seen.values()))
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
        describe = nan_difference if theta0 is not None else nan_score
        if bool(negative.any()):
            describe = negative_score
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
    check_count(k, "k")
    resolve_backend("topk_single(per_row=True)", scores, backend=backend)
    rows = scores.shape[0] if scores.ndim > 1 else 1
    width = scores.numel() // rows if rows else 0
    if rows and k > width:
        raise MaskError(f"{k} entries per row were asked for but rows of {name!r} have {width}")
    dtype = torch.int32 if scores.numel() < 2**31 else torch.int64
    parts = [torch.empty(0, dtype=dtype, device=scores.device)]
    step = max(1, score_keys.CHUNK // max(1, width))
    table = scores.detach().reshape(rows, width)
    for row in range(0, rows, step):
        piece = table[row : row + step]
        if not abs and bool((piece < 0).any()):
            raise MaskError(
                f"scores for {name!r} hold negative values; pass abs=True to rank magnitudes"
            )
        keys = keys_of(piece).view(piece.shape)
        if keys.numel() and int(keys.max()) > infinity(keys):
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
