"""What a contender must show before it is timed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseft.ops._common import bits

__all__ = ["Check", "as_accurate", "equal_bits", "rel_rms", "worst"]


@dataclass(frozen=True)
class Check:
    """A number and the most it may be; NaN fails."""

    name: str
    got: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.got <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: {self.got:.3g}, at most {self.limit:.3g}"


def rel_rms(actual: Tensor, exact: Tensor) -> float:
    """Return RMS(actual - exact) / RMS(exact), 0 for empty tensors; both are taken in float64."""
    if exact.numel() == 0:
        return 0.0
    wide = exact.double()
    error = (actual.double() - wide).square().mean().sqrt()
    return float(error / wide.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny))


def as_accurate(name: str, actual: Tensor, theirs: Tensor, exact: Tensor) -> Check:
    """Twice torch's own distance from the exact result, at most: the rule of the tests."""
    limit = 2 * rel_rms(theirs, exact) + torch.finfo(actual.dtype).eps
    if actual.shape != exact.shape:
        return Check(f"{name}: shape {tuple(actual.shape)} for {tuple(exact.shape)}", 1.0, 0.0)
    return Check(f"{name}: error", rel_rms(actual, exact), limit)


def equal_bits(name: str, actual: Tensor, wanted: Tensor) -> Check:
    """No entry may differ in any bit."""
    if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
        got = f"{actual.dtype} {tuple(actual.shape)}"
        return Check(f"{name}: {got} for {wanted.dtype} {tuple(wanted.shape)}", 1.0, 0.0)
    return Check(f"{name}: entries that differ", float((bits(actual) != bits(wanted)).sum()), 0.0)


def worst(checks: Iterable[Check]) -> Check:
    """Return the one that is furthest above its limit, or nearest to it."""

    def strain(check: Check) -> float:
        if not check.passed:
            return float("inf")
        return check.got / check.limit if check.limit else 0.0

    return max(checks, key=strain)
