"""The nearest matrices of a given rank, differentiable in what they are near to.

The map ``A -> A_r = U_r diag(S_r) Vh_r`` is the projection onto the manifold of rank-r matrices. It
is smooth where ``sigma_r > sigma_(r+1)``, although single singular vectors are not, and it is the
gradient of ``A -> |A_r|^2 / 2``, so that its derivative D is self-adjoint: the gradient of a loss
is ``D[G]`` for the incoming gradient ``G``. With ``R = A - A_r``, column by column (i <= r)::

    D[G] = U (U^T G V) V^T + P V^T + U Q^T
    (sigma_i^2 - R R^T) p_i = sigma_i^2 a_i + sigma_i R b_i,    a = (1 - U U^T) G V
    q_i = b_i + R^T p_i / sigma_i,                              b = (1 - V V^T) G^T U

The first line with ``p = a``, ``q = b`` is the projection onto the tangent space; the rest is the
manifold's curvature. The system is solved by one fp64 eigendecomposition of ``R R^T``.

Source: Feppon & Lermusiaux, "A Geometric Approach to Dynamical Model Order Reduction", SIAM Journal
on Matrix Analysis and Applications 39(1), 2018 (there as a sum over all singular vectors).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft.errors import DecompositionError
from sparseft.ops._rank_rules import RankRule
from sparseft.ops._svd_input import gathered, labels_of
from sparseft.ops.truncated_svd import Method, choose_method, truncated_svd

__all__ = ["low_rank_approximation"]

# A relative gap between sigma_r and sigma_(r+1) below this is rounding: the derivative, which
# divides by it, would be, too.
_LEAST_GAP = {torch.float32: 1e-5, torch.float64: 1e-10}


def low_rank_approximation(
    matrices: Tensor | Sequence[Tensor],
    *,
    rank: int | None = None,
    energy: float | None = None,
    hard_threshold: float | Literal["median"] | None = None,
    method: Method = "auto",
    seed: int = 0,
    power_iterations: int = 2,
    oversample: int = 16,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return ``U diag(S) Vh`` of `truncated_svd`, with a gradient.

    Args:
        matrices: (B, m, n), or a sequence of (m, n); may require grad.
        rank, energy, hard_threshold: exactly one, as for `truncated_svd`. Gradients hold the rank
            that was found fixed.
        method: as for `truncated_svd`; where a gradient is wanted ``"auto"`` takes a complete
            decomposition, as the rule below is that of the exact projection.
        seed, power_iterations, oversample, names: as for `truncated_svd`.

    Returns:
        (B, m, n) float32, float64 for float64 matrices. Gradients come in the matrices' dtype;
        differentiable once.

    Raises:
        DecompositionError: as `truncated_svd`; and in backward, naming the matrix, where singular
            values ``rank`` and ``rank + 1`` agree (to 1e-5, 1e-10 in float64) or the first of them
            is 0 to working precision: the nearest matrix is not unique or not smooth there.
        OptionError: as `truncated_svd`.

    Numerics: the backward works in fp64, one matrix at a time; its condition is
    ``sigma_r / (sigma_r - sigma_(r+1))``.

    Example:
        >>> low_rank_approximation(torch.diag(torch.tensor([3.0, 1.0]))[None], rank=1)
        tensor([[[3., 0.],
                 [0., 0.]]])
    """
    rule = RankRule(rank, energy, hard_threshold)
    batch = gathered(matrices, names)
    if not (torch.is_grad_enabled() and batch.requires_grad):
        return truncated_svd(
            batch, rank=rank, energy=energy, hard_threshold=hard_threshold, method=method,
            seed=seed, power_iterations=power_iterations, oversample=oversample, names=names,
        ).reconstruct()  # fmt: skip
    if (
        method == "auto"
        and choose_method((batch.shape[1], batch.shape[2]), rule, oversample) != "svd"
    ):
        method = "gram"
    options = {
        "rank": rank, "energy": energy, "hard_threshold": hard_threshold, "method": method,
        "seed": seed, "power_iterations": power_iterations, "oversample": oversample,
    }  # fmt: skip
    return _LowRank.apply(batch, options, names)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, batch: Tensor, options: dict[str, Any], names: Sequence[str] | None
    ) -> Tensor:
        found = truncated_svd(batch.detach(), names=names, **options)
        ctx.save_for_backward(batch, found.U, found.S, found.Vh, found.ranks)
        ctx.names = names
        return found.reconstruct()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        batch, u, s, vh, ranks = ctx.saved_tensors
        labels = labels_of(len(batch), ctx.names)
        out = torch.zeros_like(batch, memory_format=torch.contiguous_format)
        tall = batch.shape[1] > batch.shape[2]
        with torch.autocast(batch.device.type, enabled=False):
            for i, r in enumerate(ranks.tolist()):
                left, right = u[i, :, :r].double(), vh[i, :r].mT.double()
                a, g = batch[i].double(), grad[i].double()
                if tall:
                    left, right, a, g = right, left, a.mT, g.mT
                try:
                    d = _derivative(a, g, left, s[i, :r].double(), right, _LEAST_GAP[s.dtype])
                except _NoGap as gap:
                    raise DecompositionError(
                        f"low_rank_approximation: {labels[i]} has no gradient at rank {r}: "
                        f"singular value {r} is {gap.args[0]:.6g} and the next {gap.args[1]:.6g}, "
                        "where the nearest matrix of that rank is not unique or not smooth. "
                        "Choose a rank with a gap after it."
                    ) from None
                out[i] = d.mT if tall else d
        return out, None, None


class _NoGap(Exception):
    """Singular values r and r + 1 agree; the two are the arguments."""


def _derivative(a: Tensor, g: Tensor, u: Tensor, s: Tensor, v: Tensor, least_gap: float) -> Tensor:
    """Return ``D[g]`` at a wide matrix ``a``; all in fp64."""
    r = s.numel()
    if r == a.shape[0]:
        return g  # every matrix near has that rank: the projection is the identity
    if r == 0:
        return torch.zeros_like(g)
    rest = a - (u * s) @ v.mT
    squares, w = torch.linalg.eigh(rest @ rest.mT)
    last, following = float(s[-1]), float(squares[-1].clamp_min(0).sqrt())
    if not last * (1 - least_gap) > following or last <= 0.1 * least_gap * float(s[0]):
        raise _NoGap(last, following)
    gv, gu = g @ v, g.mT @ u
    core = u.mT @ gv
    across, along = gv - u @ core, gu - v @ core.mT
    right_side = across * s.square() + rest @ along * s
    p = w @ ((w.mT @ right_side) / (s.square() - squares[:, None]))
    q = along + rest.mT @ p / s
    return u @ (core @ v.mT + q.mT) + p @ v.mT
