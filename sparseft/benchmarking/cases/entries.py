"""Capture, restore and write_sum of a tensor's entries: the kernels against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparseft.benchmarking.checks import equal_bits
from sparseft.benchmarking.masks import random_pattern, sectors_touched
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared
from sparseft.ops import gather_entries, resolve_backend, write_entries_, write_sum_

__all__ = ["entries_case"]

_OPS = {"capture": "gather_entries", "restore": "write_entries_", "write_sum": "write_sum_"}
_DENSITY = 0.01


def entries_case(op: str, shape: tuple[int, int]) -> Case:
    """Compare one of ``capture``, ``restore``, ``write_sum`` on a bf16 tensor, at 1 %."""

    def build(device: torch.device) -> Prepared:
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(shape, device=device, generator=generator).to(torch.bfloat16)
        pattern = random_pattern(shape, _DENSITY, device=device)
        at = pattern.indices
        base = gather_entries(weight, at, backend="reference")
        values = torch.randn(pattern.nnz, device=device, generator=generator)
        narrow = values.to(weight.dtype)

        def runner(target: Tensor, backend: str | None) -> Callable[[], Tensor]:
            def run() -> Tensor:
                if op == "capture":
                    return gather_entries(target, at, backend=backend)
                if op == "restore":
                    write_entries_(target, at, narrow, backend=backend)
                else:
                    write_sum_(target, at, base, values, backend=backend)
                return target

            return run

        wanted = runner(weight.clone(), "reference")()
        got = runner(weight.clone(), None)()
        backend = resolve_backend(_OPS[op], weight, at)
        sectors = 32.0 * sectors_touched(pattern, weight.element_size())
        # index; the weight's sectors in (and out again); what else is read or written per entry
        per_entry = {"capture": 2, "restore": 2, "write_sum": 2 + 4}[op]
        moved = pattern.nnz * (4 + per_entry) + sectors * (1 if op == "capture" else 2)

        def derive(timing: Timing, name: str, contender: Contender) -> Facts:
            return {"GB/s": moved / timing.median(name) * 1e-9}

        return Prepared(
            {
                "reference": Contender(runner(weight, "reference")),
                "ours": Contender(
                    runner(weight, None),
                    [equal_bits(op, got, wanted)],
                    {"backend": backend, "nnz": pattern.nnz},
                ),
            },
            "reference",
            derive=derive,
        )

    return Case(f"entries/{op}/{shape[0]}x{shape[1]}", build)
