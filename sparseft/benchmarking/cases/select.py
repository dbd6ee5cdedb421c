"""Choosing 2.76 % of all weights of a model against composable-sft's list and partition.

It extends one Python list by all ``|theta1 - theta0|``, hands it to `numpy.partition`, and keeps
what is at or above the threshold. Ours must keep exactly the count, nothing below the threshold,
and only what its masks hold. Extra memory is the process's own peak (Linux), each side run alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparseft.benchmarking.cases.compose_sides import build_model
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.rotation import Clock, Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared, Target, faster
from sparseft.selection import Masks, select

__all__ = ["DENOISED", "MAGNITUDE", "PEER", "extra_bytes", "list_and_partition", "select_case"]

PEER = "composable-sft, list and partition"
MAGNITUDE = "select, magnitude"
DENOISED = "select, deltas_svd, embeddings passed"
MEMORY = "extra bytes"

Pairs = Mapping[str, tuple[Tensor, Tensor]]

# What the competitor needs for each entry while its list grows: 15.6 GB were measured for 278 M.
_PEER_BYTES = 2 * 32


def select_case(
    model: str = "xlmr_base", *, density: float = 0.0276, rank: int = 64, clock: Clock = "wall"
) -> Case:
    """Compare on a model of random weights, each moved by a random step."""

    def build(device: torch.device) -> Prepared:
        tuned = build_model(model, device)
        base = _moved(tuned)
        numel = sum(p.numel() for p in tuned.parameters())
        nnz = round(density * numel)
        pairs = {n: (p.detach(), base[n]) for n, p in tuned.named_parameters()}

        def theirs() -> dict[str, Tensor]:
            return list_and_partition(pairs, nnz)

        def magnitude() -> Masks:
            return select(tuned, "magnitude", nnz=nnz, base=base)

        def deltas_svd() -> Masks:
            return select(tuned, "deltas_svd", nnz=nnz, base=base, rank=rank, embeddings="pass")

        chosen, size = extra_bytes(magnitude)
        contenders = {
            PEER: Contender(theirs),
            MAGNITUDE: Contender(magnitude, facts=_memory(size)),
        }
        free = _available()
        if free is not None and free < _PEER_BYTES * numel:
            contenders[PEER] = Contender(
                skipped=f"it needs {_PEER_BYTES * numel / 1e9:.0f} GB, {free / 1e9:.0f} are free"
            )
            checks = _checks(chosen, pairs, nnz, None)
        else:
            masks, theirs_size = extra_bytes(theirs)
            contenders[PEER].facts |= _memory(theirs_size)
            checks = _checks(chosen, pairs, nnz, masks)
            del masks
        contenders[MAGNITUDE].checks = checks
        denoised, size = extra_bytes(deltas_svd)
        contenders[DENOISED] = Contender(
            deltas_svd,
            [Check("entries too many or too few", float(abs(denoised.nnz - nnz)), 0.0)],
            _memory(size) | {"rank": rank},
        )
        targets = (
            faster(20, MAGNITUDE, PEER, devices=("cpu",)),
            Target(
                f"{MAGNITUDE}: at most 1 GB of extra memory",
                lambda _, found: _of(found[MAGNITUDE]),
                1e9,
                False,
                ("cpu",),
            ),
        )
        return Prepared(
            contenders,
            PEER,
            clocks=(clock,),
            targets=targets if model == "xlmr_base" else (),
            derive=_bandwidth(numel),
            facts={"parameters": numel, "kept": nnz},
            warmup=0,
            least=3,
        )

    return Case(f"select/{model}", build)


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


def _checks(
    chosen: Masks,
    pairs: Pairs,
    nnz: int,
    masks: dict[str, Tensor] | None,
) -> list[Check]:
    """Exactly the count, nothing larger left out, and all of it in the other side's masks."""
    least_kept, most_left, outside = float("inf"), 0.0, 0
    for name, pattern in chosen.items():
        new, old = pairs[name]
        sizes = (new - old).abs().view(-1)
        at = pattern.indices.long()
        if masks is not None:
            outside += int((~masks[name].view(-1)[at]).sum())
        if at.numel():
            least_kept = min(least_kept, float(sizes[at].min()))
            sizes[at] = 0.0
        most_left = max(most_left, float(sizes.max()))
    return [
        Check("entries too many or too few", float(abs(chosen.nnz - nnz)), 0.0),
        Check("largest left out over smallest kept", most_left / least_kept, 1.0),
        Check("entries that the competitor's masks lack", float(outside), 0.0),
    ]


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


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _memory(size: int | None) -> Facts:
    return {} if size is None else {MEMORY: size}


def _of(contender: Contender) -> float | None:
    return contender.facts.get(MEMORY)


def _bandwidth(numel: int) -> Callable[[Timing, str, Contender], Facts]:
    def derive(timing: Timing, name: str, _: Contender) -> Facts:
        return {"ns per parameter": timing.median(name) / numel * 1e9}

    return derive
