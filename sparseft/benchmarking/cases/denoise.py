"""Denoising the matrices of an encoder against a loop over them.

Truncated SVDs alone (``svd_plan``), and the whole: differences, SVD, residual pruned. The
competitors are `torch.linalg.svd` and ``torch.svd_lowrank(q=rank + 8, niter=2)``, cut to the rank,
one matrix after the other; their plain pruning stores each residual. Before anything is timed our
residuals must be no larger than those of svd_lowrank for any matrix, and within 1.01 of optimal for
one of each shape; pruned matrices must keep exactly the count of entries.

The density of a row is the share of entries whose residual is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.encoders import Model, label_of, matrix_shapes, random_differences
from sparseft.benchmarking.cases.truncated_svd import (
    LOOSE,
    PROMISED,
    Factors,
    block_flops,
    cut_full,
    cut_lowrank,
    least_left_over,
)
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, worst
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.rotation import Clock
from sparseft.benchmarking.suite import Case, Contender, Prepared, Target, at_most, attempt, faster
from sparseft.denoise import Denoise, denoised
from sparseft.ops import plan_svd, resolve_backend
from sparseft.ops._svd_problem import full_precision

__all__ = [
    "BENCHES",
    "FULL",
    "LOWRANK",
    "OURS",
    "PRUNED",
    "denoise_case",
    "denoise_cases",
    "plan_case",
]

FULL = "loop of torch.linalg.svd"
LOWRANK = "loop of torch.svd_lowrank"
PRUNED = "loop of torch.svd_lowrank, residual pruned"
PLAN = "plan_svd, nothing pruned"
OURS = "ours"

_DIMS = "LAYERSxHIDDENxRANK"
_RESIDUAL = 0.1
# Widths from which the targets are for.
_JUDGED = 384

Matrices = dict[str, Tensor]
Cut = Callable[[Tensor, int], Factors]


def denoise_cases(
    model: str = "xlmr_base",
    *,
    rank: int = 64,
    residual: float = _RESIDUAL,
    clock: Clock = "wall",
) -> list[Case]:
    """Return the two cases on the shapes of a named model's encoder, in fp32."""
    factors = partial(_factors, model, rank, clock, model != "tiny")
    whole = partial(_whole, model, rank, {"": residual}, clock, False)
    return [Case(f"denoise/svd/{model}", factors), Case(f"denoise/whole/{model}", whole)]


def plan_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare truncated SVDs of all matrices."""
    check_shape("svd_plan", _DIMS, shape)
    torch_dtype("svd_plan", dtype, ("fp32",))
    layers, hidden, rank = shape
    build = partial(_factors, (layers, hidden), rank, "wall", hidden >= _JUDGED)
    return Case(case_name("svd_plan", shape, dtype), build)


def denoise_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare denoising all matrices, loops that prune nothing beside."""
    check_shape("denoise", _DIMS, shape)
    check_densities("denoise", densities)
    torch_dtype("denoise", dtype, ("fp32",))
    layers, hidden, rank = shape
    rows = {f", {percent(d)}": d for d in densities}
    build = partial(_whole, (layers, hidden), rank, rows, "wall", True)
    return Case(case_name("denoise", shape, dtype), build)


def _looped(matrices: Matrices, treat: Callable[[Tensor], object]) -> Callable[[], None]:
    def run() -> None:
        for matrix in matrices.values():
            treat(matrix)

    return run


def _numel(model: Model) -> int:
    return sum(m * n for m, n in matrix_shapes(model).values())


# ---- truncated SVDs


