"""Truncated SVD by block power iteration from a random sketch, grown until the rule is content.

Source: Halko, Martinsson & Tropp, "Finding Structure with Randomness", SIAM Review 53(2), 2011,
algorithms 4.4 and 5.1; the growth by blocks as in Martinsson & Voronin, "A Randomized Blocked
Algorithm for Efficiently Computing Rank-Revealing Factorizations of Matrices", SIAM Journal on
Scientific Computing 38(5), 2016.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.ops._cholesky_qr import independent_columns, orthonormal_columns
from sparseft.ops._sketch import sign_sketch
from sparseft.ops._svd_problem import Factors, Problem, full_precision, right_factor

__all__ = ["BLOCK", "Iteration", "block_svd"]

# Columns by which a subspace of unknown size grows.
BLOCK = 64

# Singular values of `b` above this share of the largest are well enough resolved by the fp64 Gram
# that dividing by them leaves orthonormal vectors (to 2e-16 over its square).
_RESOLVED = 1e-4
# Above this share fp32 products leave them orthonormal to 3e-6, too.
_PLAIN = 0.05


# Where the last columns hold this much of what the last kept one does, more the smaller the flat
# part's share is, two power iterations leave the residual above 1.01 of optimal: set between 0.728
# (i ** -0.5, rank 64 of 768: 1.006) and 0.746 (noise, rank 32 of 256: 1.012) for short sides up to
# 256. Of 768 the last columns are a smaller share and scatter more: 0.69 to 0.79 for 72 products of
# normal matrices, i ** -0.5 between them (1.008 to 1.010), against 0.86 for noise (1.015).
_FLAT, _FLAT_LARGE = 0.738, 0.8
_SMALL_SIDE, _LARGE_SIDE = 256, 768
_SHARE = 0.06  # below: the flat part is too small to matter
# Iterations that may follow; and the squared residual above the least that ends them: 1.01 ** 2.
_FURTHER, _EXCESS = 4, 0.02


class Iteration(NamedTuple):
    """How the subspace is found.

    Args:
        seed: of the sketch.
        power: iterations before the spectrum is looked at; 2 leave the residual of rank 64 of 768
            within 1.007 of optimal for sigma_i = i ** -0.5, 1 within 1.023.
        oversample: columns beyond the rank.
        limit: columns beyond which a complete decomposition is cheaper; at most the short side.
    """

    seed: int
    power: int
    oversample: int
    limit: int


def block_svd(problem: Problem, how: Iteration) -> tuple[Factors, Tensor]:
    """Return the factors of the matrices that this suits, and which they are, (B,) bool."""
    a, rule = problem.a, problem.rule
    fixed = None if rule.rank is None else min(rule.rank, a.shape[1])
    width = min(a.shape[1], how.oversample + (BLOCK if fixed is None else fixed))
    q, b = _grow(a, None, None, range(width), how)
    while True:
        wide, squares, vectors = _ritz(b)
        size = q.shape[-1]
        trusted = size if size == a.shape[1] else size - how.oversample
        ranks = problem.ranks(squares)
        done = ranks <= trusted
        larger = min(size + BLOCK, how.limit)
        if fixed is not None or bool(done.all()) or larger <= size:
            break
        if not bool((_reachable(problem, squares, trusted, how.limit) & ~done).any()):
            break
        q, b = _grow(a, q, b, range(size, larger), how)
    if fixed is not None:
        done = torch.ones_like(done)
    # Columns beyond the rank tell how flat the spectrum is there; without them nobody asks.
    if how.oversample and _sharpen(problem, q, b, squares, ranks, done):
        wide, squares, vectors = _ritz(b)
        ranks = problem.ranks(squares)
        done &= ranks <= trusted if fixed is None else done
    if not bool(done.all()):
        ranks, squares, vectors = ranks[done], squares[done], vectors[done]
        q, b, wide = q[done], b[done], wide[done]
    r = int(ranks.max()) if len(ranks) else 0
    turn = vectors.flip(-1)[..., :r]
    left = (q.double() @ turn).to(a.dtype)
    last = squares[:, r - 1 : r] / squares[:, :1]  # NaN for zeros
    if bool((last > _PLAIN**2).all()):
        with full_precision(a.device):
            right = b.mT @ (turn / squares[:, None, :r].sqrt()).to(a.dtype)
    elif bool((last > _RESOLVED**2).all()):
        right = (wide.mT @ turn / squares[:, None, :r].sqrt()).to(a.dtype)
    else:
        right = right_factor(wide.mT @ turn, a.dtype)
    return Factors(left, squares[:, :r], right, ranks), done


def _ritz(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``b`` in fp64, and squared singular values and left vectors of it: the values
    descending, the vectors in reverse.
    """
    wide = b.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    return wide, values.flip(-1).clamp_min(0), vectors


