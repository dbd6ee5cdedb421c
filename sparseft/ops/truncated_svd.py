"""Truncated singular value decompositions of many matrices of one shape at once.

Which way is taken (``s`` the short side):

``"svd"``
    ``s <= 64``, or small singular values are wanted to relative accuracy: `torch.linalg.svd`.
``"gram"``
    More columns than ``s / 4``, or the whole spectrum decides: fp64 Gram of the short side, eigh.
``"block"``
    The rest: block power iteration from a seeded sketch, products in fp32, factorisations in fp64.
    An energy or a noise level grows the block until it is reached; matrices that would need more
    than ``s / 4`` columns go to the Gram.

The ranks are known only when it is done, so these are plain functions, not operators of
``torch.ops``. `sparseft.ops.low_rank_approximation` has gradients; the factors have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sparseft._text import did_you_mean
from sparseft.errors import DecompositionError, OptionError
from sparseft.ops._block_svd import BLOCK, Iteration, block_svd
from sparseft.ops._common import accumulation_dtype
from sparseft.ops._exact_svd import GRAM_ENTRIES, gram_svd, plain_svd
from sparseft.ops._rank_rules import RankRule
from sparseft.ops._svd_input import gathered, labels_of, wide_and_near_one
from sparseft.ops._svd_problem import Factors, Problem, full_precision

__all__ = [
    "SMALL",
    "Method",
    "TruncatedSVD",
    "check_options",
    "choose_method",
    "truncated_svd",
    "truncated_svd_reference",
]

Method = Literal["auto", "block", "gram", "svd"]

# Short sides up to this are decomposed whole.
SMALL = 64

# Below this share of the squared norm the residual is formed and measured: as a difference of
# squares it would be mostly the rounding of the fp32 products.
_MEASURED = 1e-3


class TruncatedSVD(NamedTuple):
    """``matrices[i] ~ U[i] @ diag(S[i]) @ Vh[i]``.

    Args:
        U: (B, m, r); the first ``ranks[i]`` columns orthonormal, zeros beyond.
        S: (B, r) descending, zeros beyond ``ranks[i]``.
        Vh: (B, r, n); the first ``ranks[i]`` rows orthonormal, zeros beyond.
        ranks: (B,) int64; the largest is r.
        residual: (B,) float64, Frobenius norm of what is left.
        norm: (B,) float64, Frobenius norm of the matrix.
        methods: which way each matrix went: ``"block"``, ``"gram"`` or ``"svd"``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    ranks: Tensor
    residual: Tensor
    norm: Tensor
    methods: tuple[str, ...]

    @property
    def energy(self) -> Tensor:
        """(B,) float64, the kept share of the squared Frobenius norm; 1 for zero matrices."""
        share = torch.where(self.norm > 0, self.residual / self.norm, 0.0)
        return 1 - share.square()

    def reconstruct(self) -> Tensor:
        """Return (B, m, n), the low-rank matrices."""
        with torch.autocast(self.U.device.type, enabled=False), full_precision(self.U.device):
            return (self.U * self.S[:, None, :]) @ self.Vh


def truncated_svd_reference(matrices: Tensor, ranks: Sequence[int]) -> Tensor:
    """The definition: (B, m, n) float64, of each matrix the nearest one of its rank."""
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    place = torch.arange(s.shape[-1], device=s.device)
    kept = place < torch.tensor(list(ranks), dtype=torch.int64, device=s.device)[:, None]
    return (u * torch.where(kept, s, 0.0)[:, None, :]) @ vh


def choose_method(shape: tuple[int, int], rule: RankRule, oversample: int) -> str:
    """Return the way ``"auto"`` starts with; energy and noise levels may go from block to Gram."""
    short = min(shape)
    if short <= SMALL:
        return "svd"
    if rule.needs_all_values:
        return "gram"
    first = (BLOCK if rule.rank is None else rule.rank) + oversample
    return "block" if 4 * first <= short else "gram"


