"""How much adapters have in common: shared entries, and those pulled in opposite directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from sparseft.diff import SparseDiff, SparsePattern

__all__ = ["Overlap", "jaccard", "overlaps"]


@dataclass(frozen=True)
class Overlap:
    """Entries two adapters share.

    Args:
        common: entries in both.
        union: entries in at least one.
        opposed: shared entries whose values have opposite signs ("add" diffs only).
    """

    common: int = 0
    union: int = 0
    opposed: int = 0

    @property
    def jaccard(self) -> float:
        """common / union, 0 for two empty sets."""
        return self.common / self.union if self.union else 0.0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            self.common + other.common, self.union + other.union, self.opposed + other.opposed
        )


def _overlap(a: SparseDiff | SparsePattern | None, b: SparseDiff | SparsePattern | None) -> Overlap:
    if a is None or b is None:
        return Overlap(0, (a.nnz if a is not None else 0) + (b.nnz if b is not None else 0))
    ours, theirs = a.indices.cpu(), b.indices.cpu()
    if a.shape != b.shape or not theirs.numel() or not ours.numel():
        return Overlap(0, a.nnz + b.nnz)
    place = torch.searchsorted(theirs, ours).clamp_(max=theirs.numel() - 1)
    shared = theirs[place] == ours
    common = int(shared.sum())
    opposed = 0
    if isinstance(a, SparseDiff) and isinstance(b, SparseDiff) and a.mode == b.mode == "add":
        product_sign = (
            a.values.detach().cpu()[shared].sign() * b.values.detach().cpu()[place[shared]].sign()
        )
        opposed = int((product_sign < 0).sum())
    return Overlap(common, a.nnz + b.nnz - common, opposed)


def jaccard(
    a: Mapping[str, SparseDiff] | Mapping[str, SparsePattern],
    b: Mapping[str, SparseDiff] | Mapping[str, SparsePattern],
) -> dict[str, Overlap]:
    """Compare two adapters, or two sets of masks, tensor by tensor.

    Args:
        a, b: name -> diff or pattern; an `Adapter` is one.

    Returns:
        Name -> `Overlap`, for every tensor of either, by name; tensors of different shapes share
        nothing.
    """
    return {n: _overlap(a.get(n), b.get(n)) for n in sorted({*a, *b})}


def overlaps(
    adapters: Sequence[Mapping[str, SparseDiff]],
) -> dict[tuple[int, int], Overlap]:
    """Return the total overlap of every pair, by their places in ``adapters``."""
    return {
        (i, j): sum(jaccard(adapters[i], adapters[j]).values(), Overlap())
        for i, j in combinations(range(len(adapters)), 2)
    }
