"""From a stream of scores to exactly nnz entries: over everything, per tensor, or per row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from sparseft.diff import SparsePattern, index_dtype_for
from sparseft.errors import MaskError
from sparseft.ops import StreamingTopK, topk_differences, topk_single
from sparseft.selection.counts import apportion, rows_of, spread
from sparseft.selection.differences import Differences
from sparseft.selection.registry import Piece

__all__ = ["Scope", "keep_best", "keep_true"]

Scope = Literal["global", "tensor", "row"]


def keep_best(
    pieces: Iterable[Piece], parameters: Mapping[str, nn.Parameter], nnz: int, scope: Scope
) -> tuple[dict[str, SparsePattern], int]:
    """Return the ``nnz`` entries with the largest scores, exactly; ties to the earliest.

    Args:
        pieces: scores of all candidates in order (see `sparseft.selection.registry`).
        parameters: the candidates, sorted by name.
        nnz: entries to keep in total.
        scope: "global": the best of all. "tensor": each tensor keeps its share by size (largest
            remainders). "row": each tensor's share is spread evenly over its rows (what lies
            behind one index of dim 0), the first rows keep the units left over.

    Returns:
        The patterns, and how many of their entries have score 0: kept only to fill the count.

    Raises:
        MaskError: NaN or negative scores, naming the tensor; pieces out of order.
    """
    shapes = {name: p.shape for name, p in parameters.items()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    counts = dict(zip(shapes, apportion(nnz, sizes), strict=True))
    if isinstance(pieces, Differences) and scope != "row":
        return _keep_moved(pieces, parameters, nnz if scope == "global" else counts)
    keeper: _Keeper
    if scope == "global":
        keeper = _Global(nnz)
    else:
        keeper = _PerTensor(counts) if scope == "tensor" else _PerRow(counts)
    chosen: dict[str, list[Tensor]] = {}
    for name, shape, tensor_pieces in by_tensor(pieces, shapes):
        chosen[name] = keeper.tensor(name, shape, tensor_pieces)
    keeper.finish(chosen)
    patterns = {
        name: _pattern(chosen[name], shape, parameters[name].device)
        for name, shape in shapes.items()
    }
    return patterns, keeper.zeros


def _keep_moved(
    differences: Differences, parameters: Mapping[str, nn.Parameter], nnz: int | dict[str, int]
) -> tuple[dict[str, SparsePattern], int]:
    """Keep the entries that moved most, over everything or each tensor's number of them, by the
    op: on a GPU no difference is formed.
    """
    if isinstance(nnz, int):
        found = [topk_differences(differences.pairs, nnz)]
    else:
        found = [topk_differences([pair], nnz[pair[0]]) for pair in differences.pairs]
    patterns = {
        name: pattern.to(parameters[name].device)
        for top in found
        for name, pattern in top.patterns.items()
    }
    return patterns, sum(top.zeros for top in found)


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
        chosen[name] = _pattern(parts, shape, parameters[name].device)
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


def _pattern(parts: list[Tensor], shape: torch.Size, device: torch.device) -> SparsePattern:
    dtype = index_dtype_for(math.prod(shape))
    parts = [p.to(device=device, dtype=dtype) for p in parts if p.numel()]
    indices = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
    return SparsePattern._trusted(indices, shape)


def _floating(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype == torch.bool else scores


def _check(name: str, start: int, scores: Tensor) -> None:
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


def _add(top: StreamingTopK, key: str, name: str, start: int, scores: Tensor) -> None:
    scores = _floating(scores)
    try:
        top.add(key, scores)
    except MaskError:
        _check(name, start, scores)
        raise


class _Keeper(ABC):
    """Consumes the scores of one tensor after another.

    ``zeros``: of the entries kept, how many have score 0; known at the end.
    """

    zeros: int = 0

    @abstractmethod
    def tensor(
        self, name: str, shape: torch.Size, pieces: Iterator[tuple[int, Tensor]]
    ) -> list[Tensor]:
        """Return the chosen flat positions, ascending, or a list that `finish` fills."""

    def finish(self, chosen: dict[str, list[Tensor]]) -> None:
        """Called after the last tensor."""
        return


class _Global(_Keeper):
    """One top-k over everything; its "tensors" are the pieces, so nothing is put together."""

    def __init__(self, nnz: int) -> None:
        self._top = StreamingTopK(nnz)
        self._room = nnz  # entries that no score above 0 has come for yet
        self._origin: dict[str, tuple[str, int]] = {}

    def tensor(
        self, name: str, shape: torch.Size, pieces: Iterator[tuple[int, Tensor]]
    ) -> list[Tensor]:
        for start, scores in pieces:
            key = str(len(self._origin))
            _add(self._top, key, name, start, scores)
            self._origin[key] = (name, start)
            if self._room:
                self._room -= min(self._room, int(scores.count_nonzero()))
        return []

    def finish(self, chosen: dict[str, list[Tensor]]) -> None:
        for key, pattern in self._top.finish().items():
            name, start = self._origin[key]
            if pattern.nnz:
                chosen[name].append(pattern.indices.to(torch.int64) + start)
        self.zeros = self._room


class _PerTensor(_Keeper):
    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts

    def tensor(
        self, name: str, shape: torch.Size, pieces: Iterator[tuple[int, Tensor]]
    ) -> list[Tensor]:
        one = _Global(self._counts[name])
        one.tensor(name, shape, pieces)
        chosen: dict[str, list[Tensor]] = {name: []}
        one.finish(chosen)
        self.zeros += one.zeros
        return chosen[name]


class _PerRow(_Keeper):
    """Rows are ranked as soon as they are complete; at most one piece and one row are held."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts

    def tensor(
        self, name: str, shape: torch.Size, pieces: Iterator[tuple[int, Tensor]]
    ) -> list[Tensor]:
        rows = rows_of(shape)
        if rows <= 1:
            whole = _PerTensor(self._counts)
            kept = whole.tensor(name, shape, pieces)
            self.zeros += whole.zeros
            return kept
        width = math.prod(shape) // rows
        each, more = spread(self._counts[name], rows)
        chosen: list[Tensor] = []
        held: list[Tensor] = []
        row = size = 0
        for _, scores in pieces:
            held.append(_floating(scores))
            size += scores.numel()
            full = size // width
            if not full:
                continue
            table = torch.cat(held) if len(held) > 1 else held[0]
            held, size = [table[full * width :]], size - full * width
            table = table[: full * width].view(full, width)
            edge = min(max(more - row, 0), full)  # rows before it keep one more
            for first, last, count in ((0, edge, each + 1), (edge, full, each)):
                if last > first:
                    try:
                        best = topk_single(table[first:last], count, per_row=True, name=name)
                    except MaskError:
                        _check(name, (row + first) * width, table[first:last].reshape(-1))
                        raise
                    chosen.append(best.indices.to(torch.int64) + (row + first) * width)
                    above = table[first:last].count_nonzero(dim=1)
                    self.zeros += int((count - above).clamp_(min=0).sum())
            row += full
        return chosen
