"""Inverse Cholesky factors of many small Grams: one launch against cholesky_ex and a solve.

In fp64, which `truncated_svd` takes, beside. Nothing is compiled: the time is LAPACK's and
cuSOLVER's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_shape, torch_dtype
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, as_accurate
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.ops import resolve_backend
from sparseft.ops.cholesky_inverse import cholesky_inverse, cholesky_inverse_reference

__all__ = ["BENCH", "cholesky_case"]

TORCH = "torch: cholesky_ex, solve_triangular"
WIDE = "torch: cholesky_ex, solve_triangular, fp64"
OURS = "cholesky_inverse"

_DIMS = "COUNTxCOLUMNS"


def cholesky_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare on Grams of matrices eight times as tall as wide."""
    check_shape("cholesky_inverse", _DIMS, shape)
    torch_dtype("cholesky_inverse", dtype, ("fp32",))
    count, columns = shape

    def build(device: torch.device) -> Prepared:
        require_memory(4 * count * columns**2 * (8 + 20), device)
        generator = torch.Generator(device).manual_seed(0)
        tall = torch.randn(count, 8 * columns, columns, device=device, generator=generator)
        gram = tall.mT @ tall
        shift, wide = gram.new_zeros(count), gram.double()
        exact, _ = cholesky_inverse_reference(wide, shift.double())
        theirs, _ = cholesky_inverse_reference(gram, shift)

        def check(found: tuple[Tensor, Tensor]) -> list[Check]:
            inverse, failed = found
            # each rounds in an order of its own, and few numbers are summed: twice is too narrow
            got = as_accurate("inverse", inverse.float().contiguous(), theirs, exact)
            return [
                Check(got.name, got.got, 2 * got.limit),
                Check("failed factors", float(failed.count_nonzero()), 0.0),
            ]

        def plain() -> Contender:
            run = lambda: cholesky_inverse_reference(gram, shift)  # noqa: E731 (one of three)
            return Contender(run, check(run()))

        def plain_wide() -> Contender:
            run = lambda: cholesky_inverse_reference(wide, shift.double())  # noqa: E731
            return Contender(run, check(run()))

        def ours() -> Contender:
            run = lambda: cholesky_inverse(gram, shift)  # noqa: E731
            facts = {"backend": resolve_backend("cholesky_inverse", gram, shift)}
            return Contender(run, check(run()), facts, ours=True)

        contenders = {TORCH: attempt(plain), WIDE: attempt(plain_wide), OURS: attempt(ours)}
        for name, made in contenders.items():
            # a factor, then its inverse: a third of a cube each; half the Gram in, half of it out
            made.flops = 2 * count * columns**3 / 3
            made.bytes = count * columns**2 * (8.0 if name == WIDE else 4.0)
        return Prepared(contenders, TORCH)

    return Case(case_name("cholesky_inverse", shape, dtype), build)


BENCH = OpBench(
    name="cholesky_inverse",
    summary="inverse Cholesky factors of small Grams in one launch, against torch's batched ones",
    dims=_DIMS,
    shapes={
        "cuda": ((48, 80), (48, 128)),
        "cpu": ((48, 80),),
        "tiny": ((3, 10),),
    },
    dtypes=("fp32",),
    densities=(),
    build=cholesky_case,
)
