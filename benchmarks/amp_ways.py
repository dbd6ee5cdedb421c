"""Ways to fine-tune one mask in mixed precision, each run over the same batches from the same bits.

Dense sides are dense fine-tuning whose gradients and updates are masked: stock model, stock
``torch.optim.AdamW``, every gradient multiplied by the mask before it enters a moment, so that
frozen entries get updates of exactly zero (their bits are compared at the end), and weight decay
that pulls a weight to where it started, as ours pulls a diff to zero. Every side starts from
weights that bf16 can hold, so that no precision starts elsewhere. The head is in the mask as a
whole. No dropout, whose draws differ between dtypes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from amp_study import Study
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparseft
from sparseft.ops._common import bits

__all__ = ["WAYS", "Curve", "HalfProducts", "Way", "run_way"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Entries of each tensor whose gradients are stepped again in fp64.
_REPLAYED = 64


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train.

    Args:
        name: for tables.
        ours: attached, with `SparseAdamW`; otherwise dense.
        weights: dtype of the model's parameters.
        autocast: dtype of its operations; fp16 goes with a GradScaler.
        master: dense only: AdamW steps fp32 copies, which the weights are rounded from.
        limit: the dense way that says what this precision may cost; "" where nothing is held
            against a limit.
        another_order: of the batches.
        spoil: a mistake that has to be caught: "diff in bf16" or "another mask".
    """

    name: str
    ours: bool = False
    weights: torch.dtype = FP32
    autocast: torch.dtype | None = None
    master: bool = False
    limit: str = ""
    another_order: bool = False
    spoil: str = ""


_DENSE = (
    Way(name="dense fp32"),
    Way(name="dense fp32, another order", another_order=True),
    Way(name="dense fp64", weights=torch.float64),
    Way(name="dense fp16 autocast", autocast=FP16),
    Way(name="dense bf16 autocast", autocast=BF16),
    Way(name="dense bf16, fp32 master", weights=BF16, master=True),
    Way(name="dense bf16", weights=BF16),
)
_OURS = (
    Way(name="ours fp32", ours=True, limit="dense fp64"),
    Way(name="ours fp16 autocast", ours=True, autocast=FP16, limit="dense fp16 autocast"),
    Way(name="ours bf16 autocast", ours=True, autocast=BF16, limit="dense bf16 autocast"),
    Way(name="ours bf16 base", ours=True, weights=BF16, limit="dense bf16, fp32 master"),
)
_SPOILT = (
    Way(
        name="ours bf16 base, diff kept in bf16",
        ours=True,
        weights=BF16,
        limit="dense bf16, fp32 master",
        spoil="diff in bf16",
    ),
    Way(
        name="ours fp32, another mask",
        ours=True,
        limit="dense fp64",
        spoil="another mask",
    ),
)
# The reference first.
WAYS = (*_DENSE, *_OURS, *_SPOILT)


@dataclass
class Curve:
    """What a way gave.

    Attributes:
        losses: one a step.
        diff: trained minus start, by parameter name, fp32, of the whole tensor.
        moved: entries outside the study's masks whose bits changed.
        skipped: steps that the GradScaler left out.
        lost: relative RMS distance of trained values, a few of every tensor, from AdamW stepping in
            fp64 on the very gradients of the run: what keeping them lost on the way.
        seconds: of the loop.
    """

    way: Way
    losses: list[float]
    diff: dict[str, Tensor]
    moved: int
    skipped: int
    lost: float
    seconds: float


