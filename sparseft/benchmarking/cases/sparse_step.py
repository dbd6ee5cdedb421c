"""An optimizer step on masked layers of a Llama against the steps that dense training takes.

Dense: torch's fused step on every weight, with and without the mask multiplied into the gradient
(gradient-mask fine-tuning). Over the leaves: what any torch optimizer does with attached masks, its
step and then a hook that writes the weights. All in one dtype but our leaves and moments, which are
fp32. As many of the layers as memory holds; nothing is extrapolated to the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.parts import typical
from sparseft.benchmarking.cases.step_sides import (
    ADAMW,
    LION,
    SGD,
    Dense,
    Masked,
    Rule,
    draw_weights,
)
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, as_accurate, worst
from sparseft.benchmarking.competitors import compiled
from sparseft.benchmarking.limits import memory_free, require_memory
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Prepared, Target, attempt, faster
from sparseft.ops import resolve_backend

__all__ = ["BENCHES", "COPY", "dense_name", "sparse_step_case"]

_RULES = {"sparse_step": ADAMW, "sparse_step_lion": LION, "sparse_step_sgd": SGD}
_DIMS = "LAYERSxHIDDENxINNER"
# Moments in fp16 lose small gradients: no one trains so.
_DTYPES = ("fp32", "bf16")
_DENSITIES = (0.0005, 0.001, 0.01, 0.1)
_COPY_BYTES = 1 << 30
# On a GPU, left free: the buffers of the copy and of the L2 flush, and the checks' temporaries.
_SPARE_BYTES = 8 << 30

COPY = "copy"


def dense_name(rule: Rule) -> str:
    """Return the baseline's name."""
    return f"dense: torch {rule.label}"


def sparse_step_case(
    op: str,
    shape: tuple[int, int, int],
    dtype: str,
    densities: tuple[float, ...] = _DENSITIES,
) -> Case:
    """Compare steps of one rule.

    Args:
        op: ``sparse_step`` (AdamW), ``sparse_step_lion`` or ``sparse_step_sgd``.
        shape: layers, hidden width, width of the MLP; 32, 4096 and 11008 in Llama-7B.
        dtype: of weights, of dense gradients and of dense moments.
        densities: of the masks.
    """
    layers, hidden, inner = shape
    shapes = ((hidden, hidden),) * 4 + ((inner, hidden),) * 2 + ((hidden, inner),)
    rule = _RULES[op]

    def build(device: torch.device) -> Prepared:
        kind = torch_dtype(op, dtype, _DTYPES)
        numel = sum(rows * cols for rows, cols in shapes)
        count = _layers_that_fit(numel * _bytes_each(rule, kind, densities), layers, device)
        generator = torch.Generator(device).manual_seed(0)
        weights = draw_weights(shapes * count, kind, generator)
        middle = typical(densities)
        contenders: dict[str, Contender] = {}
        for density in densities:  # one after the other: each finds the weights as the last left
            side = Masked(weights, density, rule)
            contenders |= _masked_sides(side, density)
            if density == middle:
                name = f"compiled: {rule.label} over the leaves, {percent(middle)}"
                contenders[name] = attempt(partial(_compiled_side, side, density))
                drawn = draw_weights(shapes * count, kind, generator)
                dense = Dense(drawn, side.patterns, rule)
        contenders = _dense_sides(dense) | contenders | {COPY: _copy(device)}

        def derive(timing: Timing, name: str, contender: Contender) -> dict[str, float]:
            entries = contender.facts.get("nnz") or contender.facts.get("entries")
            return {"ps per entry": timing.median(name) / entries * 1e12} if entries else {}

        return Prepared(
            contenders,
            dense_name(rule),
            clocks=("device", "wall"),
            targets=_targets(dtype) if rule is ADAMW else (),
            derive=derive,
            facts={"layers": count, "of": layers, "entries": dense.numel},
        )

    return Case(case_name(op, shape, dtype), build)


def _bytes_each(rule: Rule, dtype: torch.dtype, densities: tuple[float, ...]) -> float:
    """Bytes per entry of a layer: dense parameter, gradient, moments and mask; the masked weight;
    per masked entry index, base, diff, gradient, its start in a check, moments of two optimizers.
    """
    masked = 4 + dtype.itemsize + 3 * 4 + 2 * 4 * rule.moments
    compiled_too = typical(densities) * (8 + dtype.itemsize + 4 + 4 * rule.moments)
    whole = dtype.itemsize * (2 + rule.moments) + 1 + dtype.itemsize
    return whole + sum(densities) * masked + compiled_too


