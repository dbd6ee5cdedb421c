"""The exact k largest ``|theta1 - theta0|`` of many tensors, and of one: against ``torch.topk``.

The competitors concatenate the differences in fp32, as whoever has no such op would; numpy keeps
ties at the threshold, more than were asked for. Bytes are one read of both models: what kernels or
sorts move besides is their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.encoders import DIMS, parameter_shapes
from sparseft.benchmarking.cases.parts import typical
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.competitors import compiled, compiled_for_any_size
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared, attempt
from sparseft.ops import TopK, resolve_backend, topk_differences, topk_single

__all__ = ["BENCHES", "single_case", "topk_case"]

TORCH = "torch.topk on the concatenation"
COMPILED = "compiled: differences; torch.topk on the concatenation"
NUMPY = "numpy.partition of the concatenation"
OURS = "ours"

_DTYPES = ("bf16", "fp32", "fp16")
_DENSITIES = (0.01, 0.1)
_SINGLE_DIMS = "ROWSxCOLUMNS"

Pairs = list[tuple[str, Tensor, Tensor]]


def topk_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare on all parameters of an encoder."""
    check_shape("topk", DIMS, shape)
    check_densities("topk", densities)
    kind = torch_dtype("topk", dtype, _DTYPES)

    def build(device: torch.device) -> Prepared:
        shapes = list(parameter_shapes(shape).values())
        numel = sum(s.numel() for s in shapes)
        # both models; differences, their concatenation, what is chosen of it with int64 positions
        require_memory(numel * (2 * kind.itemsize + 8 + 12 * (1 + 2 * max(densities))), device)
        pairs = _pairs(shapes, kind, device)
        contenders: dict[str, Contender] = {}
        for density in densities:
            made = _contenders(pairs, max(1, round(density * numel)), density)
            if density == typical(densities):
                made[COMPILED] = partial(_compiled, pairs, max(1, round(density * numel)), density)
            for name, make in made.items():
                contender = contenders[f"{name}, {percent(density)}"] = attempt(make)
                contender.density, contender.bytes = density, 2.0 * numel * kind.itemsize
        facts = {"entries": numel, "tensors": len(pairs)}
        return Prepared(contenders, next(iter(contenders)), facts=facts, warmup=1)

    return Case(case_name("topk", shape, dtype), build)


def _contenders(pairs: Pairs, k: int, density: float) -> dict[str, Callable[[], Contender]]:
    device = pairs[0][1].device
    tensors = [t for _, *pair in pairs for t in pair]
    wanted = topk_differences(pairs, k, backend="reference")
    edge = _edge(pairs, wanted)

    def ours() -> Contender:
        run = partial(topk_differences, pairs, k)
        got, extra = _with_peak(run, device)
        facts = {"backend": resolve_backend("topk_differences", *tensors), "k": k, **extra}
        return Contender(run, [_same(got, wanted)], facts, ours=True)

    def sorting() -> Contender:
        return _torch_topk(pairs, k, edge, _absolute)

    def partition() -> Contender:
        if device.type != "cpu":
            return Contender(skipped="numpy works in the host's memory")

        def run() -> Tensor:
            every = _concatenated(pairs, _absolute).numpy()
            place = every.size - k
            return torch.from_numpy(np.flatnonzero(every >= np.partition(every, place)[place]))

        got = run()
        return Contender(run, _chosen(pairs, got, k, edge, ties=True), {"kept": got.numel()})

    return {TORCH: sorting, NUMPY: partition, OURS: ours}


def _compiled(pairs: Pairs, k: int, density: float) -> Contender:
    edge = _edge(pairs, topk_differences(pairs, k, backend="reference"))
    return compiled_for_any_size(_absolute, partial(_torch_topk, pairs, k, edge), density=density)


def _torch_topk(
    pairs: Pairs, k: int, edge: float, absolute: Callable[[Tensor, Tensor], Tensor]
) -> Contender:
    def run() -> Tensor:
        return torch.topk(_concatenated(pairs, absolute), k, sorted=False).indices

    got, extra = _with_peak(run, pairs[0][1].device)
    return Contender(run, _chosen(pairs, got, k, edge), extra)


def _absolute(after: Tensor, before: Tensor) -> Tensor:
    return (after.float() - before.float()).abs_()


