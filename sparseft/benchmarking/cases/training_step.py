"""A whole training step, every way to train a model in one run: time and peak memory.

Ours against dense fine-tuning, dense gradients times 0/1 masks, LoRA and SHiRA with as many trained
entries, and the forward and backward pass of a frozen model, the least that any of them could cost.
`sparseft.profiling.sides` says what each trains. No dropout, so that all see one network. On a GPU
ours steps with SparseAdamW and the others with torch's fused AdamW; on a CPU all have torch's own
choice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.training_gates import Gates, contender_of, short_collections
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Prepared, Target, at_most, attempt
from sparseft.profiling.trained import masked_names
from sparseft.profiling.workload import Way, Workload

__all__ = [
    "BENCHES",
    "DENSE",
    "DENSE_SAME",
    "FROZEN",
    "XLMR",
    "memory_target",
    "name_of",
    "step_case",
    "suite_step",
    "workload_of",
]

_DIMS = "LAYERSxHIDDENxVOCABxBATCHxLENGTH"
_DTYPES = ("fp32", "bf16")
_DENSITIES = (0.001, 0.01, 0.1)
_FAMILIES = {"mlm": "encoder", "classification": "encoder", "causal": "decoder"}

# XLM-R base, for a GPU; the encoder that the committed CPU figures are of.
XLMR = (12, 768, 250_002)
_SMALL = (12, 384, 25_000)
_TINY = (1, 16, 40)
_AT = 0.01

DENSE = "dense fine-tuning"
DENSE_SAME = "dense, the masked matrices only"
FROZEN = "frozen, forward and backward"
_NAMES = {
    ("attached", ""): "ours, {}",
    ("attached", "packed"): "ours, {} in a tenth of the tiles",
    ("gradient_mask", ""): "gradient mask, {}",
    ("lora", ""): "LoRA, as many as {}",
    ("lora", "fp32"): "LoRA, as many as {}, fp32 adapters",
    ("shira", ""): "SHiRA, as many as {}",
    ("dense", ""): DENSE,
    ("dense", "matrices"): DENSE_SAME,
    ("frozen", ""): FROZEN,
}


def name_of(way: Way) -> str:
    """Return what the contender is called: ``ours, 1%``."""
    return _NAMES[way.kind, way.variant].format(percent(way.share))


def workload_of(task: str, shape: Shape, dtype: str, device: torch.device) -> Workload:
    """Return the step of a shape: layers, width, words, sequences, tokens of each."""
    layers, hidden, vocab, batch, length = shape
    return Workload(
        model=f"{_FAMILIES[task]}:{layers}x{hidden}x{vocab}",
        task=task,
        batch=batch,
        length=length,
        dtype=dtype,
        optimizer="sparse_adamw" if device.type == "cuda" else "adamw_torch",
        dropout=False,
    )


def step_case(
    task: str,
    shape: Shape,
    densities: tuple[float, ...] = _DENSITIES,
    dtype: str = "fp32",
    *,
    extras: bool = False,
) -> Case:
    """Compare a step of a shape (`_DIMS`) at some densities.

    Args:
        task: ``"mlm"``, ``"classification"`` (XLM-R's architecture) or ``"causal"`` (Llama's).
        shape: layers, width, words, sequences, tokens of each.
        densities: of the masks; LoRA and SHiRA train as many entries.
        dtype: of weights and activations.
        extras: per density also masks packed into a tenth of the tiles and LoRA with the fp32
            adapters that are PEFT's default.
    """
    op = f"step_{task}"

    def build(device: torch.device) -> Prepared:
        check_shape(op, _DIMS, shape)
        check_densities(op, densities)
        width = torch_dtype(op, dtype, _DTYPES).itemsize
        ways = _ways(densities, extras)
        require_memory(_needed(shape, ways, width), device)
        workload = workload_of(task, shape, dtype, device)
        gates = Gates.of(workload, device)
        with short_collections():
            contenders = {
                name_of(way): attempt(partial(contender_of, workload, way, gates, device))
                for way in ways
            }
        names = masked_names(gates.base.model)
        numel = sum(gates.base.model.get_parameter(name).numel() for name in names)
        return Prepared(
            contenders,
            DENSE,
            clocks=("wall",),
            targets=_targets(task, shape, densities, dtype),
            facts={
                "masked matrices": len(names),
                "candidates": numel,
                "tokens": shape[3] * shape[4],
                "optimizer": workload.optimizer,
            },
            warmup=1,
        )

    return Case(case_name(op, shape, dtype), build, op=op, shape=shape, dtype=dtype)


def suite_step(batch: int, length: int, *, tiny: bool = False) -> Case:
    """Return the case of a GPU's suite: a classifier on XLM-R base in bf16, 1 % trained."""
    model = _TINY if tiny else XLMR
    return step_case("classification", (*model, batch, length), (_AT,), "bf16", extras=True)