def _layers_that_fit(layer: float, wanted: int, device: torch.device) -> int:
    spare = _SPARE_BYTES if device.type == "cuda" else 0
    require_memory(layer + spare, device)
    return max(1, min(wanted, int((0.95 * memory_free(device) - spare) // layer)))


def _dense_sides(dense: Dense) -> dict[str, Contender]:
    rule, numel = dense.rule, dense.numel
    # gradient in; parameter and moments in and out; a mask has a byte for each entry
    moved = numel * dense.parameters[0].element_size() * (1 + 2 * (1 + rule.moments))
    facts = {"entries": numel}
    masked = dense.check(masked=True)
    for p in dense.parameters:  # what the mask took away
        if p.grad is not None:
            p.grad.normal_(generator=dense.generator)
    plain = dense.check(masked=False)
    name = f"dense, gradient times mask: torch {rule.label}"
    return {
        dense_name(rule): Contender(dense.step, plain, facts, bytes=moved),
        name: Contender(dense.masked_step, masked, facts, bytes=moved + numel),
    }


def _masked_sides(side: Masked, density: float) -> dict[str, Contender]:
    rule, moved = side.rule, side.bytes_moved()
    ours, theirs = rule.ours(side.leaves), rule.theirs(side.leaves)
    backend = resolve_backend("sparse_step_", side.leaves[0])
    names = {"backend": backend, "nnz": side.nnz, "bytes per entry": moved / side.nnz}
    checks = side.check(ours, rule.decay)
    theirs.param_groups[0]["weight_decay"] = rule.decay
    hooked = side.check(theirs, rule.decay)
    side.before.clear()
    return {
        f"torch {rule.label} over the leaves, {percent(density)}": Contender(
            theirs.step, hooked, {"nnz": side.nnz}, density=density, bytes=moved
        ),
        f"ours, {percent(density)}": Contender(
            ours.step, checks, names, ours=True, density=density, bytes=moved
        ),
    }


def _compiled_side(side: Masked, density: float) -> Contender:
    """Entry by entry of the list of tensors; equal counts share what is compiled."""
    runs = []
    for operands in side.entries():
        diff, grad, moments, base, weight, at = operands
        theirs = side.rule.entry(
            diff.clone(), grad, [m.clone() for m in moments], base, weight, at
        )  # fmt: skip
        exact = side.rule.entry(
            diff.double(), grad.double(), [m.double() for m in moments], base, weight, at
        )
        made = compiled(
            side.rule.entry,
            *operands,
            check=partial(_as_accurate, theirs, exact),
            density=density,
        )
        if made.run is None:
            return made
        runs.append(made)
    checks = [worst(check for made in runs for check in made.checks)]
    steps = [made.run for made in runs if made.run is not None]

    def run() -> None:
        for step in steps:
            step()

    return Contender(run, checks, {"nnz": side.nnz}, density=density, bytes=side.bytes_moved())


def _as_accurate(theirs: Tensor, exact: Tensor, got: Tensor) -> list[Check]:
    return [as_accurate("diff", got, theirs, exact)]


def _copy(device: torch.device) -> Contender:
    length = _COPY_BYTES if device.type == "cuda" else 1 << 20
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source), bytes=2 * length)


def _targets(dtype: str) -> tuple[Target, ...]:
    ours = f"ours, {percent(0.01)}"

    def of_copy(timing: Timing, contenders: Mapping[str, Contender]) -> float | None:
        speeds = []
        for name in (ours, COPY):
            moved = contenders[name].bytes if name in contenders else None
            if name not in timing.seconds or moved is None:
                return None
            speeds.append(moved / timing.median(name))
        return speeds[0] / speeds[1]

    targets = [Target(f"{ours}: at least 70 % of the copy's bandwidth", of_copy, 0.70, True)]
    if dtype == "fp32":
        targets.append(faster(15, ours, dense_name(ADAMW)))
    return tuple(targets)


def _bench(op: str, summary: str) -> OpBench:
    def build(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
        check_shape(op, _DIMS, shape)
        check_densities(op, densities)
        layers, hidden, inner = shape
        return sparse_step_case(op, (layers, hidden, inner), dtype, densities)

    return OpBench(
        name=op,
        summary=summary,
        dims=_DIMS,
        shapes={
            "cuda": ((32, 4096, 11008),),
            "cpu": ((1, 512, 1376),),
            "tiny": ((1, 96, 128),),
        },
        dtypes=_DTYPES,
        densities=_DENSITIES,
        build=build,
    )


BENCHES = (
    _bench("sparse_step", "an AdamW step on masked layers against fused dense and masked AdamW"),
    _bench("sparse_step_lion", "a Lion step on masked layers against dense and masked Lion"),
    _bench("sparse_step_sgd", "an SGD step with momentum on masked layers against fused dense SGD"),
)
