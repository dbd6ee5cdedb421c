"""The random signs of the block iteration: a kernel against int64 arithmetic of torch.

`torch.randn` stands beside as what others take, with other numbers on each machine. Compiled code
takes part where its bits are those of the eager arithmetic (on CPUs torch 2.13's are not).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_shape, torch_dtype
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, equal_bits
from sparseft.benchmarking.competitors import compiled
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.ops import resolve_backend
from sparseft.ops._sketch import sign_sketch, sign_sketch_reference

__all__ = ["BENCH", "sketch_case"]

TORCH = "torch, int64"
COMPILED = "compiled: torch, int64"
RANDN = "torch.randn, another on each machine"
OURS = "sign_sketch"

_DIMS = "ROWSxCOLUMNS"
_DTYPES = ("fp32", "bf16", "fp16")
_SEED = 7


def sketch_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare the first columns of a sketch."""
    check_shape("sketch", _DIMS, shape)
    kind = torch_dtype("sketch", dtype, _DTYPES)
    rows, columns = shape

    def build(device: torch.device) -> Prepared:
        # a dozen int64 of the size of the result, rounded up to words of 32
        require_memory(rows * -(-columns // 32) * 32 * 8 * 12, device)
        every = range(columns)
        wanted = sign_sketch_reference(rows, every, _SEED, device=torch.device("cpu")).to(kind)

        def check(got: Tensor) -> list[Check]:
            return [equal_bits("signs", got.cpu(), wanted)]

        def eager() -> Tensor:
            return sign_sketch_reference(rows, every, _SEED, device=device).to(kind)

        def plain() -> Contender:
            return Contender(eager, check(eager()))

        def randn() -> Contender:
            run = partial(torch.randn, rows, columns, device=device, dtype=kind)
            size = float(run().float().square().mean().sub(1).abs())
            # the mean of as many squares, at six of its standard deviations
            return Contender(run, [Check("mean square - 1", size, 6 * (2 / wanted.numel()) ** 0.5)])

        def ours() -> Contender:
            run = partial(sign_sketch, rows, every, _SEED, dtype=kind, device=device)
            got = run()
            facts = {"backend": resolve_backend("sign_sketch", got)}
            return Contender(run, check(got), facts, ours=True)

        def fused() -> Contender:
            made = compiled(eager, check=check)
            if made.status != "red":
                return made
            # torch.compile's mistake, not the case's: no figure, and no red gate
            return Contender(skipped=f"other bits than eager: {made.checks[0]}")

        contenders = {
            TORCH: attempt(plain),
            COMPILED: attempt(fused),
            RANDN: attempt(randn),
            OURS: attempt(ours),
        }
        for made in contenders.values():
            made.bytes = float(wanted.numel() * kind.itemsize)
        return Prepared(contenders, TORCH)

    return Case(case_name("sketch", shape, dtype), build)


BENCH = OpBench(
    name="sketch",
    summary="the same random signs on every machine: a kernel against torch in int64, and randn",
    dims=_DIMS,
    shapes={
        "cuda": ((3072, 80), (250_002, 80)),
        "cpu": ((3072, 80),),
        "tiny": ((70, 40),),
    },
    dtypes=_DTYPES,
    densities=(),
    build=sketch_case,
)