def _concatenated(pairs: Pairs, absolute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return torch.cat([absolute(a, b).view(-1) for _, a, b in pairs])


def _pairs(shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> Pairs:
    generator = torch.Generator(device).manual_seed(0)
    pairs = []
    for number, shape in enumerate(shapes):
        before = torch.randn(shape, device=device, generator=generator).mul_(0.02)
        moved = torch.randn(shape, device=device, generator=generator).mul_(1e-3).add_(before)
        pairs.append((f"{number:03d}", moved.to(dtype), before.to(dtype)))
    return pairs


def _with_peak(run: Callable[[], Any], device: torch.device) -> tuple[Any, Facts]:
    """Return a second run's result and, on GPUs, the most memory it held beyond what was there."""
    if device.type != "cuda":
        return run(), {}
    run()  # compiles
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    return result, {"peak extra MB": (torch.cuda.max_memory_allocated(device) - before) / 1e6}


def _same(got: TopK, wanted: TopK) -> Check:
    """Exactly the reference's entries, its ties included."""
    names = set(got.patterns) ^ set(wanted.patterns)
    shared = set(got.patterns) & set(wanted.patterns)
    wrong = [n for n in shared if not got.patterns[n].equals(wanted.patterns[n])]
    return Check("tensors with other entries", float(len(names) + len(wrong)), 0.0)


def _edge(pairs: Pairs, wanted: TopK) -> float:
    """Return the smallest difference that is kept."""
    kept = [
        _absolute(a, b).view(-1)[wanted.patterns[name].indices.long()]
        for name, a, b in pairs
        if name in wanted.patterns
    ]
    return float(torch.cat(kept).min())


def _chosen(pairs: Pairs, at: Tensor, k: int, edge: float, *, ties: bool = False) -> list[Check]:
    """As many as were asked for, those at the threshold aside, and none below it."""
    sizes = _concatenated(pairs, _absolute)
    wanted = int((sizes >= edge).sum()) if ties else k
    return [
        Check("entries too many or too few", float(abs(torch.unique(at).numel() - wanted)), 0.0),
        Check("entries below the threshold", float((sizes[at] < edge).sum()), 0.0),
    ]


# ---- one tensor


def single_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare on one matrix of scores, over all of it and row by row."""
    check_shape("topk_single", _SINGLE_DIMS, shape)
    check_densities("topk_single", densities)
    kind = torch_dtype("topk_single", dtype, _DTYPES)
    rows, columns = shape

    def build(device: torch.device) -> Prepared:
        require_memory(rows * columns * (3 * kind.itemsize + 24), device)
        generator = torch.Generator(device).manual_seed(0)
        scores = torch.randn(shape, device=device, generator=generator).to(kind).abs_()
        contenders: dict[str, Contender] = {}
        for density in densities:
            for per_row in (False, True):
                count = max(1, round(density * (columns if per_row else rows * columns)))
                compile_too = density == typical(densities) and not per_row
                for name, make in _single(scores, count, per_row, compile_too).items():
                    label = f"{name}{' per row' if per_row else ''}, {percent(density)}"
                    made = contenders[label] = attempt(make)
                    made.density, made.bytes = density, float(scores.numel() * kind.itemsize)
                    made.work = "per row" if per_row else ""
        return Prepared(contenders, next(iter(contenders)), facts={"entries": scores.numel()})

    return Case(case_name("topk_single", shape, dtype), build)


def _single(
    scores: Tensor, k: int, per_row: bool, compile_too: bool
) -> dict[str, Callable[[], Contender]]:
    groups = scores if per_row else scores.view(1, -1)
    wanted = topk_single(scores, k, per_row=per_row, backend="reference")
    smallest = torch.topk(groups.float(), k, dim=1).values[:, -1:]

    def check(found: Tensor) -> list[Check]:
        values = groups.gather(1, found)
        unlike = found.sort(dim=1).values.diff(dim=1).eq(0).sum()
        return [
            Check("entries below the threshold", float((values < smallest).sum()), 0.0),
            Check("entries twice, or too few", float(unlike) + abs(found.shape[1] - k), 0.0),
        ]

    def sort(given: Tensor) -> Tensor:
        return torch.topk(given, k, dim=1, sorted=False).indices

    def torch_topk() -> Contender:
        run = partial(sort, groups)
        return Contender(run, check(run()))

    def partition() -> Contender:
        if scores.device.type != "cpu":
            return Contender(skipped="numpy works in the host's memory")

        def run() -> Tensor:
            keys = groups.float().numpy()
            return torch.from_numpy(np.argpartition(keys, -k, axis=1)[:, -k:])

        return Contender(run, check(run()))

    def ours() -> Contender:
        run = partial(topk_single, scores, k, per_row=per_row)
        got = run()
        # the best of each row have no kernel
        backend = "reference" if per_row else resolve_backend("topk_single", scores)
        facts = {"backend": backend, "k": k}
        return Contender(
            run, [Check("other entries", float(not got.equals(wanted)), 0.0)], facts, ours=True
        )

    made = {"torch.topk": torch_topk, "numpy.argpartition": partition, OURS: ours}
    if compile_too:
        made["compiled: torch.topk"] = partial(compiled, sort, groups, check=check)
    return made


BENCHES = (
    OpBench(
        name="topk",
        summary="the k largest differences of all tensors of a model: one pass, against a sort",
        dims=DIMS,
        shapes={
            "cuda": ((12, 768, 250_002), (8, 4096, 32_000)),
            "cpu": ((2, 256, 4_000),),
            "tiny": ((1, 32, 64),),
        },
        dtypes=_DTYPES,
        densities=_DENSITIES,
        build=topk_case,
    ),
    OpBench(
        name="topk_single",
        summary="the k largest scores of a matrix, and of each of its rows, against torch.topk",
        dims=_SINGLE_DIMS,
        shapes={
            "cuda": ((4096, 4096), (250_002, 768)),
            "cpu": ((1024, 1024),),
            "tiny": ((50, 40),),
        },
        dtypes=_DTYPES,
        densities=_DENSITIES,
        build=single_case,
    ),
)
