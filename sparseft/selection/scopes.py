"""From a stream of scores to exactly nnz entries: over everything, per tensor, or per row."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparseft.diff import SparsePattern, index_dtype_for
from sparseft.errors import MaskError
from sparseft.ops import StreamingTopK, topk_differences, topk_single
from sparseft.ops._backend import current_backend
from sparseft.ops.topk import TopK
from sparseft.selection.counts import apportion, rows_of, spread
from sparseft.selection.differences import Differences
from sparseft.selection.registry import Piece

__all__ = ["Kept", "Scope", "keep_best", "keep_true"]

Scope = Literal["global", "tensor", "row"]


class Kept(NamedTuple):
    """A selection of some size.

    Args:
        patterns: name -> kept entries, of every candidate in order.
        zeros: how many of them have score 0: they only fill the count.
    """

    patterns: dict[str, SparsePattern]
    zeros: int


def keep_best(
    pieces: Iterable[Piece],
    parameters: Mapping[str, nn.Parameter],
    counts: Sequence[int],
    scope: Scope,
) -> list[Kept]:
    """Return, for each count, the entries with the largest scores: exactly so many, ties to the
    earliest. The scores are read once.

    Args:
        pieces: scores of all candidates in order (see `sparseft.selection.registry`).
        parameters: the candidates, sorted by name.
        counts: entries to keep in total; one or more numbers, in any order.
        scope: "global": the best of all. "tensor": each tensor keeps its share by size (largest
            remainders). "row": each tensor's share is spread evenly over its rows (what lies
            behind one index of dim 0), the first rows keep the units left over.

    Raises:
        MaskError: NaN or negative scores, naming the tensor; pieces out of order.
    """
    shapes = {name: p.shape for name, p in parameters.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    divided = zip(*(apportion(count, sizes) for count in counts), strict=True)
    shares = dict(zip(shapes, map(list, divided), strict=True))
    if isinstance(pieces, Differences) and scope != "row":
        return _keep_moved(pieces, parameters, counts if scope == "global" else shares)
    keeper: _Keeper
    if scope == "global":
        keeper = _Global(counts)
    else:
        keeper = _PerTensor(shares) if scope == "tensor" else _PerRow(shares)
    chosen: list[dict[str, list[Tensor]]] = [{name: [] for name in shapes} for _ in counts]
    for name, shape, tensor_pieces in by_tensor(pieces, shapes):
        keeper.tensor(name, shape, tensor_pieces, chosen)
    keeper.finish(chosen)
    return [
        Kept(
            {n: pattern_of(one.pop(n), shape, parameters[n].device) for n, shape in shapes.items()},
            zeros,
        )
        for one, zeros in zip(chosen, keeper.zeros, strict=True)
    ]


def _keep_moved(
    differences: Differences,
    parameters: Mapping[str, nn.Parameter],
    counts: Sequence[int] | Mapping[str, list[int]],
) -> list[Kept]:
    """Keep the entries that moved most, over everything or each tensor's numbers of them, by the
    op: on a GPU no difference is formed.
    """
    if isinstance(counts, Mapping):
        found = [_moved_most(iter([pair]), counts[pair[0]]) for pair in differences.pairs]
    else:
        found = [_moved_most(iter(differences.pairs), counts)]
    return [
        Kept(
            {n: p.to(parameters[n].device) for top in one for n, p in top.patterns.items()},
            sum(top.zeros for top in one),
        )
        for one in zip(*found, strict=True)
    ]


def _moved_most(pairs: Iterator[tuple[str, Tensor, Tensor]], counts: Sequence[int]) -> list[TopK]:
    """Return the ``counts`` largest differences; more than one count on a CPU from one walk, on a
    GPU by a launch for each (two reads of the tensors: a few milliseconds for 278M of them).
    """
    if len(counts) == 1:
        return [topk_differences(pairs, counts[0])]
    first = next(pairs)  # a candidate there is always
    asked, (_, theta1, theta0) = current_backend(), first
    pairs = itertools.chain([first], pairs)
    if asked == "triton" or (asked == "auto" and theta1.is_cuda and theta0.device == theta1.device):
        held = list(pairs)
        return [topk_differences(held, count) for count in counts]
    top = SeveralTopK(max(counts))
    for pair in pairs:
        top.add_difference(*pair)
    return top.finish_each(counts)


def keep_true(
    pieces: Iterable[Piece], parameters: Mapping[str, nn.Parameter]
) -> dict[str, SparsePattern]:
    """Return the True entries of pieces of bool masks.

    Raises:
        MaskError: a piece holds scores, so that a count is needed.
    """
    shapes = {name: p.shape for name, p in parameters.items()}
    chosen: dict[str, SparsePattern] = {}
    for name, shape, tensor_pieces in by_tensor(pieces, shapes):
        parts = []
        for start, mask in tensor_pieces:
            if mask.dtype != torch.bool:
                raise MaskError(
                    f"{name!r} has scores, not a bool mask, so nnz=... or density=... must say how "
                    "many to keep."
                )
            parts.append(SparsePattern.from_mask(mask).indices.to(torch.int64) + start)
        chosen[name] = pattern_of(parts, shape, parameters[name].device)
    return chosen


def by_tensor(
    pieces: Iterable[Piece], shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, torch.Size, Iterator[tuple[int, Tensor]]]]:
    """Group a stream of pieces by candidate, checking that every entry comes once and in order."""
    stream = iter(pieces)
    ahead: list[Piece] = []

    def of(name: str, numel: int) -> Iterator[tuple[int, Tensor]]:
        at = 0
        while at < numel:
            piece = ahead.pop() if ahead else next(stream, None)
            if piece is None or piece.name != name or piece.start != at or piece.scores.ndim != 1:
                got = "the end" if piece is None else f"{piece.name!r} from {piece.start}"
                raise MaskError(
                    f"scores of {name!r} from entry {at} were expected, got {got}; a method yields "
                    "1-D pieces of every candidate once, in order."
                )
            at += piece.scores.numel()
            if at > numel:
                raise MaskError(f"{at} scores came for {name!r}, which has {numel} entries.")
            if piece.scores.numel():
                yield piece.start, piece.scores
        # An empty candidate may have one empty piece or none.
        if numel == 0:
            piece = ahead.pop() if ahead else next(stream, None)
            if piece is not None and (piece.name != name or piece.scores.numel()):
                ahead.append(piece)

    for name, shape in shapes.items():
        tensor_pieces = of(name, math.prod(shape))
        yield name, shape, tensor_pieces
        for _ in tensor_pieces:  # whatever a consumer left unread
            pass
    if ahead or next(stream, None) is not None:
        raise MaskError("a method yielded scores past the last candidate.")


def pattern_of(parts: list[Tensor], shape: torch.Size, device: torch.device) -> SparsePattern:
    """Return the pattern of flat positions that come in parts, ascending."""
    dtype = index_dtype_for(math.prod(shape))
    parts = [p.to(device=device, dtype=dtype) for p in parts if p.numel()]
    indices = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
    return SparsePattern._trusted(indices, shape)


def floating(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype == torch.bool else scores


def check_scores(name: str, start: int, scores: Tensor) -> None:
    """Say what is wrong with scores that the top-k refused, by the tensor's own name."""
    bad = torch.isnan(scores)
    if bool(bad.any()):
        at = start + int(bad.to(torch.uint8).argmax())
        raise MaskError(
            f"scores of {name!r} are NaN (first at flat index {at}); a selection cannot rank them. "
            "Did training diverge?"
        )
    if bool((scores < 0).any()):
        raise MaskError(f"scores of {name!r} hold negative values; wanted 0 or more.")


