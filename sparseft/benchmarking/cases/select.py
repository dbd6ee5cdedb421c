"""Choosing entries of all weights of a model against composable-sft's list and partition.

It extends one Python list by all ``|theta1 - theta0|``, hands it to `numpy.partition`, and keeps
what is at or above the threshold. `torch.topk` on the concatenation stands beside. Ours must keep
exactly the count, nothing below the threshold, and only what the competitor's masks hold. Extra
memory is the process's own peak (Linux), each side run alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.denoise import pruned
from sparseft.benchmarking.cases.encoders import (
    DIMS,
    Model,
    build_model,
    parameter_shapes,
)
from sparseft.benchmarking.cases.truncated_svd import block_flops, cut_lowrank
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.limits import require_memory, too_little
from sparseft.benchmarking.rotation import Clock, Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared, Target, attempt, faster
from sparseft.selection import Masks, select

__all__ = [
    "BENCH",
    "DENOISED",
    "LOOP",
    "MAGNITUDE",
    "PEER",
    "TORCH",
    "extra_bytes",
    "list_and_partition",
    "select_case",
]

PEER = "composable-sft, list and partition"
TORCH = "torch.topk on the concatenation"
MAGNITUDE = "select, magnitude"
DENOISED = "select, deltas_svd, embeddings passed"
LOOP = "loop of torch.svd_lowrank, residual pruned, torch.topk"
MEMORY = "extra bytes"

Pairs = Mapping[str, tuple[Tensor, Tensor]]

_DENSITY = 0.0276
_RANK = 64
_RESIDUAL = 0.1  # what deltas_svd keeps unless asked
_UNLIKE = 0.25  # two random selections share the density alone
_XLMR = (12, 768, 250_002)
# What the competitor needs for each entry while its list grows: 15.6 GB were measured for 278 M.
_PEER_BYTES = 2 * 32
# Its list takes about 50 ns an entry and step: above this beside a GPU, a run takes a minute.
_PEER_MOST = 50_000_000


def select_case(
    model: str = "xlmr_base",
    *,
    density: float = _DENSITY,
    rank: int = _RANK,
    clock: Clock = "wall",
) -> Case:
    """Compare on a named model of random weights, each moved by a random step."""
    return Case(f"select/{model}", partial(_build, model, {"": density}, rank, clock))


def _asked(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    check_shape("select", DIMS, shape)
    check_densities("select", densities)
    torch_dtype("select", dtype, ("fp32",))
    # a twelfth of the width, as 64 of 768
    rank = max(1, shape[1] // 12)
    rows = {f", {percent(d)}": d for d in densities}
    return Case(case_name("select", shape, dtype), partial(_build, shape, rows, rank, "wall"))


def _build(
    model: Model, rows: Mapping[str, float], rank: int, clock: Clock, device: torch.device
) -> Prepared:
    numel = sum(s.numel() for s in parameter_shapes(model).values())
    # both models, a difference, the masks of the competitor; what a selection holds
    require_memory(numel * (8 + 4 + 1 + 32 * max(rows.values())), device)
    tuned = build_model(model, device)
    base = _moved(tuned)
    pairs = {n: (p.detach(), base[n]) for n, p in tuned.named_parameters()}
    contenders: dict[str, Contender] = {}
    for suffix, density in rows.items():
        sides = _Sides(tuned, base, pairs, round(density * numel), rank)
        found = sides.contenders(numel, device)
        found[DENOISED].flops = block_flops(sides.matrices(), rank)
        for name, contender in found.items():
            contender.density, contender.bytes = density, 8.0 * numel
            contender.work = "deltas_svd" if name in (DENOISED, LOOP) else "magnitude"
            contenders[name + suffix] = contender
    names = list(rows)
    first = f"{PEER}{names[0]}"
    at = next((s for s, d in rows.items() if d == _DENSITY), names[0])
    return Prepared(
        contenders,
        first if not contenders[first].skipped else f"{TORCH}{names[0]}",
        clocks=(clock,),
        targets=_targets(at) if model in ("xlmr_base", _XLMR) else (),
        derive=_per_parameter(numel),
        facts={"parameters": numel, "kept": [round(d * numel) for d in rows.values()]},
        warmup=0,
        least=3,
    )


def _decomposed(name: str, shape: torch.Size) -> bool:
    return len(shape) == 2 and "embeddings" not in name


def _targets(at: str) -> tuple[Target, ...]:
    name = MAGNITUDE + at
    return (
        faster(20, name, PEER + at, devices=("cpu",)),
        Target(
            f"{name}: at most 1 GB of extra memory",
            lambda _, found: found[name].facts.get(MEMORY),
            1e9,
            False,
            ("cpu",),
        ),
    )


class _Sides:
    """The contenders of one density, each run alone once before it is timed."""

    def __init__(
        self, tuned: nn.Module, base: dict[str, Tensor], pairs: Pairs, nnz: int, rank: int
    ) -> None:
        self.tuned, self.base, self.pairs = tuned, base, pairs
        self.nnz, self.rank = nnz, rank
        self.masks: dict[str, Tensor] | None = None
        self.looped: Tensor | None = None

    def contenders(self, numel: int, device: torch.device) -> dict[str, Contender]:
        short = too_little(_PEER_BYTES * numel, "cpu")
        if device.type != "cpu" and numel > _PEER_MOST:
            short = f"its list of {numel:,} Python floats takes a minute; it is measured on CPUs"
        made = {PEER: Contender(skipped=short) if short else attempt(self.peer)}
        made[TORCH] = attempt(self.topk)
        made[MAGNITUDE] = attempt(self.magnitude)
        made[LOOP] = attempt(self.loop)
        made[DENOISED] = attempt(self.denoised)
        self.masks = self.looped = None
        return made

    def peer(self) -> Contender:
        run = partial(list_and_partition, self.pairs, self.nnz)
        self.masks, size = extra_bytes(run)
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        # all that ties with the last one stays
        few = Check("entries too few", float(self.nnz - kept), 0.0)
        return Contender(run, [few], {**_memory(size), "kept": kept})

    def topk(self) -> Contender:
        def run() -> Tensor:
            every = torch.cat([(new - old).abs().view(-1) for new, old in self.pairs.values()])
            return torch.topk(every, self.nnz, sorted=False).indices

        at, size = extra_bytes(run)
        chosen = torch.zeros(
            sum(new.numel() for new, _ in self.pairs.values()), dtype=torch.bool, device=at.device
        )
        chosen[at] = True
        parts = chosen.split([new.numel() for new, _ in self.pairs.values()])
        found = dict(zip(self.pairs, (part.nonzero().view(-1) for part in parts), strict=True))
        return Contender(run, self.checks(found), _memory(size))

    def magnitude(self) -> Contender:
        def run() -> Masks:
            return select(self.tuned, "magnitude", nnz=self.nnz, base=self.base)

        chosen, size = extra_bytes(run)
        found = {name: pattern.indices.long() for name, pattern in chosen.items()}
        return Contender(run, self.checks(found), _memory(size), ours=True)

    def denoised(self) -> Contender:
        def run() -> Masks:
            return select(
                self.tuned,
                "deltas_svd",
                nnz=self.nnz,
                base=self.base,
                rank=self.rank,
                embeddings="pass",
            )

        chosen, size = extra_bytes(run)
        checks = [Check("entries too many or too few", float(abs(chosen.nnz - self.nnz)), 0.0)]
        if self.looped is not None:
            shared = self.mask_of({n: p.indices.long() for n, p in chosen.items()})[self.looped]
            # Factors of both are approximate, and so is who lies just above the threshold.
            lost = 1 - float(shared.sum()) / self.nnz
            checks.append(Check("share of entries that the loop does not choose", lost, _UNLIKE))
        return Contender(run, checks, _memory(size) | {"rank": self.rank}, ours=True)

    def loop(self) -> Contender:
        matrices = {n for n, (new, _) in self.pairs.items() if _decomposed(n, new.shape)}

        def treated(name: str, delta: Tensor) -> Tensor:
            if name not in matrices or self.rank >= min(delta.shape):
                return delta
            return pruned(delta, cut_lowrank(delta, self.rank), _RESIDUAL)

        def run() -> Tensor:
            parts = [treated(n, new - old) for n, (new, old) in self.pairs.items()]
            every = torch.cat([part.abs().reshape(-1) for part in parts])
            return torch.topk(every, self.nnz, sorted=False).indices

        self.looped, size = extra_bytes(run)
        few = Check("entries too few", float(self.nnz - torch.unique(self.looped).numel()), 0.0)
        return Contender(run, [few], _memory(size) | {"rank": self.rank})

    def matrices(self) -> list[tuple[int, int]]:
        """Return the shapes that ``deltas_svd`` decomposes."""
        found = (new.shape for n, (new, _) in self.pairs.items() if _decomposed(n, new.shape))
        return [(m, n) for m, n in found]

    def mask_of(self, chosen: Mapping[str, Tensor]) -> Tensor:
        """Return True at chosen entries of all tensors, one after the other."""
        parts = []
        for name, (new, _) in self.pairs.items():
            part = torch.zeros(new.numel(), dtype=torch.bool, device=new.device)
            if name in chosen:
                part[chosen[name]] = True
            parts.append(part)
        return torch.cat(parts)

    def checks(self, chosen: Mapping[str, Tensor]) -> list[Check]:
        """Exactly the count, nothing larger left out, and all of it in the competitor's masks."""
        least_kept, most_left, outside, count = float("inf"), 0.0, 0, 0
        for name, at in chosen.items():
            new, old = self.pairs[name]
            sizes = (new - old).abs().view(-1)
            count += at.numel()
            if self.masks is not None:
                outside += int((~self.masks[name].view(-1)[at]).sum())
            if at.numel():
                least_kept = min(least_kept, float(sizes[at].min()))
                sizes[at] = 0.0
            most_left = max(most_left, float(sizes.max()))
        return [
            Check("entries too many or too few", float(abs(count - self.nnz)), 0.0),
            Check("largest left out over smallest kept", most_left / least_kept, 1.0),
            Check("entries that the competitor's masks lack", float(outside), 0.0),
        ]