def _ways(densities: tuple[float, ...], extras: bool) -> list[Way]:
    ways = [Way("dense"), Way("dense", None, "matrices"), Way("frozen")]
    for density in densities:
        ways += [Way(kind, density) for kind in ("attached", "gradient_mask", "lora", "shira")]
        if extras:
            ways += [Way("attached", density, "packed"), Way("lora", density, "fp32")]
    return ways


def _needed(shape: Shape, ways: list[Way], width: int) -> float:
    """Bytes of all sides together: weights, gradients, two moments, masks; activations roughly."""
    layers, hidden, vocab, batch, length = shape
    entries = 12 * layers * hidden**2 + vocab * hidden
    kept = {"dense": 4.0, "gradient_mask": 5.0}
    # Besides the weights, per trained entry: index, base, diff, gradient, moments.
    each = [kept.get(way.kind, 1.0 + way.share * 6 * (way.density is not None)) for way in ways]
    activations = batch * length * (40 * layers * hidden + 3 * vocab)
    # For the gate: gradients in two widths, and the wider model.
    return entries * width * (sum(each) + 8) + 4 * activations


def memory_target(density: float) -> Target:
    """Peak memory above LoRA's per entry of the mask, at most 30 bytes."""
    mine, other = name_of(Way("attached", density)), name_of(Way("lora", density))

    def measure(timing: Timing, contenders: Any) -> float | None:
        ours, theirs = (contenders[name].facts for name in (mine, other))
        if "peak MB" not in ours or "peak MB" not in theirs:
            return None
        return 1e6 * (ours["peak MB"] - theirs["peak MB"]) / ours["nnz"]

    what = f"{mine}: peak memory above LoRA's, bytes per trained entry"
    return Target(what, measure, 30.0, False)


def _targets(
    task: str, shape: Shape, densities: tuple[float, ...], dtype: str
) -> tuple[Target, ...]:
    """Those that were set: a classifier at 1 %, XLM-R base on a GPU, the small encoder on a CPU."""
    if task != "classification" or _AT not in densities:
        return ()
    ours, lora = name_of(Way("attached", _AT)), name_of(Way("lora", _AT))
    if shape[:3] == XLMR and dtype == "bf16":
        packed = name_of(Way("attached", _AT, "packed"))
        return (
            at_most(1.15, ours, lora),
            at_most(0.7, ours, DENSE),
            at_most(1.0, packed, lora),
            memory_target(_AT),
        )
    if shape == (*_SMALL, 16, 64) and dtype == "fp32":
        masked = name_of(Way("gradient_mask", _AT))
        return (at_most(0.746, ours, masked, devices=("cpu",)),)
    return ()


def _bench(task: str, summary: str, vocab: int) -> OpBench:
    make: Callable[..., Case] = partial(step_case, task)
    return OpBench(
        name=f"step_{task}",
        summary=summary,
        dims=_DIMS,
        shapes={
            "cuda": ((12, 768, vocab, 32, 128),),
            "cpu": ((4, 256, 8000, 4, 64),),
            "tiny": ((*_TINY, 1, 4),),
        },
        dtypes=_DTYPES,
        densities=_DENSITIES,
        build=make,
    )


BENCHES = (
    _bench("mlm", "a training step of an encoder with its language-model head", XLMR[2]),
    _bench("classification", "a training step of an encoder with a classifier", XLMR[2]),
    _bench("causal", "a training step of a decoder", 32_000),
)