def _factors(model: Model, rank: int, clock: Clock, judged: bool, device: torch.device) -> Prepared:
    require_memory(16 * _numel(model), device)
    shapes = matrix_shapes(model)
    deltas = random_differences(shapes.items(), device)
    plan = plan_svd(shapes, rank=rank)
    # the same by default, and what is timed
    left_over = {name: float(found.residual) for name, found in plan.run(deltas.__getitem__)}
    against = {name: _left_over(delta, cut_lowrank(delta, rank)) for name, delta in deltas.items()}
    firsts = {shape: name for name, shape in shapes.items()}.values()
    least = dict(zip(firsts, least_left_over([deltas[n] for n in firsts], rank), strict=True))
    # Of few triplets both find nearly the best, and chance decides who is nearer.
    limit = 1 + 1e-6 if isinstance(model, str) else PROMISED
    checks = [
        worst(
            Check(f"{n}: residual over svd_lowrank's", left_over[n] / against[n], limit)
            for n in shapes
        ),
        *(
            Check(f"{n}: residual over optimal", left_over[n] / best, PROMISED)
            for n, best in least.items()
        ),
    ]

    def loop(cut: Cut, limit: float) -> Contender:
        over = [_left_over(deltas[n], cut(deltas[n], rank)) / best for n, best in least.items()]
        check = Check("residual over optimal", max(over), limit)
        return Contender(_looped(deltas, lambda delta: cut(delta, rank)), [check], bytes=moved)

    def ours() -> None:
        for _ in plan.run(deltas.__getitem__):
            pass

    moved = 4.0 * sum(m * n + rank * (m + n) for m, n in shapes.values())
    mean = float(np.mean([left_over[n] / against[n] for n in shapes]))
    facts = {"residual over svd_lowrank's, mean": mean, "most bytes": plan.bytes}
    flops = block_flops(list(shapes.values()), rank)
    contenders = {
        FULL: attempt(lambda: loop(cut_full, 1 + 1e-4)),
        LOWRANK: attempt(lambda: loop(cut_lowrank, LOOSE)),
        OURS: Contender(ours, checks, facts, ours=True, bytes=moved, flops=flops),
    }
    targets: tuple[Target, ...] = (
        faster(7, OURS, FULL, devices=("cpu",)),
        at_most(1.0, OURS, LOWRANK, devices=("cpu",)),
        faster(50, OURS, FULL),
        faster(3, OURS, LOWRANK),
    )
    return Prepared(
        contenders,
        FULL,
        clocks=(clock,),
        targets=targets if judged else (),
        facts={"model": label_of(model), "matrices": len(shapes), "rank": rank},
        warmup=1,
        least=3,
    )


def _left_over(delta: Tensor, factors: Factors) -> float:
    return float(torch.linalg.vector_norm(delta - _product(factors), dtype=torch.float64))


def _product(factors: Factors) -> Tensor:
    u, s, vh = factors
    with full_precision(u.device):
        return (u * s) @ vh


# ---- the whole


def _whole(
    model: Model,
    rank: int,
    rows: dict[str, float],
    clock: Clock,
    loops: bool,
    device: torch.device,
) -> Prepared:
    """``loops``: whether those that prune nothing stand beside; `torch.linalg.svd` takes long."""
    require_memory(32 * _numel(model), device)
    shapes = matrix_shapes(model)
    deltas = random_differences(shapes.items(), device)
    triples = [(name, delta, torch.zeros_like(delta)) for name, delta in deltas.items()]
    memory = "8GiB" if device.type == "cuda" else "1GiB"
    plan = plan_svd(shapes, rank=rank, memory=memory)
    firsts = list({shape: name for name, shape in shapes.items()}.values())
    least = dict(zip(firsts, least_left_over([deltas[n] for n in firsts], rank), strict=True))

    def over(found: Matrices) -> float:
        lost = {n: torch.linalg.vector_norm((deltas[n] - found[n]).double()) for n in firsts}
        return max(float(lost[n]) / least[n] for n in firsts)

    def planned() -> Matrices:
        found = plan.run(deltas.__getitem__)
        return {name: _product((f.U[0], f.S[0], f.Vh[0])) for name, f in found}

    def loop(cut: Cut, limit: float) -> Contender:
        check = Check(
            "residual over the least there is",
            over({n: _product(cut(deltas[n], rank)) for n in firsts}),
            limit,
        )
        run = _looped(deltas, lambda delta: _product(cut(delta, rank)))
        return Contender(run, [check], {"residual over the least": check.got})

    low = planned()
    near = Check("residual over the least there is", over(low), PROMISED)
    contenders: dict[str, Contender] = {}
    for suffix, share in rows.items():
        how = Denoise(rank=rank, residual=share, memory=memory)
        contenders[PRUNED + suffix] = attempt(partial(_plain, triples, rank, share))
        contenders[OURS + suffix] = attempt(partial(_ours, triples, how, low, near))
        for name in (PRUNED, OURS):
            contenders[name + suffix].density = share
    del low
    baseline = next(iter(contenders))
    if loops:
        contenders[FULL] = attempt(lambda: loop(cut_full, 1 + 1e-4))
        contenders[LOWRANK] = attempt(lambda: loop(cut_lowrank, LOOSE))
        facts = {"residual over the least": near.got}
        contenders[PLAN] = Contender(planned, [near], facts, ours=True)
    for contender in contenders.values():  # both models in, a difference out
        contender.bytes = 12.0 * _numel(model)
    products = block_flops(list(shapes.values()), rank)
    for name, contender in contenders.items():
        if products is not None and name.startswith(OURS):
            contender.flops = products + 2.0 * _numel(model) * rank
    at = next((s for s, d in rows.items() if d == _RESIDUAL), None)
    targets: tuple[Target, ...] = ()
    if loops and at is not None and shapes[firsts[0]][0] >= _JUDGED:
        targets = (faster(50, OURS + at, FULL), faster(3, OURS + at, LOWRANK))
    return Prepared(
        contenders,
        baseline,
        clocks=(clock,),
        targets=targets,
        facts={
            "model": label_of(model),
            "matrices": len(shapes),
            "entries": _numel(model),
            "rank": rank,
        },
        warmup=1,
        least=3,
    )


