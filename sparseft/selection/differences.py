"""`Differences`: scores that are ``|theta1 - theta0|``, given as the two tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sparseft.ops.score_keys import difference, flat_part
from sparseft.selection.registry import Piece, pieces_of

__all__ = ["Differences"]


class Differences:
    """Scores of all candidates as pairs of tensors: an iterator of `Piece` s like those of any
    method, for whoever wants scores; `pairs` for what ranks differences without forming them.

    Args:
        pairs: triples (name, theta1, theta0) of every candidate, in order. Read once, by one of the
            two.
    """

    def __init__(self, pairs: Iterator[tuple[str, Tensor, Tensor]]) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[Piece]:
        for name, theta1, theta0 in self.pairs:
            for part in pieces_of(theta1.numel()):
                delta = difference(flat_part(theta1, part), flat_part(theta0, part))
                yield Piece(name, part.start, delta.abs_())
