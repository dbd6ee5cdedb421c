"""How many singular values a truncated SVD keeps: a number, a share of energy, or above noise."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseft.errors import OptionError

__all__ = ["RankRule", "marchenko_pastur_median", "noise_threshold"]

# What "reached" means beside rounding: the sum of squares may fall short by this share of the norm.
_SLACK = 1e-12


@dataclass(frozen=True)
class RankRule:
    """Exactly one of three.

    Args:
        rank: so many, or all there are if fewer.
        energy: the fewest whose squares sum to this share of the squared Frobenius norm, in (0, 1].
        hard_threshold: those above the optimal threshold of Gavish and Donoho: a number is the
            known standard deviation of the noise in each entry, ``"median"`` estimates it from the
            median singular value.

    Raises:
        OptionError: none or several of them, or one out of range.

    Source: Gavish & Donoho, "The Optimal Hard Threshold for Singular Values is 4/sqrt(3)", IEEE
    Transactions on Information Theory 60(8), 2014.
    """

    rank: int | None = None
    energy: float | None = None
    hard_threshold: float | Literal["median"] | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            got = ", ".join(f"{k}={v!r}" for k, v in given.items()) or "none of them"
            raise OptionError(
                f"truncated SVD: got {got}; wanted exactly one of rank=, energy=, hard_threshold=."
            )
        ((name, value),) = given.items()
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "rank":
            fits, wanted = number and isinstance(value, int) and value >= 0, "an integer >= 0"
        elif name == "energy":
            fits, wanted = number and 0 < float(value) <= 1, "a number in (0, 1]"
        else:
            fits = value == "median" or (number and 0 <= float(value) < math.inf)
            wanted = "'median' or the standard deviation of the noise, a finite number >= 0"
        if not fits:
            raise OptionError(f"truncated SVD: {name} is {value!r}; wanted {wanted}.")

    @property
    def needs_all_values(self) -> bool:
        """Whether the whole spectrum decides."""
        return self.hard_threshold == "median"

    def ranks(self, squares: Tensor, total: Tensor, unit: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return how many of the leading singular values each matrix keeps.

        Args:
            squares: (B, k) float64, squared singular values, descending; all of them if
                `needs_all_values`.
            total: (B,) float64, squared Frobenius norms, in the units of ``squares``.
            unit: (B,) float64: times this, singular values are in the caller's units.
            shape: (m, n) of the matrices.

        Returns:
            (B,) int64. Under ``energy``, k + 1 where k values do not reach it.
        """
        batch, k = squares.shape
        if self.rank is not None:
            return torch.full((batch,), min(self.rank, *shape), device=squares.device)
        if self.energy is not None:
            reached = squares.cumsum(-1) >= (self.energy - _SLACK) * total[:, None]
            return torch.where(total > 0, 1 + (~reached).sum(-1), 0)
        values = squares.sqrt() * unit[:, None]
        if self.hard_threshold == "median":
            middle = _median(values)
            least = noise_threshold(*shape) / math.sqrt(
                max(shape) * marchenko_pastur_median(min(shape) / max(shape))
            )
            limit = least * middle
        else:
            sigma = float(self.hard_threshold or 0.0)
            limit = torch.full_like(total, noise_threshold(*shape) * sigma)
        return (values > limit[:, None]).sum(-1)


def _median(values: Tensor) -> Tensor:
    """Return the median of each row, the mean of the middle two if their number is even."""
    ordered, k = values.sort(-1).values, values.shape[-1]
    if k == 0:
        return values.sum(-1)
    return (ordered[:, (k - 1) // 2] + ordered[:, k // 2]) / 2


def noise_threshold(m: int, n: int) -> float:
    """Return the optimal threshold for singular values under unit noise: ``lambda(beta) sqrt(n)``.

    ``lambda(beta) = sqrt(2 (beta + 1) + 8 beta / (beta + 1 + sqrt(beta^2 + 14 beta + 1)))`` with
    ``beta`` the short side over the long one; 4 / sqrt(3) for square matrices.
    """
    m, n = sorted((m, n))
    if n == 0:
        return 0.0
    beta = m / n
    root = math.sqrt(beta * beta + 14 * beta + 1)
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root)) * math.sqrt(n)


@functools.lru_cache(maxsize=1024)
def marchenko_pastur_median(beta: float) -> float:
    """Return the median of the Marchenko-Pastur law: of squared singular values of unit noise / n.

    The density ``sqrt((b - x)(x - a)) / (2 pi beta x)`` between ``(1 -+ sqrt(beta))^2`` is summed
    by the midpoint rule over the angle ``x = (a + b)/2 - (b - a)/2 cos t``, where it is smooth.
    """
    if not 0 < beta <= 1:
        return 1.0  # no noise to speak of: the limit for thin matrices
    steps = 1 << 14
    angle = (torch.arange(steps, dtype=torch.float64) + 0.5) * (math.pi / steps)
    half = 2 * math.sqrt(beta)
    x = 1 + beta - half * angle.cos()
    mass = (half * angle.sin()).square() / (2 * math.pi * beta * x) * (math.pi / steps)
    below = mass.cumsum(0)
    at = int((below < below[-1] / 2).sum())
    before = float(below[at - 1]) if at else 0.0
    share = (float(below[-1]) / 2 - before) / float(mass[at])
    edge = (at + share) * (math.pi / steps)
    return 1 + beta - half * math.cos(edge)
