"""What methods do to one adapter's diff of one tensor before it is combined: trim it, drop entries
at random.

Every step sees one `Part` and nothing else, costs O(nnz) (O(nnz log nnz) where magnitudes are
ranked) and makes nothing of the weight's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from numbers import Integral
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sparseft._text import did_you_mean
from sparseft.composition.registry import Part
from sparseft.errors import OptionError
from sparseft.ops._common import bits
from sparseft.ops._rounding import philox

__all__ = [
    "Prepare",
    "Ranks",
    "check_choice",
    "check_seed",
    "check_share",
    "check_whole",
    "drop",
    "drop_by_rank",
    "kept_of",
    "trim",
]

Prepare: TypeAlias = Callable[[Part], Part]
Ranks: TypeAlias = Literal["row", "tensor"]

# Random words made at a time on a CPU: 10 M entries take 1.1 s so, 1.6 s with 256 Ki at a time and
# 2.5 s in one go (one core; Philox keeps about ten int64 vectors).
_BLOCK = 1 << 15


# Options.


def check_share(option: str, value: object, *, what: str) -> float:
    """Return ``value`` if it is in (0, 1].

    Raises:
        OptionError: it is not; the message says ``what`` it is a share of.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise OptionError(f"{option} is {value!r}, wanted a number in (0, 1]: {what}.")
    return float(value)