class SeveralTopK(StreamingTopK):
    """The best entries at several counts from one pass: each count's are among the larger's."""

    def finish_each(self, counts: Sequence[int]) -> list[TopK]:
        """Return what `finish` of each count alone would; the object, made with the largest count,
        is spent.
        """
        found: dict[int, TopK] = {}
        for count in sorted(set(counts), reverse=True):
            self._nnz = count
            if count:
                self._compact()
            else:
                self._segments, self._held = [], 0
            left = self._segments
            patterns = self.finish()
            found[count] = TopK(patterns, self.zeros)
            self._segments = left
        self._segments = []
        return [found[count] for count in counts]


def _add(top: StreamingTopK, key: str, name: str, start: int, scores: Tensor) -> None:
    scores = floating(scores)
    try:
        top.add(key, scores)
    except MaskError:
        check_scores(name, start, scores)
        raise


Chosen = list[dict[str, list[Tensor]]]  # for each count: name -> flat positions, in parts


class _Keeper(ABC):
    """Consumes the scores of one tensor after another.

    ``zeros``: for each count, how many of the entries kept have score 0; known at the end.
    """

    def __init__(self, counts: int) -> None:
        self.zeros = [0] * counts

    @abstractmethod
    def tensor(
        self, name: str, shape: torch.Size, pieces: Iterator[tuple[int, Tensor]], chosen: Chosen
    ) -> None:
        """Add the chosen flat positions, ascending, or leave that to `finish`."""

    def finish(self, chosen: Chosen) -> None:
        """Called after the last tensor."""
        return


