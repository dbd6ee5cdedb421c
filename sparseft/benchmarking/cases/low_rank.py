"""The nearest matrices of a rank, forward and backward, against autograd through torch's SVDs.

A loss is a fixed matrix times the result. Gradients of all sides are held against autograd through
`torch.linalg.svd` in fp64, one matrix after the other. Through ``svd_lowrank`` they are those of
the random subspace, not of the nearest matrix: there only the result is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_shape, torch_dtype
from sparseft.benchmarking.cases.encoders import random_differences
from sparseft.benchmarking.cases.truncated_svd import cut_full, cut_lowrank
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, rel_rms
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.ops import low_rank_approximation

__all__ = ["BENCH", "low_rank_case"]

FULL = "autograd through torch.linalg.svd, batched"
LOWRANK = "autograd through torch.svd_lowrank(niter=2), batched"
OURS = "low_rank_approximation"

_DIMS = "COUNTxROWSxCOLUMNSxRANK"
# The condition of the gradient is sigma_r / (sigma_r - sigma_(r+1)): about 2 r for i ** -0.5.
_LIMIT = 2e-6
# svd_lowrank's result is no projection on the leading vectors but near it.
_LOOSE = 0.5

Result = tuple[Tensor, Tensor]


def low_rank_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare result and gradient of matrices whose singular values fall as i ** -0.5."""
    check_shape("low_rank", _DIMS, shape)
    torch_dtype("low_rank", dtype, ("fp32",))
    count, m, n, rank = shape
    if rank >= min(m, n):
        raise ValueError(
            f"low_rank: RANK of shape {'x'.join(map(str, shape))} is {rank}; wanted {_DIMS} with "
            "a rank below the short side: at it, there is nothing to approximate"
        )

    def build(device: torch.device) -> Prepared:
        short = min(m, n)
        require_memory(count * (24 * m * n + 32 * short**2) + 200 * m * n, device)
        made = random_differences(((str(i), (m, n)) for i in range(count)), device)
        matrices = torch.stack(list(made.values())).requires_grad_()
        generator = torch.Generator(device).manual_seed(1)
        weights = torch.randn(matrices.shape, device=device, generator=generator)
        exact = [_exact(x, w, rank) for x, w in zip(matrices, weights, strict=True)]
        low, gradient = (torch.stack(parts) for parts in zip(*exact, strict=True))

        def through(cut: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> Result:
            u, s, vh = cut(matrices, rank)
            out = (u * s[:, None, :]) @ vh
            return out.detach(), torch.autograd.grad(out, matrices, weights)[0]

        def ours() -> Result:
            out = low_rank_approximation(matrices, rank=rank)
            return out.detach(), torch.autograd.grad(out, matrices, weights)[0]

        def checked(run: Callable[[], Result], *, result: float, slope: float | None) -> Contender:
            got, gradients = run()
            checks = [Check("result: error", rel_rms(got, low), result)]
            facts = {"error of the gradient": rel_rms(gradients, gradient)}
            if slope is not None:
                checks.append(Check("gradient: error", facts["error of the gradient"], slope))
            return Contender(run, checks, facts)

        limit = _LIMIT * rank
        contenders = {
            # its formula divides by all differences of squares, not by one gap alone
            FULL: attempt(
                lambda: checked(partial(through, cut_full), result=limit, slope=100 * limit)
            ),
            LOWRANK: attempt(
                lambda: checked(partial(through, cut_lowrank), result=_LOOSE, slope=None)
            ),
            OURS: attempt(lambda: checked(ours, result=limit, slope=limit)),
        }
        contenders[OURS].ours = True
        for contender in contenders.values():  # matrix and gradient in, result and gradient out
            contender.bytes = 16.0 * matrices.numel()
        return Prepared(contenders, FULL, clocks=("wall",), warmup=1, least=3)

    return Case(case_name("low_rank", shape, dtype), build)


def _exact(matrix: Tensor, weight: Tensor, rank: int) -> Result:
    x = matrix.detach().double().requires_grad_()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    out = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return out.detach(), torch.autograd.grad(out, x, weight.double())[0]


BENCH = OpBench(
    name="low_rank",
    summary="nearest matrices of a rank and their gradient: against autograd through torch's SVDs",
    dims=_DIMS,
    shapes={
        "cuda": ((4, 768, 768, 64),),
        "cpu": ((2, 256, 256, 16),),
        "tiny": ((2, 72, 80, 4),),
    },
    dtypes=("fp32",),
    densities=(),
    build=low_rank_case,
)
