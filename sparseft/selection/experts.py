"""Stacked weights of experts, matrix by matrix, for methods that decompose matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from torch import Tensor

from sparseft.modules import ParameterIndex
from sparseft.modules.experts import is_stacked
from sparseft.selection.registry import Candidates, Piece

__all__ = ["ExpertByExpert"]


class ExpertByExpert:
    """Takes stacks (experts, a, b) apart before a decomposition, and their scores together after.

    Args:
        candidates: parameters; of those that are no stacks of experts nothing changes.
    """

    def __init__(self, candidates: Candidates) -> None:
        index = ParameterIndex(candidates.model)
        self._stacks = {
            name
            for name, parameter in candidates.parameters.items()
            if any(is_stacked(module, parameter) for module, _ in index.owners(name))
        }
        self._places: dict[str, tuple[str, int]] = {}

    def apart(
        self, triples: Iterable[tuple[str, Tensor, Tensor | None]]
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield (name, theta1, theta0), for a stack one ``name[expert]`` after the other."""
        for name, theta1, theta0 in triples:
            if name not in self._stacks:
                yield name, theta1, theta0
                continue
            for expert in range(theta1.shape[0]):
                own = f"{name}[{expert}]"
                self._places[own] = name, expert * math.prod(theta1.shape[1:])
                yield own, theta1[expert], None if theta0 is None else theta0[expert]

    def together(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield the pieces with the scores of matrices where they are in their stack."""
        for piece in pieces:
            name, start = self._places.get(piece.name, (piece.name, 0))
            yield Piece(name, start + piece.start, piece.scores)
