"""The overlap report: every pair of adapters, in total, by layer or pattern, by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from sparseft._text import did_you_mean
from sparseft.adapter import Adapter
from sparseft.composition.base_check import merged_fingerprint
from sparseft.composition.merge import AdapterLike, load_named
from sparseft.composition.overlap import Counts, count_tensor
from sparseft.composition.overlap_groups import Groups, group_tensors, natural_key
from sparseft.errors import BaseMismatchError, CompositionError, UnknownNameError

__all__ = ["MEASURES", "Measure", "OverlapReport", "PairOverlap", "overlap_report"]

Measure: TypeAlias = Literal["jaccard", "conflict", "cosine"]
MEASURES: tuple[str, ...] = get_args(Measure)


@dataclass(frozen=True)
class PairOverlap:
    """What two adapters have in common, in one tensor or added up over several.

    Signs and cosine are of changes: tensors that either replaces (mode "set") count for the masks
    only.

    Args:
        a_nnz, b_nnz: entries of the first and of the second.
        common: entries of both.
        chance: entries of both to be expected of masks of that size drawn independently.
        signed: of the common ones, those that both change.
        opposed: of these, those whose values have opposite signs.
        dot: sum of products of the values that meet, over tensors that neither replaces.
        a_square, b_square: sums of squares over the same tensors.
    """

    a_nnz: int = 0
    b_nnz: int = 0
    common: int = 0
    chance: float = 0.0
    signed: int = 0
    opposed: int = 0
    dot: float = 0.0
    a_square: float = 0.0
    b_square: float = 0.0

    @property
    def union(self) -> int:
        """Entries of at least one."""
        return self.a_nnz + self.b_nnz - self.common

    @property
    def jaccard(self) -> float:
        """common / union, 0 for two empty masks."""
        return self.common / self.union if self.union else 0.0

    @property
    def times_chance(self) -> float | None:
        """common / chance; None where nothing is to be expected."""
        return self.common / self.chance if self.chance else None

    @property
    def conflict(self) -> float | None:
        """Share of common changes with opposite signs; None without any."""
        return self.opposed / self.signed if self.signed else None

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the changes; None where one is 0 or its square overflows."""
        squares = self.a_square * self.b_square
        if 1e-300 < squares < math.inf:  # one root rounds less: parallel changes give 1
            scale = math.sqrt(squares)
        else:
            scale = math.sqrt(self.a_square) * math.sqrt(self.b_square)
        if not (0.0 < scale < math.inf):
            return None
        return max(-1.0, min(1.0, self.dot / scale))

    def __add__(self, other: PairOverlap) -> PairOverlap:
        return PairOverlap(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(PairOverlap))
        )

    def swapped(self) -> PairOverlap:
        """Return the same with the second adapter first."""
        return replace(
            self,
            a_nnz=self.b_nnz,
            b_nnz=self.a_nnz,
            a_square=self.b_square,
            b_square=self.a_square,
        )

    def facts(self) -> dict[str, float | int | None]:
        """Return counts and measures as JSON can hold them."""
        return {
            "a_nnz": self.a_nnz,
            "b_nnz": self.b_nnz,
            "common": self.common,
            "union": self.union,
            "jaccard": self.jaccard,
            "times_chance": self.times_chance,
            "opposed": self.opposed,
            "conflict": self.conflict,
            "cosine": self.cosine,
        }