def truncated_svd(
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
) -> TruncatedSVD:
    """Decompose matrices of one shape and keep their largest singular values.

    Args:
        matrices: (B, m, n), or a sequence of (m, n) on one device; float64, float32, bfloat16 or
            float16. Tall ones are decomposed transposed. They are not written to.
        rank: how many to keep; all there are if fewer.
        energy: the fewest whose squares sum to this share of all squares, in (0, 1].
        hard_threshold: those above the Gavish-Donoho threshold, at the given standard deviation of
            the noise in each entry or, ``"median"``, at noise estimated from the median singular
            value (a matrix of one row or column is its own median: nothing is kept). Exactly one
            of ``rank``, ``energy`` and ``hard_threshold``.
        method: ``"auto"`` chooses by size; ``"block"``, ``"gram"`` and ``"svd"`` insist.
        seed: of the sketch, the same on every machine; one sketch serves the whole batch.
        power_iterations, oversample: accuracy of ``"block"``; more iterations follow where the
            spectrum is found to be flat.
        names: of the matrices, for messages.

    Returns:
        `TruncatedSVD`; factors in float32, float64 for float64 matrices. Each pair of singular
        vectors has the sign that makes the first of the largest entries (to 1e-4) of the one on the
        short side positive (of U for square matrices).

    Raises:
        DecompositionError: what is no tensor; shapes, dtypes or devices that do not go together; a
            NaN or infinite entry (the matrix is named); a gradient through the factors, when it is
            asked for.
        OptionError: not exactly one rule, or an option out of range.

    Numerics: fp32 products (fp64 for float64 matrices) whatever autocast and TF32 say of products
        that decide a result; Grams, Cholesky factors and eigenvalues in fp64. Matrices are scaled
        by powers of two, so that no square overflows. With the defaults the residual of ``"block"``
        is within 1.01 of optimal, plus fp32 rounding of the norm: measured for singular values
        ``i ** -0.1`` to ``i ** -1``, for noise, and for low rank under noise, short sides 128 to
        768. Where the spectrum is flat at the rank that takes 1 to 4 iterations more, each a fifth
        of the time. Single values are never too large but, where it is flat, the last ones up to
        8 % too small: an energy may cost a few ranks more than the fewest (51 for 49, 142 for 140
        in noise), and values just above a threshold may be missed. ``"block"`` and ``"gram"``
        resolve singular values down to 1e-8 of the largest, in float64, too.

    Example:
        >>> u, s, vh, *_ = truncated_svd(torch.eye(3).mul(2)[None], rank=1)
        >>> s
        tensor([[2.]])
    """
    rule = RankRule(rank, energy, hard_threshold)
    check_options(method, seed, power_iterations, oversample)
    batch = gathered(matrices, names)
    if torch.is_grad_enabled() and batch.requires_grad:
        out = _decompose(batch.detach(), rule, method, seed, power_iterations, oversample, names)
        return out._replace(**dict(zip(_FACTORS, _NoGradient.apply(batch, *out[:3]), strict=True)))
    return _decompose(batch, rule, method, seed, power_iterations, oversample, names)


_FACTORS = ("U", "S", "Vh")


