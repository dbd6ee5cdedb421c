"""The exact k largest ``|theta1 - theta0|`` of many tensors against ``torch.topk`` on all of them.

The competitor concatenates the differences in fp32, as whoever has no such op would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared
from sparseft.ops import TopK, resolve_backend, topk_differences

__all__ = ["LLAMA", "SMALL", "XLMR", "topk_case"]

_DENSITY = 0.01
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_LAYER = ((768, 768),) * 4 + ((3072, 768), (768, 3072)) + ((768,),) * 9 + ((3072,),)
XLMR = ((250_002, 768), (514, 768), *_LAYER * 12)
LLAMA = (*((4096, 4096),) * 4, *((11008, 4096),) * 2, (4096, 11008)) * 8
SMALL = ((50, 16), (16, 16), (16,), (24, 16))


def topk_case(label: str, shapes: tuple[tuple[int, ...], ...], dtype: str) -> Case:
    """Compare on tensors of these shapes, k = 1 %."""

    def build(device: torch.device) -> Prepared:
        pairs = _pairs(shapes, _DTYPES[dtype], device)
        numel = sum(t.numel() for _, t, _ in pairs)
        k = max(1, round(_DENSITY * numel))

        def ours() -> TopK:
            return topk_differences(pairs, k)

        def theirs() -> Tensor:
            every = [(a.float() - b.float()).abs_().view(-1) for _, a, b in pairs]
            return torch.topk(torch.cat(every), k, sorted=False).indices

        wanted = topk_differences(pairs, k, backend="reference")
        got, extra = _with_peak(ours, device)
        tensors = [t for _, *pair in pairs for t in pair]
        contenders = {
            "torch.topk": _competitor(theirs, device),
            "topk_differences": Contender(
                ours,
                [_same(got, wanted)],
                {"backend": resolve_backend("topk_differences", *tensors), **extra},
            ),
        }
        # Both models, twice: the kernels count, then collect. What torch moves besides is its own.
        moved = 2.0 * sum(t.numel() * t.element_size() for t in tensors)

        def derive(timing: Timing, name: str, contender: Contender) -> Facts:
            return {"two reads of both, GB/s": moved / timing.median(name) * 1e-9}

        facts = {"entries": numel, "k": k, "tensors": len(pairs)}
        return Prepared(contenders, "torch.topk", derive=derive, facts=facts)

    return Case(f"topk/{label}/{dtype}", build)


def _pairs(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
) -> list[tuple[str, Tensor, Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    pairs = []
    for number, shape in enumerate(shapes):
        before = torch.randn(shape, device=device, generator=generator).mul_(0.02)
        moved = torch.randn(shape, device=device, generator=generator).mul_(1e-3).add_(before)
        pairs.append((f"{number:03d}", moved.to(dtype), before.to(dtype)))
    return pairs


def _with_peak(run: Callable[[], Any], device: torch.device) -> tuple[Any, Facts]:
    """Return a second run's result and, on GPUs, the most memory it held beyond what was there."""
    run()  # compiles
    if device.type != "cuda":
        return run(), {}
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    return result, {"peak extra MB": (torch.cuda.max_memory_allocated(device) - before) / 1e6}


def _competitor(run: Callable[[], Any], device: torch.device) -> Contender:
    try:
        _, extra = _with_peak(run, device)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return Contender(skipped=f"out of memory: {str(error).partition('.')[0]}")
    return Contender(run, facts=extra)


def _same(got: TopK, wanted: TopK) -> Check:
    """Exactly the reference's entries, its ties included."""
    names = set(got.patterns) ^ set(wanted.patterns)
    shared = set(got.patterns) & set(wanted.patterns)
    wrong = [n for n in shared if not got.patterns[n].equals(wanted.patterns[n])]
    return Check("tensors with other entries", float(len(names) + len(wrong)), 0.0)
