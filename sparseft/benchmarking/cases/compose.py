"""Switching and re-weighting adapters against what composable-sft and plain torch do.

All sides hold the same adapters on copies of one model with random weights, embeddings included;
the competitors' diffs lie on the model's device. Before anything is timed, the composed weights
must be as near to the exact sum as the competitor's, untouched entries must keep their bits, and
taking ours off must give the base's bits; competitors must be as near as their roundings let them.
How many entries the competitor's round trip leaves changed is in the figures.

Plain sides: composable-sft's COO adds, `index_add_` tensor by tensor, the same compiled, and dense
task vectors, which cost the same at any density.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.benchmarking.cases import composable_sft as peer
from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.compose_sides import (
    DTYPES,
    Active,
    Add,
    Move,
    Sides,
    walked,
)
from sparseft.benchmarking.cases.encoders import DIMS, Model, parameter_shapes
from sparseft.benchmarking.cases.load import load_case
from sparseft.benchmarking.cases.parts import typical
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.competitors import compiled_for_any_size
from sparseft.benchmarking.limits import require_memory, too_little
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Prepared, Target, at_most, attempt, faster
from sparseft.composition import Composer

__all__ = [
    "BENCHES",
    "compose_case",
    "compose_cases",
    "grid_case",
    "language_case",
    "switch_case",
]

DENSITY = 0.0276
PEER = "composable-sft"
PEER_HOST = "composable-sft, diffs in host memory"
PLAIN = "torch index_add_"
COMPILED = "compiled: index_add_"
DENSE = "dense task vectors"
OURS = "Composer"
FIRST = "Composer, first switch"
COPY = "copy"

_DTYPES = ("bf16", "fp32", "fp16")
_COPY_BYTES = 1 << 30
_XLMR = (12, 768, 250_002)
# The grid's coefficients, one pair after the other.
_GRID = ((1.0, 0.25), (1.0, 0.5), (1.0, 0.75), (0.8, 1.0))


class _Walk(NamedTuple):
    """What is done over and over.

    Args:
        adapters: how many there are.
        start: what lies on the model before the first run.
        runs: units of work, one after the other, the first after the last.
        shown: the compositions that are checked.
    """

    adapters: int
    start: Active
    runs: list[tuple[Move, ...]]
    shown: list[Active]


def compose_cases(
    model: str = "xlmr_base", dtype: str = "fp32", *, density: float = DENSITY
) -> list[Case]:
    """Return all cases on one model: switches of 2 and 8, a language switch, a grid, loading."""
    return [
        switch_case(2, model, dtype, density=density),
        switch_case(8, model, dtype, density=density),
        language_case(model, dtype, density=density),
        grid_case(model, dtype, density=density),
        load_case(model, dtype, density=density),
    ]


def switch_case(count: int, model: str, dtype: str, *, density: float = DENSITY) -> Case:
    """Put ``count`` adapters on the base and take them off again."""
    return _named("switch", count, model, dtype, density)


def language_case(model: str, dtype: str, *, density: float = DENSITY) -> Case:
    """Change from one language to another, the task kept: to and fro, one change at a time."""
    return _named("language", 3, model, dtype, density)


def grid_case(model: str, dtype: str, *, density: float = DENSITY) -> Case:
    """Give two adapters on the model other coefficients, one pair of a grid after the other."""
    return _named("grid", 2, model, dtype, density)


def _named(kind: str, count: int, model: str, dtype: str, density: float) -> Case:
    label = f"{kind}{count}" if kind == "switch" else kind
    build = partial(_build, kind, count, model, dtype, {"": density})
    return Case(f"compose/{label}/{dtype}/{model}", build)


def compose_case(kind: str, shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare ``"switch"``, ``"language"`` or ``"grid"`` on an encoder of that shape."""
    op = f"compose_{kind}"
    check_shape(op, _dims(kind), shape)
    check_densities(op, densities)
    torch_dtype(op, dtype, _DTYPES)
    count = shape[len(DIMS.split("x"))] if kind == "switch" else {"language": 3, "grid": 2}[kind]
    model = shape[: len(DIMS.split("x"))]
    rows = {f", {percent(d)}": d for d in densities}
    build = partial(_build, kind, count, model, dtype, rows)
    return Case(case_name(op, shape, dtype), build)