class _NoGradient(torch.autograd.Function):
    """Passes factors on, tied to the matrices, so that their gradient is refused by name."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return tuple(f.view_as(f) for f in factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise DecompositionError(
            "truncated_svd: a gradient of the factors U, S, Vh was asked for; singular vectors "
            "have none where singular values meet. Use sparseft.ops.low_rank_approximation for the "
            "gradient of U diag(S) Vh, or detach the factors."
        )


def check_options(
    method: str, seed: int, power: int, oversample: int, *, who: str = "truncated_svd"
) -> None:
    """Refuse options that are out of range; ``who`` was asked."""
    if method not in get_args(Method):
        choices = get_args(Method)
        raise OptionError(
            f"{who}: method is {method!r}; wanted one of {', '.join(map(repr, choices))}."
            f"{did_you_mean(str(method), choices)}"
        )
    for name, value in (("seed", seed), ("power_iterations", power), ("oversample", oversample)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            raise OptionError(
                f"{who}: {name} is {value!r}; wanted an integer of 0 or more (below 2**64)."
            )


@torch.no_grad()
def _decompose(
    batch: Tensor,
    rule: RankRule,
    method: str,
    seed: int,
    power: int,
    oversample: int,
    names: Sequence[str] | None,
) -> TruncatedSVD:
    count, m, n = batch.shape
    dtype = accumulation_dtype(batch.dtype)
    if not batch.numel():
        return _nothing(batch, dtype, rule)
    if method == "auto":
        method, limit = choose_method((m, n), rule, oversample), min(m, n) // 4
    else:
        limit = min(m, n)
    with torch.autocast(batch.device.type, enabled=False):
        a, unit, norm = wide_and_near_one(batch.to(dtype), labels_of(count, names))
        problem = Problem(a, norm.square(), unit, rule)
        factors, methods = _by(problem, method, Iteration(seed, power, oversample, limit))
        return _result(problem, norm, factors, methods, tall=m > n)


def _by(problem: Problem, method: str, how: Iteration) -> tuple[Factors, tuple[str, ...]]:
    """Run a method; where block iteration gives up, the Gram."""
    count = len(problem.a)
    if method != "block":
        return (gram_svd if method == "gram" else plain_svd)(problem), (method,) * count
    some, done = block_svd(problem, how)
    if bool(done.all()):
        return some, ("block",) * count
    others = gram_svd(problem.at(~done))
    methods = tuple("block" if d else "gram" for d in done.tolist())
    if not bool(done.any()):
        return others, methods
    r = max(some.squares.shape[-1], others.squares.shape[-1])
    merged = []
    for one, other in zip(some, others, strict=True):
        out = one.new_zeros((count, *one.shape[1:-1], r) if one.ndim > 1 else (count,))
        out[(done, ..., slice(one.shape[-1])) if one.ndim > 1 else done] = one
        out[(~done, ..., slice(other.shape[-1])) if one.ndim > 1 else ~done] = other
        merged.append(out)
    return Factors(*merged), methods


def _result(
    problem: Problem, norm: Tensor, factors: Factors, methods: tuple[str, ...], *, tall: bool
) -> TruncatedSVD:
    left, squares, right, ranks = factors
    kept = torch.arange(squares.shape[-1], device=ranks.device) < ranks[:, None]
    squares = torch.where(kept, squares, 0.0)
    signs = _signs(left, kept)[:, None, :]
    left, right = left * signs, right * signs
    values = squares.sqrt()
    residual = _residual(problem, norm, left, values, right)
    s = (values * problem.unit[:, None]).to(left.dtype)
    u, v = (right, left) if tall else (left, right)
    return TruncatedSVD(
        u.contiguous(), s, v.mT.contiguous(), ranks, residual * problem.unit, norm * problem.unit,
        methods,
    )  # fmt: skip


def _signs(left: Tensor, kept: Tensor) -> Tensor:
    """Return (B, r): the sign of the first entry of each column that is as large as any to 1e-4; 0
    where the column is not kept.
    """
    size = left.abs()
    large = size >= (1 - 1e-4) * size.amax(-2, keepdim=True)
    place = torch.arange(left.shape[-2], device=left.device)[:, None]
    first = torch.where(large, place, left.shape[-2] - 1).amin(-2, keepdim=True)
    sign = torch.where(left.gather(-2, first).squeeze(-2) < 0, -1.0, 1.0).to(left.dtype)
    return sign * kept


def _residual(
    problem: Problem, norm: Tensor, left: Tensor, values: Tensor, right: Tensor
) -> Tensor:
    total = norm.square()
    lost = (total - values.square().sum(-1)).clamp_min(0)
    out = lost.sqrt()
    small = (lost <= _MEASURED * total) & (total > 0)
    scaled = left * values[:, None, :].to(left.dtype)
    rows = max(1, GRAM_ENTRIES // max(1, right.shape[-2]))
    with full_precision(left.device):
        for i in small.nonzero().view(-1).tolist():
            parts = [
                torch.linalg.vector_norm(
                    torch.addmm(some, mine, right[i].mT, alpha=-1), dtype=torch.float64
                )
                for some, mine in zip(problem.a[i].split(rows), scaled[i].split(rows), strict=True)
            ]
            out[i] = torch.linalg.vector_norm(torch.stack(parts))
    return out


def _nothing(batch: Tensor, dtype: torch.dtype, rule: RankRule) -> TruncatedSVD:
    """The result for no matrix, or for matrices of no entries."""
    count, m, n = batch.shape
    r = min(rule.rank or 0, m, n)
    zeros = torch.zeros(count, dtype=torch.float64, device=batch.device)
    return TruncatedSVD(
        torch.zeros((count, m, r), dtype=dtype, device=batch.device),
        torch.zeros((count, r), dtype=dtype, device=batch.device),
        torch.zeros((count, r, n), dtype=dtype, device=batch.device),
        torch.full((count,), r, dtype=torch.int64, device=batch.device),
        zeros, zeros.clone(), ("svd",) * count,
    )  # fmt: skip