def list_and_partition(pairs: Pairs, nnz: int) -> dict[str, Tensor]:
    """Return masks (True = kept) the competitor's way, in our own words."""
    everything: list[float] = []
    for theta1, theta0 in pairs.values():
        everything.extend((theta1 - theta0).view(-1).abs().tolist())
    place = len(everything) - nnz
    limit = float(np.partition(everything, place)[place])
    return {name: (new - old).abs() >= limit for name, (new, old) in pairs.items()}


@torch.no_grad()
def _moved(model: nn.Module) -> dict[str, Tensor]:
    """Return other weights, a random step away from the model's."""
    moved: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(len(moved))
        step = torch.empty_like(parameter).normal_(std=1e-3, generator=generator)
        moved[name] = step.add_(parameter)
    return moved


def extra_bytes(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """Return what ``run`` returned and by how much the process grew meanwhile at its peak, its
    result included; None where the system does not say.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return run(), None
    before = _status("VmRSS")
    made = run()
    return made, _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return 0


def _memory(size: int | None) -> Facts:
    return {} if size is None else {MEMORY: size}


def _per_parameter(numel: int) -> Callable[[Timing, str, Contender], Facts]:
    def derive(timing: Timing, name: str, _: Contender) -> Facts:
        return {"ns per parameter": timing.median(name) / numel * 1e9}

    return derive


BENCH = OpBench(
    name="select",
    summary="choosing entries of a whole model: magnitude, deltas_svd; against list and partition",
    dims=DIMS,
    shapes={
        "cuda": (_XLMR,),
        "cpu": ((2, 256, 4_000),),
        "tiny": ((1, 32, 64),),
    },
    dtypes=("fp32",),
    densities=(0.01, _DENSITY, 0.1),
    build=_asked,
)