def _walk(kind: str, count: int) -> _Walk:
    if kind == "switch":
        everything = dict.fromkeys(range(count), 1.0)
        there, back = Move({}, everything, everything), Move(everything, {}, {})
        return _Walk(count, {}, [(there, back)], [everything])
    if kind == "language":
        one, other = {0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0}
        runs = [Move({1: 1.0}, {2: 1.0}, other), Move({2: 1.0}, {1: 1.0}, one)]
        return _Walk(count, one, [(move,) for move in runs], [one, other])
    grid: list[Active] = [dict(enumerate(pair)) for pair in _GRID]
    following = zip(grid, [*grid[1:], grid[0]], strict=True)
    return _Walk(count, grid[0], [(Move(a, b, b),) for a, b in following], grid)


def _build(
    kind: str,
    count: int,
    model: Model,
    dtype: str,
    rows: dict[str, float],
    device: torch.device,
) -> Prepared:
    walk = _walk(kind, count)
    numel = sum(s.numel() for s in parameter_shapes(model).values())
    size = DTYPES[dtype].itemsize
    # per row two models; adapters as indices and values, and as coordinates; beside them a copy of
    # one model, and of its largest tensor what checks need in fp64
    each = sum(2 * size + d * count * (4 + 16 + 2 * size) for d in rows.values())
    require_memory(numel * (each + 2 * size + 8), device)
    contenders: dict[str, Contender] = {}
    made: dict[str, Sides] = {}
    usual = typical(list(rows.values()))
    for suffix, density in rows.items():
        sides = made[suffix] = Sides(walk.adapters, model, dtype, density, device)
        contenders |= _contenders(kind, sides, walk, suffix, density)
        if density == usual:
            contenders[COMPILED + suffix] = compiled_for_any_size(
                _index_add, partial(_index_adds, sides, walk, density), density=density
            )
    sides = next(iter(made.values()))
    if device.type == "cuda" and kind == "switch":
        suffix = next(s for s, d in rows.items() if d == usual)
        contenders[PEER_HOST] = _from_host(made[suffix], walk, usual)
    contenders[DENSE] = attempt(lambda: _dense(sides, walk, numel * size))
    if device.type == "cuda":
        contenders[COPY] = _copy(device)
    suffix = next((s for s, d in rows.items() if d == DENSITY), "")
    return Prepared(
        contenders,
        next(iter(contenders)),
        clocks=("device", "wall") if device.type == "cuda" else ("wall",),
        targets=_targets(kind, count, model, suffix, device, contenders.get(OURS + suffix)),
        facts={
            "tensors": len(list(sides.ours.parameters())),
            "parameters": numel,
            "adapters": count,
            "entries each": next(iter(sides.adapters.values())).nnz,
        },
    )


def _contenders(
    kind: str, sides: Sides, walk: _Walk, suffix: str, density: float
) -> dict[str, Contender]:
    """Return all rows of one density, each where its first run begins."""
    checks, facts = sides.checked(walk.shown)
    active = walk.shown[0]
    moved = sides.bytes_applied(active)
    if kind != "grid":
        moved += sides.bytes_restored(walk.shown[-1])

    def first() -> None:
        composer = Composer(sides.ours, sides.adapters)
        composer.switch(sides.names(active))
        composer.revert()

    made = {
        PEER: _plain(sides.coo(), sides, walk, density),
        PLAIN: _index_adds(sides, walk, density, _index_add),
        OURS: Contender(
            sides.follow(walk.runs),
            checks,
            sides.facts(active),
            ours=True,
            density=density,
            bytes=moved,
        ),
    }
    made[PEER].facts |= facts
    if kind == "switch":
        made[FIRST] = Contender(first, checks, sides.facts(active), ours=True, density=density)
    if walk.start:
        sides.composer.switch(sides.names(walk.start))
    return {name + suffix: contender for name, contender in made.items()}