class _Global(_Keeper):
    """One top-k over everything; its "tensors" are the pieces, so nothing is put together."""

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__(len(counts))
        self._counts = counts
        self._top = SeveralTopK(max(counts))
        self._origin: dict[str, tuple[str, int, torch.dtype]] = {}

    def tensor(
        self, name: str, shape: torch.Size, pieces: Iterator[tuple[int, Tensor]], chosen: Chosen
    ) -> None:
        for start, scores in pieces:
            key = str(len(self._origin))
            _add(self._top, key, name, start, scores)
            self._origin[key] = (name, start, index_dtype_for(math.prod(shape)))

    def finish(self, chosen: Chosen) -> None:
        for i, top in enumerate(self._top.finish_each(self._counts)):
            for key, pattern in top.patterns.items():
                name, start, dtype = self._origin[key]
                if pattern.nnz:
                    chosen[i][name].append(pattern.indices.to(dtype) + start)
            self.zeros[i] += top.zeros


class _PerTensor(_Keeper):
    """Each tensor a top-k of its own.

    Args:
        shares: of every tensor, its part of each count.
    """

    def __init__(self, shares: Mapping[str, list[int]]) -> None:
        super().__init__(len(next(iter(shares.values()))))
        self._shares = shares

    def tensor(
        self, name: str, shape: torch.Size, pieces: Iterator[tuple[int, Tensor]], chosen: Chosen
    ) -> None:
        one = _Global(self._shares[name])
        one.tensor(name, shape, pieces, chosen)
        one.finish(chosen)
        self.zeros = [a + b for a, b in zip(self.zeros, one.zeros, strict=True)]


class _PerRow(_PerTensor):
    """Rows are ranked as soon as they are complete; at most one piece and one row are held."""

    def tensor(
        self, name: str, shape: torch.Size, pieces: Iterator[tuple[int, Tensor]], chosen: Chosen
    ) -> None:
        rows = rows_of(shape)
        if rows <= 1:
            super().tensor(name, shape, pieces, chosen)
            return
        dtype = index_dtype_for(math.prod(shape))
        for row, table in whole_rows(pieces, math.prod(shape) // rows):
            for i, share in enumerate(self._shares[name]):
                best = self._best(i, name, row, table, *spread(share, rows))
                chosen[i][name] += (part.to(dtype) for part in best)

    def _best(
        self, i: int, name: str, row: int, table: Tensor, each: int, more: int
    ) -> Iterator[Tensor]:
        """Yield the best ``each`` entries of every row, one more of the first ``more`` rows."""
        full, width = table.shape
        edge = min(max(more - row, 0), full)  # rows before it keep one more
        for first, last, count in ((0, edge, each + 1), (edge, full, each)):
            if last > first:
                try:
                    best = topk_single(table[first:last], count, per_row=True, name=name)
                except MaskError:
                    check_scores(name, (row + first) * width, table[first:last].reshape(-1))
                    raise
                yield best.indices.to(torch.int64) + (row + first) * width
                above = table[first:last].count_nonzero(dim=1)
                self.zeros[i] += int((count - above).clamp_(min=0).sum())


def whole_rows(pieces: Iterable[tuple[int, Tensor]], width: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, (rows, width) scores) of a tensor's pieces, as soon as rows are complete:
    at most one piece and one row are held.
    """
    held: list[Tensor] = []
    row = size = 0
    for _, scores in pieces:
        held.append(floating(scores))
        size += scores.numel()
        full = size // width
        if not full:
            continue
        table = torch.cat(held) if len(held) > 1 else held[0]
        held, size = [table[full * width :]], size - full * width
        yield row, table[: full * width].view(full, width)
        row += full