class HalfProducts(TorchDispatchMode):
    """fp16 matrix products through fp32 with one rounding, as a GPU's tensor cores make them.

    A CPU without fp16 arithmetic takes 4 to 10 times as long for them as for fp32 ones.
    """

    _PRODUCTS = (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._PRODUCTS or args[0].dtype != FP16:
            return func(*args, **kwargs)
        wide = [a.float() if isinstance(a, Tensor) else a for a in args]
        return func(*wide, **kwargs).half()


class _Dense:
    """Dense fine-tuning, masked."""

    def __init__(self, model: nn.Module, study: Study, way: Way) -> None:
        self.decay = study.weight_decay
        # Of the weights' dtype: a bool mask multiplies five times slower on a CPU.
        self.masks = {name: mask.to(way.weights) for name, mask in study.masks.items()}
        self.weights = {name: model.get_parameter(name) for name in study.masks}
        self.start = {name: w.detach().clone() for name, w in self.weights.items()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.stepped = dict(self.weights)
        if way.master:
            self.stepped = {n: nn.Parameter(w.detach().float()) for n, w in self.weights.items()}
        self.parameters = list(self.stepped.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=study.lr, weight_decay=0.0)

    @torch.no_grad()
    def before_clip(self) -> None:
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            weight.grad.mul_(self.masks[name])
            if self.stepped[name] is not weight:
                self.stepped[name].grad = weight.grad.float()

    @torch.no_grad()
    def decay_(self, rate: float) -> None:
        for name, parameter in self.stepped.items():
            start = self.start[name].to(parameter.dtype)
            parameter.sub_(parameter - start, alpha=rate * self.decay)

    @torch.no_grad()
    def after_step(self) -> None:
        for name, parameter in self.stepped.items():
            if parameter is not self.weights[name]:
                self.weights[name].copy_(parameter)

    def zero_grad(self) -> None:
        for parameter in (*self.weights.values(), *self.parameters):
            parameter.grad = None

    def diff(self) -> dict[str, Tensor]:
        return {
            n: (_apart(p, self.start[n]) * self.masks[n]).float() for n, p in self.stepped.items()
        }

    def watched(self, places: Mapping[str, Tensor], *, gradient: bool) -> Tensor:
        found = []
        for name, place in places.items():
            parameter = self.stepped[name]
            values = parameter.grad if gradient else parameter.detach()
            if values is None:
                values = torch.zeros_like(parameter)
            picked = values.reshape(-1)[place]
            found.append(picked if gradient else _apart(picked, self.start[name].view(-1)[place]))
        return torch.cat(found)


def _apart(now: Tensor, start: Tensor) -> Tensor:
    """Return the difference in fp32, or in fp64 of fp64."""
    wide = torch.promote_types(now.dtype, FP32)
    return now.detach().to(wide) - start.to(wide)


class _Attached:
    """Ours: the diff is a leaf of its own, and the optimizer is told of nothing else."""

    def __init__(self, model: nn.Module, study: Study, way: Way) -> None:
        masks = study.masks
        if way.spoil == "another mask":
            masks = {n: m.flip(0) if m.dim() > 1 else m for n, m in masks.items()}
        self.attachment = sparseft.attach(model, masks)
        self.spoil = way.spoil
        self.parameters = list(self.attachment.parameters())
        self.optimizer = sparseft.SparseAdamW(
            self.parameters, lr=study.lr, weight_decay=study.weight_decay
        )

    def before_clip(self) -> None:
        pass

    def decay_(self, rate: float) -> None:
        pass  # the optimizer's own decay pulls a diff to zero

    @torch.no_grad()
    def after_step(self) -> None:
        if self.spoil == "diff in bf16":
            for leaf in self.parameters:
                leaf.copy_(leaf.to(BF16))
            self.attachment.sync_()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def diff(self) -> dict[str, Tensor]:
        found = {}
        for name, leaf in self.attachment.leaves.items():
            pattern = self.attachment.patterns[name]
            whole = torch.zeros(pattern.shape)
            whole.view(-1)[pattern.indices.long()] = leaf.detach()
            found[name] = whole
        return found

    def watched(self, places: Mapping[str, Tensor], *, gradient: bool) -> Tensor:
        found = []
        for name, place in places.items():
            leaf = self.attachment.leaves[name]
            values = leaf.grad if gradient else leaf.detach()
            kept = self.attachment.patterns[name].indices.long()
            # Of a mistaken mask other entries: any will do.
            at = torch.searchsorted(kept, place).clamp_(max=kept.numel() - 1)
            found.append(torch.zeros(place.numel()) if values is None else values[at])
        return torch.cat(found)


def _watched_places(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return flat positions of a few entries of every mask."""
    generator = torch.Generator().manual_seed(0)
    places = {}
    for name, mask in masks.items():
        kept = mask.view(-1).nonzero()[:, 0]
        places[name] = kept[torch.randperm(kept.numel(), generator=generator)[:_REPLAYED]]
    return places


def run_way(way: Way, study: Study, *, progress: Callable[[str], None] | None = None) -> Curve:
    """Train one way and return its curve."""
    model = study.model()
    frozen = {name: p.detach().to(way.weights, copy=True) for name, p in model.named_parameters()}
    model.to(way.weights)
    side = (_Attached if way.ours else _Dense)(model, study, way)
    scaler = torch.amp.GradScaler("cpu", enabled=way.autocast == FP16)
    cast = torch.autocast("cpu", way.autocast or BF16, enabled=way.autocast is not None)
    half = HalfProducts() if way.autocast == FP16 else contextlib.nullcontext()
    places = _watched_places(study.masks)
    again = _Replay(sum(p.numel() for p in places.values()), study.weight_decay)
    losses: list[float] = []
    skipped = 0
    begun = time.perf_counter()
    with half:
        for step, batch in enumerate(study.another_order if way.another_order else study.batches):
            rate = study.rate(step)
            for group in side.optimizer.param_groups:
                group["lr"] = rate
            side.zero_grad()
            with cast:
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            losses.append(float(loss.detach()))
            side.before_clip()
            scaler.unscale_(side.optimizer)
            nn.utils.clip_grad_norm_(side.parameters, study.clip)
            gradient = side.watched(places, gradient=True)
            scale = scaler.get_scale()
            side.decay_(rate)
            scaler.step(side.optimizer)
            scaler.update()
            side.after_step()
            if scaler.get_scale() < scale:
                skipped += 1
            else:
                again.step(gradient, rate)
            if progress is not None and (step + 1) % 50 == 0:
                progress(f"{way.name}: step {step + 1}, loss {sum(losses[-50:]) / 50:.4f}")
    seconds = time.perf_counter() - begun
    return Curve(
        way=way,
        losses=losses,
        diff=side.diff(),
        moved=_moved(model, frozen, study.masks),
        skipped=skipped,
        lost=again.distance(side.watched(places, gradient=False)),
        seconds=seconds,
    )


def _moved(model: nn.Module, before: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int:
    """Return how many entries outside the masks have other bits than before."""
    parameters = dict(model.named_parameters())
    changed = 0
    for name, old in before.items():
        new = parameters[name].detach()
        differs = bits(new) != bits(old)
        if name in masks:
            differs &= ~masks[name]
        changed += int(differs.sum())
    return changed


class _Replay:
    """AdamW in fp64 on the gradients that a run saw."""

    def __init__(self, count: int, weight_decay: float) -> None:
        self.value = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        self.optimizer = torch.optim.AdamW([self.value], weight_decay=weight_decay)

    def step(self, gradient: Tensor, rate: float) -> None:
        self.value.grad = gradient.double()
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()

    def distance(self, found: Tensor) -> float:
        exact = self.value.detach()
        return float((found.double() - exact).norm() / exact.norm())