class OverlapReport:
    """How much adapters have in common; made by `overlap_report`.

    Args:
        names: the adapters, in the order of rows and columns.
        counts: tensor -> what all pairs have in common there.
    """

    def __init__(self, names: Sequence[str], counts: Mapping[str, Counts]) -> None:
        self.names = tuple(names)
        self._counts = {n: counts[n] for n in sorted(counts, key=natural_key)}
        self._place = {name: i for i, name in enumerate(self.names)}

    @property
    def tensors(self) -> list[str]:
        """Every tensor of any adapter; ``layer.10`` after ``layer.2``."""
        return list(self._counts)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every pair, in the order of `names`."""
        return list(combinations(self.names, 2))

    @cached_property
    def nnz(self) -> dict[str, int]:
        """Adapter -> its entries."""
        return {
            n: sum(int(c.nnz[i]) for c in self._counts.values()) for n, i in self._place.items()
        }

    @cached_property
    def norms(self) -> dict[str, float]:
        """Adapter -> Euclidean norm of its changes ("set" diffs aside)."""
        return {
            n: math.sqrt(math.fsum(float(c.dots[i, i]) for c in self._counts.values()))
            for n, i in self._place.items()
        }

    def pair(self, a: str, b: str, tensors: str | Iterable[str] | None = None) -> PairOverlap:
        """Return what two different adapters have in common.

        Args:
            a, b: their names.
            tensors: in these only: a pattern such as ``"*attention*"``, or names; default: all.

        Raises:
            UnknownNameError: no such adapter or tensor; the message has the nearest.
        """
        i, j = self._indices(a, b)
        if tensors is None:
            return self._totals[i, j]
        if isinstance(tensors, str):
            tensors = group_tensors(self._counts, [tensors])[tensors]
        return self._sum(i, j, tensors)

    def by(self, groups: Groups, a: str, b: str) -> dict[str, PairOverlap]:
        """Return group -> what two adapters have in common there.

        Args:
            groups: "layer", "tensor", a pattern, patterns, or name -> pattern or patterns.
            a, b: their names.

        Raises:
            UnknownNameError: no such adapter, or a pattern that no tensor's name matches.
        """
        i, j = self._indices(a, b)
        found = group_tensors(self._counts, groups)
        return {group: self._sum(i, j, tensors) for group, tensors in found.items()}

    def matrix(
        self, measure: Measure, tensors: Iterable[str] | None = None
    ) -> list[list[float | None]]:
        """Return (n, n) values of a measure; None where there is none, and on the diagonal.

        Args:
            measure: "jaccard", "conflict" (share of common entries with opposite signs), "cosine".
            tensors: names of those to look at; default: all.

        Raises:
            UnknownNameError: no such measure or tensor.
        """
        if measure not in MEASURES:
            raise UnknownNameError(
                f"no measure {measure!r}.{did_you_mean(measure, MEASURES)} There are: "
                f"{', '.join(MEASURES)}."
            )
        chosen = None if tensors is None else list(tensors)
        out: list[list[float | None]] = [[None] * len(self.names) for _ in self.names]
        for i, j in combinations(range(len(self.names)), 2):
            pair = self._totals[i, j] if chosen is None else self._sum(i, j, chosen)
            out[i][j] = out[j][i] = getattr(pair, measure)
        return out

    def table(
        self, by: Groups | None = None, pair: tuple[str, str] | None = None
    ) -> tuple[list[str], list[list[str]]]:
        """Return (header, rows) as text.

        Args:
            by: None: a row for each pair, in total. Else a row for each group, as in `by`: of the
                pair, or, with more than two adapters and no pair, the mean over all pairs and the
                pair with the largest Jaccard index.
            pair: the two adapters for ``by``; needed only where there are more.

        Raises:
            UnknownNameError: as in `by`.
        """
        from sparseft.composition.overlap_tables import group_table, mean_table, pair_table

        if by is None:
            return pair_table(self)
        if pair is None and len(self.names) == 2:
            pair = (self.names[0], self.names[1])
        return mean_table(self, by) if pair is None else group_table(self, by, pair)

    def to_markdown(self, by: Groups | None = "layer", pair: tuple[str, str] | None = None) -> str:
        """Return the report as Markdown: adapters, pairs, and groups unless ``by`` is None."""
        from sparseft.composition.overlap_tables import markdown

        return markdown(self, by, pair)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it: totals, and pair by pair in every tensor."""
        places = [(a, b, self._place[a], self._place[b]) for a, b in self.pairs]
        return {
            "adapters": [
                {"name": n, "nnz": self.nnz[n], "norm": self.norms[n]} for n in self.names
            ],
            "pairs": [{"a": a, "b": b, **self._totals[i, j].facts()} for a, b, i, j in places],
            "tensors": [
                {
                    "name": tensor,
                    "pairs": [
                        {"a": a, "b": b, **_pair_of(counts, i, j).facts()} for a, b, i, j in places
                    ],
                }
                for tensor, counts in self._counts.items()
            ],
        }

    def heatmap(self, path: str | os.PathLike[str], pair: tuple[str, str] | None = None) -> Path:
        """Write a PNG: Jaccard index, sign conflicts and cosine of every pair, and by layer.

        Args:
            path: the file; replaced if it is there, with its folder made if that is not.
            pair: two adapters to show tensor by tensor below; with two in all, these. Else each
                adapter's mean with all others is shown layer by layer.

        Returns:
            The file written.

        Raises:
            UnknownNameError: no such adapter.
            OSError: writing failed.
        """
        from sparseft.composition.overlap_plot import plot_overlap

        if pair is not None:
            self._indices(*pair)
        return plot_overlap(self, Path(path), pair)

    def __repr__(self) -> str:
        return f"OverlapReport({', '.join(self.names)}; {len(self._counts)} tensors)"

    @cached_property
    def _totals(self) -> dict[tuple[int, int], PairOverlap]:
        found = {}
        for i, j in combinations(range(len(self.names)), 2):
            found[i, j] = self._sum(i, j, self._counts)
            found[j, i] = found[i, j].swapped()
        return found

    def _sum(self, i: int, j: int, tensors: Iterable[str]) -> PairOverlap:
        total = PairOverlap()
        for tensor in tensors:
            if tensor not in self._counts:
                raise UnknownNameError(
                    f"no adapter has a diff of {tensor!r}.{did_you_mean(tensor, self._counts)}"
                )
            total += _pair_of(self._counts[tensor], i, j)
        return total

    def _indices(self, a: str, b: str) -> tuple[int, int]:
        i, j = self._index(a), self._index(b)
        if i == j:
            raise CompositionError(f"a pair is two adapters; got {a!r} twice.")
        return i, j

    def _index(self, name: str) -> int:
        if name not in self._place:
            raise UnknownNameError(
                f"no adapter is called {name!r}.{did_you_mean(str(name), self.names)} There are: "
                f"{', '.join(self.names)}."
            )
        return self._place[name]


