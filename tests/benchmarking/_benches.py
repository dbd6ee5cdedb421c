"""Ops of a few microseconds: what the harness does, without the cases of the package."""

from __future__ import annotations

import torch

from sparseft.benchmarking.catalogue import OpBench, case_name
from sparseft.benchmarking.checks import equal_bits
from sparseft.benchmarking.suite import Case, Contender, Prepared


def adding(name="adding", *, wrong=False, densities=(0.01, 0.1), dtypes=("fp32", "bf16"), **words):
    """``a + a`` against ``2 * a``, a row of ours per density."""

    def build(shape, densities, dtype):
        def make(device):
            a = torch.ones(shape, device=device)
            wanted = 2 * a
            rows = {"2 * a": Contender(lambda: 2 * a, bytes=8.0 * a.numel(), flops=a.numel())}
            for density in densities or (None,):
                got = a + a + (1 if wrong else 0)
                rows["ours" if density is None else f"ours, {density:.0%}"] = Contender(
                    lambda: a + a,
                    [equal_bits("sum", got, wanted)],
                    ours=True,
                    density=density,
                    bytes=8.0 * a.numel(),
                    flops=a.numel(),
                )
            return Prepared(rows, "2 * a", clocks=("wall",))

        return Case(case_name(name, shape, dtype), make)

    settings = {
        "name": name,
        "summary": "a sum against a product",
        "dims": "ROWSxCOLS",
        "shapes": {"cuda": ((64, 64),), "cpu": ((32, 32),), "tiny": ((8, 8), (4, 4))},
        "dtypes": dtypes,
        "densities": densities,
        "build": build,
    }
    return OpBench(**(settings | words))