def check_whole(option: str, value: object, *, least: int, what: str) -> int:
    """Return ``value`` if it is an integer from ``least``.

    Raises:
        OptionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(f"{option} is {value!r}, wanted an integer from {least}: {what}.")
    return int(value)


def check_seed(seed: object) -> int:
    """Return ``seed`` if it is an integer, of either sign and any size.

    Raises:
        OptionError: it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise OptionError(f"seed is {seed!r}, wanted an integer.")
    return int(seed)


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        OptionError: it is not; the message has the nearest.
    """
    if value not in choices:
        raise OptionError(
            f"{option} is {value!r}, wanted one of {', '.join(map(repr, choices))}."
            f"{did_you_mean(str(value), choices)}"
        )
    return str(value)


def kept_of(nnz: int, density: float) -> int:
    """Return how many of ``nnz`` entries a density keeps: the nearest integer, but one at least."""
    return min(nnz, max(1, round(density * nnz)))


# Trimming.


def trim(density: float, *, outliers: float = 0.0) -> Prepare | None:
    """Return a step that keeps the entries of largest magnitude, or None where it keeps all.

    Args:
        density: share of the part's own entries that stays: exactly `kept_of` of them. Of equal
            magnitudes the lower flat index stays.
        outliers: share of the part's entries, rounded down, that is left out first: the largest.
            The density has the last word: where both cannot be had, fewer outliers are left out.
    """
    if density == 1:
        return None

    def prepare(part: Part) -> Part:
        nnz = part.values.numel()
        count = kept_of(nnz, density)
        skipped = min(int(outliers * nnz), nnz - count)
        magnitude = part.values.abs()
        keep = _largest(magnitude, skipped + count)
        if skipped:
            keep &= ~_largest(magnitude, skipped)
        return part.keep(keep)

    return prepare


def _largest(magnitude: Tensor, count: int) -> Tensor:
    """Return a bool (nnz,) that is True at the ``count`` largest; of equals the first."""
    nnz = magnitude.numel()
    if count >= nnz:
        return torch.ones_like(magnitude, dtype=torch.bool)
    least = magnitude.kthvalue(nnz - count + 1).values
    keep = magnitude > least
    equal = magnitude == least
    return keep | (equal & (equal.cumsum(0) <= count - keep.sum()))


# Dropping at random.


def drop(density: float, seed: int) -> Prepare | None:
    """Return a step that keeps each entry with probability ``density`` and divides it by that.

    Expectations stay as they are. None at density 1.
    """
    if density == 1:
        return None

    def prepare(part: Part) -> Part:
        keep = part.values.new_full((), density, dtype=torch.float64)
        return _thinned(part, keep, seed)

    return prepare


def drop_by_rank(density: float, epsilon: float, ranks: Ranks, seed: int) -> Prepare | None:
    """Return a step that keeps small entries less often than large ones; None at density 1.

    Of n entries, the one of rank r (0 for the smallest magnitude; of equals the lower flat index
    has the higher rank) stays with probability ``density - epsilon + 2 * epsilon * r / (n - 1)``
    and is divided by that. A single entry stays with probability ``density``.

    Args:
        density: mean probability to stay.
        epsilon: half the width of the window that probabilities lie in.
        ranks: among the part's entries of the same row (first dimension), or of the whole tensor.
        seed: of the draw.
    """
    if density == 1:
        return None

    def prepare(part: Part) -> Part:
        return _thinned(part, _keep_by_rank(part, density, epsilon, ranks), seed)

    return prepare


def _keep_by_rank(part: Part, density: float, epsilon: float, ranks: Ranks) -> Tensor:
    nnz, device = part.values.numel(), part.values.device
    order = _places(_smallness(part.values))  # largest first
    if ranks == "row" and len(part.shape) > 1:
        row = part.indices // max(1, part.shape.numel() // max(1, part.shape[0]))
        order = order[_places(row[order])]
        _, sizes = row.unique_consecutive(return_counts=True)
    else:
        sizes = torch.full((min(1, nnz),), nnz, device=device)
    size = sizes.repeat_interleave(sizes)  # of the group of each place in the order
    end = sizes.cumsum(0).repeat_interleave(sizes)
    rank = torch.empty(nnz, dtype=torch.float64, device=device)
    # 0 for the smallest, 1 for the largest; a tensor divides a tensor, so that GPUs do not multiply
    # by a reciprocal
    place = torch.arange(nnz, device=device)
    relative = (end - 1 - place).double() / (size - 1).clamp(min=1).double()
    rank[order] = torch.where(size > 1, relative, 0.5)
    return rank * (2 * epsilon) + (density - epsilon)


def _smallness(values: Tensor) -> Tensor:
    """Return (nnz,) int32 or int64, not negative, that fall as the magnitudes rise."""
    magnitude = bits(values.abs())  # of finite numbers >= 0, whose bits order as they do
    return torch.iinfo(magnitude.dtype).max - magnitude


def _places(keys: Tensor) -> Tensor:
    """Return the int64 (nnz,) places of ``keys`` in ascending order, equal ones as they stand.

    Args:
        keys: (nnz,) int32 or int64, not negative.
    """
    nnz = keys.numel()
    if keys.dtype != torch.int32 or nnz >= 2**31:
        return keys.argsort(stable=True)
    unique = (keys.long() << 32) | torch.arange(nnz, device=keys.device)
    if unique.device.type == "cpu":  # 10 M: 0.7 s, where torch.argsort takes 2.7 s (one core)
        unique.numpy().sort()
    else:
        unique = unique.sort().values
    return unique & 0xFFFFFFFF


def _thinned(part: Part, keep: Tensor, seed: int) -> Part:
    """Return the entries drawn with probabilities ``keep``, divided by them.

    Args:
        part: of one adapter and tensor.
        keep: (nnz,) or () float64 in (0, 1].
        seed: any integer.

    Numerics: an entry stays if a 32-bit word of Philox-4x32-7 is below ``rn(keep * 2**32)``. The
    word's key is a BLAKE2b hash of (seed, adapter's digest, tensor's name), its counter the flat
    index. The quotient is rounded once, to the values' dtype, from ``keep`` rounded to it.
    """
    key = hashlib.blake2b(f"{seed}:{part.digest}:{part.name}".encode(), digest_size=16).digest()
    secret, tensor, step = (
        int.from_bytes(key[a:b], "little") for a, b in ((0, 8), (8, 12), (12, 16))
    )
    bound = (keep * 2.0**32).round().long()
    nnz = part.indices.numel()
    chosen = torch.empty(nnz, dtype=torch.bool, device=part.indices.device)
    block = _BLOCK if part.indices.device.type == "cpu" else max(1, nnz)
    for start in range(0, nnz, block):
        piece = slice(start, min(start + block, nnz))
        at = part.indices[piece].long()
        words = philox(secret, at, at >> 32, tensor, step)
        chosen[piece] = words < (bound[piece] if bound.ndim else bound)
    kept = part.keep(chosen)
    share = (keep[chosen] if keep.ndim else keep).to(kept.values.dtype)
    return kept._replace(values=kept.values / share)
