"""Loading adapters: our files against composable-sft's, of equal content, in the page cache."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.benchmarking.cases import composable_sft as peer
from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.compose_sides import DTYPES, random_adapters
from sparseft.benchmarking.cases.encoders import DIMS, Model, label_of, parameter_shapes
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.suite import Case, Contender, Prepared, Target, faster

__all__ = ["BENCH", "load_case"]

PEER = "composable-sft"
FULL = "Adapter.load, full check"
LAZY = "Adapter.load, lazy, all used"
COMPACT = "Adapter.load, compact file, full check"

_DENSITY = 0.0276
_ADAPTERS = 2
_XLMR = (12, 768, 250_002)
# What the competitor's lists of Python integers, and their files, need for an entry.
_PEER_BYTES = 96


def load_case(model: str, dtype: str, *, density: float = _DENSITY) -> Case:
    """Load two adapters of a named model."""
    return Case(f"compose/load/{dtype}/{model}", lambda _: _prepared(model, dtype, {"": density}))


def _asked(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    check_shape("load", DIMS, shape)
    check_densities("load", densities)
    torch_dtype("load", dtype, tuple(DTYPES))
    rows = {f", {percent(d)}": d for d in densities}
    return Case(case_name("load", shape, dtype), lambda _: _prepared(shape, dtype, rows))


def _prepared(model: Model, dtype: str, rows: Mapping[str, float]) -> Prepared:
    shapes = parameter_shapes(model)
    most = max(rows.values()) * sum(s.numel() for s in shapes.values())
    require_memory(_ADAPTERS * _PEER_BYTES * most + sum(rows.values()) * 64 * most, "cpu")
    contenders: dict[str, Contender] = {}
    for suffix, density in rows.items():
        found = _contenders(shapes, DTYPES[dtype], density)
        contenders |= {name + suffix: contender for name, contender in found.items()}
    at = next((s for s, d in rows.items() if d == _DENSITY), None)
    targets: tuple[Target, ...] = ()
    if at is not None and model in ("xlmr_base", _XLMR):
        targets = tuple(
            faster(20, name + at, PEER + at, devices=("cpu",)) for name in (FULL, LAZY, COMPACT)
        )
    return Prepared(
        contenders,
        next(iter(contenders)),
        clocks=("wall",),
        targets=targets,
        facts={"adapters": _ADAPTERS, "model": label_of(model)},
        warmup=1,
        least=3,
    )


def _contenders(
    shapes: Mapping[str, torch.Size], dtype: torch.dtype, density: float
) -> dict[str, Contender]:
    adapters = random_adapters(_ADAPTERS, shapes, dtype, density, torch.device("cpu"))
    folder = Path(tempfile.mkdtemp(prefix="sparseft-bench-"))
    try:
        sizes = _write(adapters, folder)
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
    nnz = sum(a.nnz for a in adapters.values())

    def facts(suffix: str) -> dict[str, float]:
        return {"entries": nnz, "bytes per entry": sizes[suffix] / nnz}

    made = {
        PEER: Contender(
            theirs,
            [_same_content(adapters, theirs())],
            facts(".bin"),
            density=density,
            bytes=float(sizes[".bin"]),
        )
    }
    runs = {FULL: ours("", "full"), LAZY: ours("", "lazy"), COMPACT: ours("-compact", "full")}
    for name, run in runs.items():
        suffix = "-compact" if name == COMPACT else ""
        wrong = sum(
            not loaded[n].equals(diff)
            for own, loaded in run().items()
            for n, diff in adapters[own].items()
        )
        made[name] = Contender(
            run,
            [Check("tensors that differ", float(wrong), 0.0)],
            {"backend": "reference", **facts(suffix)},
            ours=True,
            density=density,
            bytes=float(sizes[suffix]),
        )
    return made


def _write(adapters: Mapping[str, Adapter], folder: Path) -> dict[str, int]:
    """Write the three kinds of files and return what they take, by suffix."""
    sizes = dict.fromkeys(("", "-compact", ".bin"), 0)
    for name, adapter in adapters.items():
        adapter.save(folder / name)
        adapter.save(folder / f"{name}-compact", compact=True)
        peer.save(adapter, folder / f"{name}.bin")
        for suffix in ("", "-compact"):
            file = folder / f"{name}{suffix}" / "adapter.safetensors"
            sizes[suffix] += file.stat().st_size
        sizes[".bin"] += (folder / f"{name}.bin").stat().st_size
    return sizes


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


BENCH = OpBench(
    name="load",
    summary="two adapters from files: safetensors, full and lazy and compact, against pickles",
    dims=DIMS,
    shapes={
        "cuda": ((12, 384, 25_000),),
        "cpu": ((2, 256, 4_000),),
        "tiny": ((1, 32, 64),),
    },
    dtypes=("fp32", "bf16", "fp16"),
    densities=(0.01, _DENSITY, 0.1),
    build=_asked,
)