def _ours(
    triples: list[tuple[str, Tensor, Tensor]], how: Denoise, low: Matrices, near: Check
) -> Contender:
    def ours() -> None:
        for _ in denoised(triples, how):
            pass

    # Zeros were subtracted: what is kept has the matrix's bits.
    wrong = 0
    for (name, value), (_, delta, _) in zip(denoised(triples, how), triples, strict=True):
        rest = (delta - low[name]).abs()
        kept = (value == delta) & (rest > 1e-5 * rest.amax())  # where both agree, nobody can say
        wrong += int(kept.sum()) != how.kept(delta.numel())
    checks = [Check("matrices with another number of entries kept", float(wrong), 0.0), near]
    facts = {"backend": resolve_backend("prune_residual_", triples[0][1])}
    return Contender(ours, checks, facts, ours=True)


def _plain(triples: list[tuple[str, Tensor, Tensor]], rank: int, share: float) -> Contender:
    def theirs() -> None:
        for _, new, old in triples:
            pruned(new - old, cut_lowrank(new - old, rank), share)

    _, delta, _ = triples[0]
    got = pruned(delta, cut_lowrank(delta, rank), share)
    same = int((got == delta).sum())
    # An entry whose residual rounds to nothing has the difference's value, too; ties may be kept.
    excess = abs(same - round(share * delta.numel()))
    limit = 16 + 1e-4 * delta.numel()
    return Contender(theirs, [Check("entries kept too many or too few", float(excess), limit)])


def pruned(delta: Tensor, factors: Factors, residual: float) -> Tensor:
    """Return what `denoised` does, the plain way; the threshold by numpy's partition on a CPU."""
    low = _product(factors)
    rest = (delta - low).abs()
    count = max(1, round(residual * rest.numel()))
    if rest.device.type == "cpu":
        place = rest.numel() - count
        limit = float(np.partition(rest.view(-1).numpy(), place)[place])
    else:
        limit = float(torch.topk(rest.view(-1), count, sorted=False).values.min())
    return torch.where(rest >= limit, delta, low)


_SHAPES = {"cuda": ((12, 768, 64),), "cpu": ((2, 256, 16),), "tiny": ((1, 72, 2),)}

BENCHES = (
    OpBench(
        name="svd_plan",
        summary="truncated SVDs of all matrices of an encoder: batches by shape against loops",
        dims=_DIMS,
        shapes={**_SHAPES, "cuda": ((4, 768, 64),)},
        dtypes=("fp32",),
        densities=(),
        build=plan_case,
    ),
    OpBench(
        name="denoise",
        summary="differences, SVD and pruned residual of an encoder: against loops over matrices",
        dims=_DIMS,
        shapes=_SHAPES,
        dtypes=("fp32",),
        densities=(_RESIDUAL,),
        build=denoise_case,
    ),
)