def _sharpen(
    problem: Problem, q: Tensor, b: Tensor, squares: Tensor, ranks: Tensor, done: Tensor
) -> bool:
    """Iterate further, in ``q`` and ``b`` themselves, where the spectrum is flat at the rank, and
    tell whether there is such a matrix among those that are done.

    What one more iteration brings tells what others would, at most 1 to 3 times as much, by how
    flat the spectrum is: noise, i ** -0.1 to i ** -0.5, ranks 16 to 176 of 128 to 768.
    """
    a, size = problem.a, q.shape[-1]
    if size == a.shape[1] or not size:
        return False
    kept = torch.arange(size, device=ranks.device) < ranks[:, None]
    last = squares.gather(-1, (ranks - 1).clamp(0, size - 1)[:, None]).squeeze(-1)
    found = (squares * kept).sum(-1)
    left = problem.total - found
    flatness, share = squares[:, -1] / last, ranks * last / left  # NaN for zeros
    along = (a.shape[1] - _SMALL_SIDE) / (_LARGE_SIDE - _SMALL_SIDE)
    flat = _FLAT + (_FLAT_LARGE - _FLAT) * min(max(along, 0.0), 1.0)
    rough = done & (flatness + share / 8 > flat) & (share > _SHARE) & (ranks > 0)
    if not bool(rough.any()):
        return False
    ahead = 1 + 10 * (flatness - 0.79).clamp_min(0)
    for _ in range(_FURTHER):
        # Matrix by matrix, on a CPU that costs nothing; elsewhere all of them, and some are left.
        parts = [slice(None)]
        if a.device.type == "cpu" and not bool(rough.all()):
            parts = [slice(i, i + 1) for i in rough.nonzero().view(-1).tolist()]
        now = found.clone()
        for part in parts:
            basis = orthonormal_columns(a[part] @ b[part].mT, passes=2).to(a.dtype)
            with full_precision(a.device):
                rows = basis.mT @ a[part]
            chosen = rough[part, None, None]
            q[part] = torch.where(chosen, basis, q[part])
            b[part] = torch.where(chosen, rows, b[part])
            now[part] = (_ritz(b[part])[1] * kept[part]).sum(-1)
        gain, found = now - found, now
        rough &= gain * ahead > _EXCESS * (problem.total - found)
        if not bool(rough.any()):
            break
    return True


def _grow(
    a: Tensor, q: Tensor | None, b: Tensor | None, columns: range, how: Iteration
) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis with these columns of the sketch added, and ``b = q^T a``."""
    sketch = sign_sketch(a.shape[-1], columns, how.seed, dtype=a.dtype, device=a.device)
    y = _beside(q, a @ sketch)
    for _ in range(how.power):
        # The long side needs none: the columns are in order of falling size and each keeps its own
        # scale, so that what rounding mixes in from larger ones goes at the next step. Residuals
        # were the same with it, for spectra that fall by 1e-6 in one step, too.
        with full_precision(a.device):
            basis = independent_columns(y)
        z = a.mT @ basis
        y = _beside(q, a @ z)
    new = orthonormal_columns(y, passes=2).to(a.dtype)
    if q is not None:
        # Together, because what is left of an exhausted matrix is noise: its completion need not be
        # orthogonal to the basis. The basis itself comes out as it was.
        both = orthonormal_columns(torch.cat([q, new], -1), passes=2)
        new = both[..., q.shape[-1] :].to(a.dtype)
    with full_precision(a.device):
        rows = new.mT @ a
    if q is None or b is None:
        return new, rows
    return torch.cat([q, new], -1), torch.cat([b, rows], -2)


def _beside(q: Tensor | None, y: Tensor) -> Tensor:
    """Return ``y`` without its part in the span of ``q``."""
    return y if q is None else y - q @ (q.mT @ y)


def _reachable(problem: Problem, squares: Tensor, trusted: int, limit: int) -> Tensor:
    """Tell for which matrices the energy can be reached within the limit: singular values only
    fall, so that each column to come brings at most what the last trusted one did.
    """
    if problem.rule.energy is None:
        return torch.ones_like(problem.total, dtype=torch.bool)
    last = squares[:, trusted - 1]
    most = squares[:, :trusted].sum(-1) + (limit - trusted) * last
    return most >= problem.rule.energy * problem.total
