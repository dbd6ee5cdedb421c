"""A weight's entries clipped to their base values: the op against a pass over the whole tensor."""

from __future__ import annotations

import torch
from clip_to_base import clip_to_base_, clip_to_base_reference_

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import equal_bits
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.masks import random_pattern
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt

_DIMS, _DTYPES, _LIMIT = "ROWSxCOLS", ("fp32", "bf16"), 0.01
_WHOLE = "dense: torch.clamp(weight, base - limit, base + limit)"


def clip_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare at each density; the dense pass is the baseline."""
    check_shape("clip_to_base", _DIMS, shape)
    check_densities("clip_to_base", densities)
    kind = torch_dtype("clip_to_base", dtype, _DTYPES)

    def build(device: torch.device) -> Prepared:
        require_memory(6 * shape[0] * shape[1] * kind.itemsize, device)
        generator = torch.Generator(device).manual_seed(0)
        base = torch.randn(shape, device=device, generator=generator).to(kind)
        weight = base + 0.1 * torch.randn(shape, device=device, generator=generator).to(kind)

        def whole() -> Contender:
            return Contender(lambda: torch.clamp(weight, base - _LIMIT, base + _LIMIT))

        def ours(density: float) -> Contender:
            pattern = random_pattern(shape, density, device=device)
            near = base.flatten()[pattern.indices.long()]
            mine, wanted = weight.clone(), weight.clone()
            clip_to_base_reference_(wanted, pattern.indices, near, _LIMIT)
            run = lambda: clip_to_base_(mine, pattern.indices, near, _LIMIT)  # noqa: E731
            return Contender(run, [equal_bits("clipped", run(), wanted)], ours=True)

        contenders = {_WHOLE: attempt(whole)}
        for density in densities:
            contenders[f"ours, {percent(density)}"] = attempt(lambda d=density: ours(d))
        return Prepared(contenders, _WHOLE)

    return Case(case_name("clip_to_base", shape, dtype), build)


BENCH = OpBench(
    name="clip_to_base",
    summary="entries clipped to their base values, against a pass over the whole tensor",
    dims=_DIMS,
    shapes={"cuda": ((4096, 4096),), "cpu": ((1024, 1024),), "tiny": ((8, 12),)},
    dtypes=_DTYPES,
    densities=(0.01, 0.1),
    build=clip_case,
)
