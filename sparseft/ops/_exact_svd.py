"""Truncated SVD by a complete decomposition: of the short side's Gram, or of the matrix itself."""

from __future__ import annotations

import torch

from sparseft.ops._svd_problem import Factors, Problem, full_precision, right_factor

__all__ = ["GRAM_ENTRIES", "gram_svd", "plain_svd"]

# Entries of a matrix that are in fp64 at a time for its Gram: an embedding's would weigh twice what
# it does. Linear layers up to 2048 x 8192 go whole.
GRAM_ENTRIES = 1 << 24

# Up to this short side all matrices are decomposed by one batched call, beyond one at a time: the
# fp64 copies of a whole chunk would weigh twice what the chunk does.
_SMALL = 64


def gram_svd(problem: Problem) -> Factors:
    """Decompose ``a a^T`` in fp64: singular values to about 1e-8 of the largest.

    An fp32 Gram would lose those under 3e-4 of it.
    """
    a = problem.a
    batch, s, _ = a.shape
    grams = torch.empty((batch, s, s), dtype=torch.float64, device=a.device)
    grams.zero_()
    for gram, matrix in zip(grams, a, strict=True):
        for part in matrix.split(max(1, GRAM_ENTRIES // s), dim=1):
            wide = part.double()
            gram.addmm_(wide, wide.mT)
    values, vectors = torch.linalg.eigh(grams)
    squares = values.flip(-1).clamp_min(0)
    ranks = problem.ranks(squares, squares.sum(-1)).clamp_max(s)
    r = int(ranks.max())
    left = vectors[..., a.shape[1] - r :].flip(-1).to(a.dtype)
    with full_precision(a.device):
        product = a.mT @ left
    return Factors(left, squares[:, :r], right_factor(product, a.dtype), ranks)


def plain_svd(problem: Problem) -> Factors:
    """Decompose ``a`` in fp64 by `torch.linalg.svd`: small singular values to relative accuracy."""
    a = problem.a
    step = len(a) if a.shape[1] <= _SMALL else 1
    parts = []
    for some in a.split(step):
        left, values, right = torch.linalg.svd(some.double(), full_matrices=False)
        parts.append((left.to(a.dtype), values, right.mT.to(a.dtype)))
    lefts, values, rights = zip(*parts, strict=True)
    squares = torch.cat(values).square()
    ranks = problem.ranks(squares, squares.sum(-1)).clamp_max(a.shape[1])
    r = int(ranks.max())
    return Factors(
        torch.cat([x[..., :r] for x in lefts]),
        squares[:, :r],
        torch.cat([x[..., :r] for x in rights]),
        ranks,
    )