def _plain(add: Add, sides: Sides, walk: _Walk, density: float | None) -> Contender:
    checks = sides.plain_checks(add, walk.shown[-1])
    for i, coeff in walk.start.items():
        add(i, coeff)
    return Contender(walked(add, walk.runs), checks, density=density)


def _index_adds(
    sides: Sides, walk: _Walk, density: float, each: Callable[..., object]
) -> Contender:
    return _plain(sides.index_adds(each), sides, walk, density)


def _index_add(weight: Tensor, at: Tensor, values: Tensor, coeff: Tensor) -> Tensor:
    return weight.index_add_(0, at, values * coeff)


def _dense(sides: Sides, walk: _Walk, model_bytes: int) -> Contender:
    short = too_little(walk.adapters * model_bytes + (1 << 28), sides.device)
    if short:
        return Contender(skipped=short)
    made = _plain(sides.dense(), sides, walk, None)
    made.bytes = sides.bytes_dense(walk.runs)
    return made


def _from_host(sides: Sides, walk: _Walk, density: float) -> Contender:
    on_host = [peer.as_coo(a, torch.device("cpu")) for a in sides.adapters.values()]

    def add(i: int, coeff: float) -> None:
        peer.subtract_and_add(sides.theirs, {}, {i: coeff}, on_host)

    return _plain(add, sides, walk, density)


def _copy(device: torch.device) -> Contender:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source), bytes=2 * _COPY_BYTES)


def _targets(
    kind: str, count: int, model: Model, suffix: str, device: torch.device, ours: Contender | None
) -> tuple[Target, ...]:
    """For our row of the density they are for, where it is there."""
    if ours is None or ours.bytes is None:
        return ()
    name, against = OURS + suffix, PEER + suffix
    if device.type == "cuda":
        found = [_roofline_target(ours.bytes, name)]
        if kind != "grid":
            found.insert(0, faster(20, name, against))
        if kind == "language":
            quick = "a language switch in at most 1 ms"
            found.insert(0, Target(f"{name}: {quick}", partial(_seconds, name), 1e-3, False))
        return tuple(found)
    if kind == "switch" and model in ("xlmr_base", _XLMR):
        limit = 1.0 if count <= 2 else 0.4
        return (at_most(limit, name, against, devices=("cpu",)),)
    return ()


def _seconds(name: str, timing: Timing, _: object) -> float | None:
    return timing.median(name) if name in timing.seconds else None


def _roofline_target(moved: float, name: str = OURS) -> Target:
    def of_copy(timing: Timing, _: object) -> float | None:
        if not {name, COPY} <= set(timing.seconds):
            return None
        return moved / timing.median(name) / (2 * _COPY_BYTES / timing.median(COPY))

    return Target(f"{name}: at least 70 % of a copy's bandwidth", of_copy, 0.70, True)


def _dims(kind: str) -> str:
    return f"{DIMS}xADAPTERS" if kind == "switch" else DIMS


def _bench(kind: str, summary: str, *, counts: Sequence[int] = ()) -> OpBench:
    def shapes(*models: Shape) -> tuple[Shape, ...]:
        return tuple((*m, n) for m in models for n in counts) if counts else models

    build: Callable[[Shape, tuple[float, ...], str], Case] = partial(compose_case, kind)
    return OpBench(
        name=f"compose_{kind}",
        summary=summary,
        dims=_dims(kind),
        shapes={
            "cuda": shapes(_XLMR),
            "cpu": shapes((2, 256, 4_000))[:1],
            "tiny": shapes((1, 32, 64))[:1],
        },
        dtypes=_DTYPES,
        densities=(0.01, DENSITY, 0.1),
        build=build,
    )


BENCHES = (
    _bench(
        "switch",
        "adapters onto a model and off again: Composer, COO adds, index_add_, dense task vectors",
        counts=(2, 8),
    ),
    _bench("language", "one of two adapters on a model exchanged for another, the other kept"),
    _bench("grid", "two adapters on a model given other coefficients"),
)
