"""Truncated SVDs of matrices of one shape against complete and randomised ones of torch.

Singular values fall as i ** -0.5, as those of fine-tuning's differences do. What a side leaves of
each matrix is in its figures, over the least there is; that of ours must be within 1 %, the gate of
``torch.svd_lowrank`` is wider. Nothing is compiled: the time is LAPACK's and cuSOLVER's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_shape, torch_dtype
from sparseft.benchmarking.cases.encoders import random_differences
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.ops import truncated_svd
from sparseft.ops._rank_rules import RankRule
from sparseft.ops.truncated_svd import Method, choose_method

__all__ = [
    "BENCH",
    "LOOSE",
    "PROMISED",
    "block_flops",
    "cut_full",
    "cut_lowrank",
    "least_left_over",
    "left_over",
]

FULL = "torch.linalg.svd, one by one"
BATCHED = "torch.linalg.svd, batched"
LOWRANK = "torch.svd_lowrank(niter=2), one by one"
LOWRANK_BATCHED = "torch.svd_lowrank(niter=2), batched"
OURS = "ours"
GRAM = "ours, complete (method='gram')"

# What is left over the least there may be: the op's promise, torch's rounding, svd_lowrank's aim.
PROMISED, EXACT, LOOSE = 1.01, 1.0001, 1.1

_DIMS = "COUNTxROWSxCOLUMNSxRANK"
_DTYPES = ("fp32", "bf16", "fp16")
_OVERSAMPLE, _NITER = 8, 2  # of svd_lowrank
_OUR_COLUMNS, _OUR_PRODUCTS = 16, 6  # beyond the rank; with the matrix, at two power iterations

Factors = tuple[Tensor, Tensor, Tensor]


def cut_full(matrices: Tensor, rank: int) -> Factors:
    """Return the factors of complete decompositions, cut to the rank."""
    u, s, vh = torch.linalg.svd(matrices.float(), full_matrices=False)
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def cut_lowrank(matrices: Tensor, rank: int) -> Factors:
    """Return those of randomised ones, oversampled by 8, cut to the rank."""
    q = min(rank + _OVERSAMPLE, *matrices.shape[-2:])
    u, s, v = torch.svd_lowrank(matrices.float(), q=q, niter=_NITER)
    return u[..., :rank], s[..., :rank], v.mT[..., :rank, :]


def left_over(matrices: Tensor, factors: Factors) -> Tensor:
    """Return the Frobenius norm of what factors leave of each matrix, in fp64."""
    u, s, vh = (f.double() for f in factors)
    rest = matrices.double() - (u * s[..., None, :]) @ vh
    return torch.linalg.vector_norm(rest, dim=(-2, -1))


def block_flops(shapes: Sequence[tuple[int, int]], rank: int) -> float | None:
    """Return operations of our products with the matrices; None where any is decomposed whole."""
    rule = RankRule(rank, None, None)
    if any(choose_method(shape, rule, _OUR_COLUMNS) != "block" for shape in shapes):
        return None
    return 2.0 * sum(m * n for m, n in shapes) * (rank + _OUR_COLUMNS) * _OUR_PRODUCTS


def _case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    check_shape("truncated_svd", _DIMS, shape)
    kind = torch_dtype("truncated_svd", dtype, _DTYPES)
    count, m, n, rank = shape
    rank = min(rank, m, n)

    def build(device: torch.device) -> Prepared:
        # the matrices as they are and in fp32, what complete decompositions make of them in fp32,
        # and the gate of one matrix after the other in fp64
        require_memory(count * (m * n * (kind.itemsize + 12) + 8 * min(m, n) ** 2), device)
        made = random_differences(((str(i), (m, n)) for i in range(count)), device)
        matrices = torch.stack(list(made.values())).to(kind)
        least = least_left_over(matrices, rank)

        def one_by_one(cut: Callable[[Tensor, int], Factors]) -> list[Factors]:
            return [cut(matrix, rank) for matrix in matrices]

        def batched(cut: Callable[[Tensor, int], Factors]) -> list[Factors]:
            return list(zip(*cut(matrices, rank), strict=True))

        def ours(method: Method) -> list[Factors]:
            found = truncated_svd(matrices, rank=rank, method=method)
            return list(zip(found.U, found.S, found.Vh, strict=True))

        def contender(run: Callable[[], list[Factors]], limit: float, **more: Any) -> Contender:
            over = [
                float(left_over(x, factors) / best)
                for x, factors, best in zip(matrices, run(), least, strict=True)
            ]
            check = Check("residual over the least there is", max(over), limit)
            facts = {"residual over the least": max(over)}
            return Contender(run, [check], facts, bytes=moved, **more)

        moved = float(count * (m * n * kind.itemsize + 4 * rank * (m + n + 1)))
        used = truncated_svd(matrices[:1], rank=rank).methods[0]
        flops = block_flops([(m, n)] * count, rank)
        sides: dict[str, tuple[Callable[[], list[Factors]], float, dict[str, Any]]] = {
            FULL: (partial(one_by_one, cut_full), EXACT, {}),
            BATCHED: (partial(batched, cut_full), EXACT, {}),
            LOWRANK: (partial(one_by_one, cut_lowrank), LOOSE, {}),
            LOWRANK_BATCHED: (partial(batched, cut_lowrank), LOOSE, {}),
            OURS: (partial(ours, "auto"), PROMISED, {"ours": True, "flops": flops}),
            GRAM: (partial(ours, "gram"), PROMISED, {"ours": True}),
        }
        contenders = {
            name: attempt(partial(contender, run, limit, **more))
            for name, (run, limit, more) in sides.items()
        }
        contenders[OURS].facts["method"] = used
        return Prepared(contenders, FULL, clocks=("wall",), warmup=1, least=3)

    return Case(case_name("truncated_svd", shape, dtype), build)


def least_left_over(matrices: Iterable[Tensor], rank: int) -> list[float]:
    """Return what the best matrices of a rank leave, in fp64; above 0 for the quotients' sake."""
    found = []
    for matrix in matrices:
        values = torch.linalg.svdvals(matrix.double())
        floor = torch.finfo(torch.float32).eps * values.square().sum().sqrt()
        found.append(float(torch.maximum(values[rank:].square().sum().sqrt(), floor)))
    return found


BENCH = OpBench(
    name="truncated_svd",
    summary="singular triplets of a batch: block iteration against linalg.svd and svd_lowrank",
    dims=_DIMS,
    shapes={
        "cuda": ((8, 768, 768, 64), (2, 3072, 768, 64)),
        "cpu": ((4, 256, 256, 16), (2, 1024, 256, 16)),
        "tiny": ((2, 72, 80, 2),),
    },
    dtypes=_DTYPES,
    densities=(),
    build=_case,
)
