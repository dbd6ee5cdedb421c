"""Switching, re-weighting and loading adapters against what composable-sft does.

Both sides hold the same adapters on copies of one model with random weights, embeddings included;
the competitor's diffs lie on the model's device. Before anything is timed, the composed weights
must be as near to the exact sum as the competitor's, untouched entries must keep their bits, and
taking ours off must give the base's bits. How many entries the competitor's round trip leaves
changed is in the figures.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.benchmarking.cases import composable_sft as peer
from sparseft.benchmarking.cases.compose_sides import (
    DTYPES,
    MODELS,
    Active,
    Sides,
    build_model,
    random_adapters,
)
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared, Target, at_most, faster
from sparseft.composition import Composer

__all__ = [
    "DTYPES",
    "MODELS",
    "compose_cases",
    "grid_case",
    "language_case",
    "load_case",
    "switch_case",
]

DENSITY = 0.0276
PEER = "composable-sft"
PEER_HOST = "composable-sft, diffs in host memory"
OURS = "Composer"
FIRST = "Composer, first switch"
COPY = "copy"
FULL = "Adapter.load, full check"
LAZY = "Adapter.load, lazy, all used"
COMPACT = "Adapter.load, compact file, full check"

_COPY_BYTES = 1 << 30
# The grid's coefficients, one pair after the other.
_GRID = ((1.0, 0.25), (1.0, 0.5), (1.0, 0.75), (0.8, 1.0))


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

    def build(device: torch.device) -> Prepared:
        sides = Sides(count, model, dtype, density, device)
        everything = dict.fromkeys(range(count), 1.0)
        checks, facts = sides.checked([everything])
        names = sides.names(everything)

        def ours() -> None:
            sides.composer.switch(names)
            sides.composer.revert()

        def first() -> None:
            composer = Composer(sides.ours, sides.adapters)
            composer.switch(names)
            composer.revert()

        def theirs(diffs: Sequence[peer.Diffs]) -> Callable[[], None]:
            def run() -> None:
                peer.subtract_and_add(sides.theirs, {}, everything, diffs)
                peer.revert(sides.theirs, everything, diffs)

            return run

        moved = sides.bytes_applied(everything) + sides.bytes_restored(everything)
        contenders = {
            PEER: Contender(theirs(sides.diffs), facts=facts),
            OURS: Contender(ours, checks, sides.facts(everything)),
            FIRST: Contender(first, checks, sides.facts(everything)),
        }
        targets = [faster(20, OURS, PEER), _roofline_target(moved)]
        if device.type == "cuda":
            on_host = [peer.as_coo(a, torch.device("cpu")) for a in sides.adapters.values()]
            contenders[PEER_HOST] = Contender(theirs(on_host))
            contenders[COPY] = _copy(device)
        elif model == "xlmr_base":
            limit = 1.0 if count <= 2 else 0.4
            targets = [at_most(limit, OURS, PEER, devices=("cpu",))]
        return _prepared(sides, contenders, targets, {OURS: moved})

    return Case(f"compose/switch{count}/{dtype}/{model}", build)


def language_case(model: str, dtype: str, *, density: float = DENSITY) -> Case:
    """Change from one language to another, the task kept: to and fro, one change at a time."""

    def build(device: torch.device) -> Prepared:
        sides = Sides(3, model, dtype, density, device)
        active: list[Active] = [{0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0}]
        checks, facts = sides.checked(active)
        named = [sides.names(a) for a in active]
        turns = itertools.cycle((1, 0))
        their_turns = itertools.cycle(((1, 2), (2, 1)))
        sides.composer.switch(named[0])
        peer.subtract_and_add(sides.theirs, {}, active[0], sides.diffs)

        def ours() -> None:
            sides.composer.switch(named[next(turns)])

        def theirs() -> None:
            off, on = next(their_turns)  # the task stays
            peer.subtract_and_add(sides.theirs, {off: 1.0}, {on: 1.0}, sides.diffs)

        moved = sides.bytes_applied(active[0]) + sides.bytes_restored(active[1])
        contenders = {
            PEER: Contender(theirs, facts=facts),
            OURS: Contender(ours, checks, sides.facts(active[0])),
        }
        targets = []
        if device.type == "cuda":
            contenders[COPY] = _copy(device)
            targets = [
                Target(
                    f"{OURS}: a language switch in at most 1 ms",
                    lambda timing, _: timing.median(OURS) if OURS in timing.seconds else None,
                    1e-3,
                    False,
                ),
                faster(20, OURS, PEER),
                _roofline_target(moved),
            ]
        return _prepared(sides, contenders, targets, {OURS: moved})

    return Case(f"compose/language/{dtype}/{model}", build)


def grid_case(model: str, dtype: str, *, density: float = DENSITY) -> Case:
    """Give two adapters on the model other coefficients, one pair of a grid after the other."""

    def build(device: torch.device) -> Prepared:
        sides = Sides(2, model, dtype, density, device)
        grid: list[Active] = [dict(enumerate(pair)) for pair in _GRID]
        checks, facts = sides.checked(grid)
        points = itertools.cycle([*grid[1:], grid[0]])
        steps = itertools.cycle(list(zip(grid, [*grid[1:], grid[0]], strict=True)))
        sides.composer.switch(sides.names(grid[0]))
        peer.subtract_and_add(sides.theirs, {}, grid[0], sides.diffs)

        def ours() -> None:
            sides.composer.switch(sides.names(next(points)))

        def theirs() -> None:
            peer.subtract_and_add(sides.theirs, *next(steps), sides.diffs)

        moved = sides.bytes_applied(grid[0])
        contenders = {
            PEER: Contender(theirs, facts=facts),
            OURS: Contender(ours, checks, sides.facts(grid[0])),
        }
        targets = []
        if device.type == "cuda":
            contenders[COPY] = _copy(device)
            targets = [_roofline_target(moved)]
        return _prepared(sides, contenders, targets, {OURS: moved})

    return Case(f"compose/grid/{dtype}/{model}", build)


def load_case(model: str, dtype: str, *, density: float = DENSITY) -> Case:
    """Load two adapters from files of equal content; they lie in the page cache."""

    def build(device: torch.device) -> Prepared:
        shapes = {
            n: p.shape for n, p in build_model(model, torch.device("meta")).named_parameters()
        }
        adapters = random_adapters(2, shapes, DTYPES[dtype], density, torch.device("cpu"))
        folder = Path(tempfile.mkdtemp(prefix="sparseft-bench-"))
        try:
            for name, adapter in adapters.items():
                adapter.save(folder / name)
                adapter.save(folder / f"{name}-compact", compact=True)
                peer.save(adapter, folder / f"{name}.bin")
            sizes = {
                "": _size(folder / name / "adapter.safetensors"),
                "-compact": _size(folder / f"{name}-compact" / "adapter.safetensors"),
                ".bin": _size(folder / f"{name}.bin"),
            }
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

        def ours(suffix: str, check: Any) -> Callable[[], dict[str, Adapter]]:
            def run() -> dict[str, Adapter]:
                loaded = {n: Adapter.load(folder / f"{n}{suffix}", check=check) for n in adapters}
                for adapter in loaded.values():
                    for _ in adapter.values():  # reads and checks what was not yet
                        pass
                return loaded

            return run

        def theirs() -> dict[str, dict[str, Tensor]]:
            return {n: peer.load(folder / f"{n}.bin") for n in adapters}

        weakref.finalize(theirs, shutil.rmtree, folder, ignore_errors=True)
        runs = {FULL: ours("", "full"), LAZY: ours("", "lazy"), COMPACT: ours("-compact", "full")}
        same = _same_content(adapters, theirs())
        contenders = {
            PEER: Contender(theirs, [same], {"bytes per entry": _per(adapters, sizes, ".bin")})
        }
        for name, run in runs.items():
            suffix = "-compact" if name == COMPACT else ""
            wrong = sum(
                not loaded[n].equals(diff)
                for own, loaded in run().items()
                for n, diff in adapters[own].items()
            )
            contenders[name] = Contender(
                run,
                [Check("tensors that differ", float(wrong), 0.0)],
                {"backend": "reference", "bytes per entry": _per(adapters, sizes, suffix)},
            )
        targets = [faster(20, name, PEER, devices=("cpu",)) for name in runs]
        return Prepared(
            contenders,
            PEER,
            clocks=("wall",),
            targets=tuple(targets) if model == "xlmr_base" else (),
            facts={"adapters": 2, "entries each": next(iter(adapters.values())).nnz},
            warmup=1,
            least=3,
        )

    return Case(f"compose/load/{dtype}/{model}", build)


def _size(file: Path) -> int:
    return file.stat().st_size


def _per(adapters: Mapping[str, Adapter], sizes: Mapping[str, int], suffix: str) -> float:
    return sizes[suffix] / list(adapters.values())[-1].nnz


def _same_content(adapters: Mapping[str, Adapter], loaded: dict[str, dict[str, Tensor]]) -> Check:
    wrong = 0
    for own, adapter in adapters.items():
        for name, diff in adapter.items():
            theirs = loaded[own][name]
            at = torch.zeros_like(theirs.indices()[0])
            for size, along in zip(diff.shape, theirs.indices(), strict=True):
                at = at * size + along
            wrong += not torch.equal(at, diff.indices.long())
            wrong += not torch.equal(theirs.values(), diff.values)
    return Check("tensors that differ", float(wrong), 0.0)


def _prepared(
    sides: Sides,
    contenders: dict[str, Contender],
    targets: list[Target],
    moved: Mapping[str, float],
) -> Prepared:
    def derive(timing: Timing, name: str, contender: Contender) -> Facts:
        if name not in moved:
            return {}
        facts: Facts = {"GB/s": moved[name] / timing.median(name) * 1e-9}
        if COPY in timing.seconds:
            facts["% of copy"] = 100 * _of_copy(timing, moved[name])
        return facts

    return Prepared(
        contenders,
        PEER,
        clocks=("device", "wall") if sides.device.type == "cuda" else ("wall",),
        targets=tuple(targets),
        derive=derive,
        facts={
            "tensors": len(list(sides.ours.parameters())),
            "parameters": sum(p.numel() for p in sides.ours.parameters()),
            "adapters": len(sides.adapters),
            "entries each": next(iter(sides.adapters.values())).nnz,
        },
    )


def _copy(device: torch.device) -> Contender:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source))


def _of_copy(timing: Timing, moved: float) -> float:
    return moved / timing.median(OURS) / (2 * _COPY_BYTES / timing.median(COPY))


def _roofline_target(moved: float) -> Target:
    return Target(
        f"{OURS}: at least 70 % of a copy's bandwidth",
        lambda timing, _: _of_copy(timing, moved) if {OURS, COPY} <= set(timing.seconds) else None,
        0.70,
        True,
    )