def _pair_of(counts: Counts, i: int, j: int) -> PairOverlap:
    if i > j:  # products of matrices need not be symmetric to the last bit
        return _pair_of(counts, j, i).swapped()
    a, b, common = int(counts.nnz[i]), int(counts.nnz[j]), int(counts.common[i, j])
    chance = a * b / counts.numel if counts.numel else 0.0
    if not (counts.signed[i] and counts.signed[j]):
        return PairOverlap(a, b, common, chance)
    return PairOverlap(
        a, b, common, chance, common, int(counts.opposed[i, j]),
        float(counts.dots[i, j]), float(counts.dots[i, i]), float(counts.dots[j, j]),
    )  # fmt: skip


def overlap_report(
    adapters: Sequence[AdapterLike] | Mapping[str, AdapterLike], *, check_base: bool = True
) -> OverlapReport:
    """Compare every pair of adapters: masks, signs and directions, tensor by tensor.

    Adapters are read tensor by tensor, once; the cost is that of sorting their entries.

    Args:
        adapters: two or more adapters or paths; or name -> adapter or path.
        check_base: refuse adapters made on different bases (by fingerprint).

    Returns:
        The report, which makes tables, JSON and a picture.

    Raises:
        CompositionError: fewer than two adapters.
        BaseMismatchError: adapters of different bases, or a tensor of different shapes.
        FileNotFoundError, AdapterFormatError: as in `Adapter.load`.

    Example:
        >>> import torch
        >>> from sparseft import Adapter, SparseDiff, overlap_report
        >>> one = Adapter({"w": SparseDiff.from_dense(torch.tensor([1.0, 2.0, 0.0]))}, name="one")
        >>> two = Adapter({"w": SparseDiff.from_dense(torch.tensor([0.0, -1.0, 3.0]))}, name="two")
        >>> both = overlap_report([one, two]).pair("one", "two")
        >>> both.common, both.union, both.opposed
        (1, 3, 1)
    """
    named = load_named(adapters)
    if len(named) < 2:
        raise CompositionError(
            f"an overlap is between adapters; got {len(named)}, wanted two or more."
        )
    if check_base:
        try:
            merged_fingerprint(named)
        except BaseMismatchError as bad:
            raise BaseMismatchError(
                f"{bad} Positions in different models have nothing in common; check_base=False "
                "compares them if you know that they have."
            ) from None
    holders: dict[str, list[str]] = {}
    for name, adapter in named.items():
        for tensor in adapter.names:
            holders.setdefault(tensor, []).append(name)
    counts = {}
    for tensor, who in holders.items():
        _check_shapes(tensor, who, named)
        counts[tensor] = count_tensor(
            [a.diffs[tensor] if tensor in a.diffs else None for a in named.values()]
        )
    return OverlapReport(list(named), counts)


def _check_shapes(tensor: str, who: Sequence[str], named: Mapping[str, Adapter]) -> None:
    first = named[who[0]].header(tensor).shape
    for name in who[1:]:
        shape = named[name].header(tensor).shape
        if shape != first:
            raise BaseMismatchError(
                f"{tensor!r} has shape {tuple(first)} in adapter {who[0]!r} but {tuple(shape)} in "
                f"{name!r}; they belong to different bases."
            )
