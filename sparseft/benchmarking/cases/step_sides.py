"""Optimizer steps on the layers of a Llama: rules, masked layers, dense ones, and single entries.

All masked sides of one case share the storage of their weights: a step writes ``base + diff`` and
never reads a weight, so that the order in which they are timed changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparseft.attachment import attach
from sparseft.benchmarking.cases.parts import in_its_dtype
from sparseft.benchmarking.checks import Check, equal_bits, worst
from sparseft.benchmarking.masks import random_pattern, sectors_touched
from sparseft.diff import SparsePattern
from sparseft.ops import gather_entries, sum_entries
from sparseft.optim import SparseAdamW, SparseLion, SparseSGD

__all__ = ["ADAMW", "LION", "SGD", "Dense", "EntryStep", "Masked", "Rule", "draw_weights"]

# Large enough to show in bf16 weights; no time depends on it.
_LR = 1e-3
_BETAS = (0.9, 0.999)
_LION_BETAS = (0.9, 0.99)
_EPS = 1e-8
_MOMENTUM = 0.9
_CHECKED_STEPS = 3

Patterns = list[SparsePattern]


class Lion(Optimizer):
    """Lion in plain torch, a few passes over all tensors at once; torch has none of its own."""

    def __init__(self, params: Sequence[nn.Parameter], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            for p in params:
                if p not in self.state:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            momenta = [self.state[p]["exp_avg"] for p in params]
            grads = [p.grad for p in params]
            moves = torch._foreach_mul(momenta, _LION_BETAS[0])
            torch._foreach_add_(moves, grads, alpha=1 - _LION_BETAS[0])
            torch._foreach_sign_(moves)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - _LR * group["weight_decay"])
            torch._foreach_add_(params, moves, alpha=-_LR)
            torch._foreach_mul_(momenta, _LION_BETAS[1])
            torch._foreach_add_(momenta, grads, alpha=1 - _LION_BETAS[1])


# One step on the entries of one tensor: (diff, gradient, moments, base, flat weight, positions).
EntryStep = Callable[[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """An update rule, by us and by torch.

    Args:
        label: in names of rows.
        ours: its class here: parameters -> optimizer.
        theirs: the fastest that plain torch has.
        definition: torch's loop over tensors, with a decay.
        entry: a first step on entries, without decay, for `torch.compile`.
        moments: tensors of state.
        decay: the default decoupled decay of ``ours``.
    """

    label: str
    ours: Callable[[list[nn.Parameter]], Optimizer]
    theirs: Callable[[list[nn.Parameter]], Optimizer]
    definition: Callable[[list[nn.Parameter], float], Optimizer]
    entry: EntryStep
    moments: int
    decay: float

    def streamed(self, itemsize: int) -> int:
        """Bytes per entry beside the weight: gradient, index, base; diff and moments in and out."""
        return 4 + 4 + itemsize + 8 * (1 + self.moments)


def _adamw_entry(
    diff: Tensor, grad: Tensor, moments: list[Tensor], base: Tensor, weight: Tensor, at: Tensor
) -> Tensor:
    exp_avg, exp_avg_sq = moments
    exp_avg.lerp_(grad, 1 - _BETAS[0])
    exp_avg_sq.mul_(_BETAS[1]).addcmul_(grad, grad, value=1 - _BETAS[1])
    denominator = exp_avg_sq.sqrt() / math.sqrt(1 - _BETAS[1]) + _EPS
    diff.addcdiv_(exp_avg, denominator, value=-_LR / (1 - _BETAS[0]))
    weight[at] = (base.float() + diff).to(weight.dtype)
    return diff


def _lion_entry(
    diff: Tensor, grad: Tensor, moments: list[Tensor], base: Tensor, weight: Tensor, at: Tensor
) -> Tensor:
    (exp_avg,) = moments
    diff.sub_(torch.lerp(exp_avg, grad, 1 - _LION_BETAS[0]).sign(), alpha=_LR)
    exp_avg.lerp_(grad, 1 - _LION_BETAS[1])
    weight[at] = (base.float() + diff).to(weight.dtype)
    return diff


def _sgd_entry(
    diff: Tensor, grad: Tensor, moments: list[Tensor], base: Tensor, weight: Tensor, at: Tensor
) -> Tensor:
    (buffer,) = moments
    buffer.mul_(_MOMENTUM).add_(grad)
    diff.sub_(buffer, alpha=_LR)
    weight[at] = (base.float() + diff).to(weight.dtype)
    return diff


def _fastest_sgd(params: list[nn.Parameter]) -> Optimizer:
    # On a CPU torch 2.13's fused SGD leaves bf16 and fp16 parameters where they are.
    fused = params[0].is_cuda or params[0].dtype == torch.float32
    return torch.optim.SGD(params, lr=_LR, momentum=_MOMENTUM, fused=fused)


ADAMW = Rule(
    "AdamW",
    lambda params: SparseAdamW(params, lr=_LR),
    lambda params: torch.optim.AdamW(params, lr=_LR, fused=True),
    lambda params, decay: torch.optim.AdamW(
        params, lr=_LR, weight_decay=decay, foreach=False, fused=False
    ),
    _adamw_entry,
    2,
    0.01,
)
LION = Rule("Lion", lambda params: SparseLion(params, lr=_LR), Lion, Lion, _lion_entry, 1, 0.0)
SGD = Rule(
    "SGD",
    lambda params: SparseSGD(params, lr=_LR, momentum=_MOMENTUM),
    _fastest_sgd,
    lambda params, decay: torch.optim.SGD(
        params, lr=_LR, momentum=_MOMENTUM, weight_decay=decay, foreach=False, fused=False
    ),
    _sgd_entry,
    1,
    0.0,
)


def _stepped(
    rule: Rule, start: Tensor, grad: Tensor, dtype: torch.dtype, decay: float
) -> Tensor:  # fmt: skip
    """Return what torch's own loop makes of a tensor in ``dtype``."""
    copy = nn.Parameter(start.to(dtype, copy=True))
    copy.grad = grad.to(dtype)
    optimizer = rule.definition([copy], decay)
    for _ in range(_CHECKED_STEPS):
        optimizer.step()
    return copy.detach()


def draw_weights(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    """Return normal weights as small as a model's."""
    made = [torch.empty(s, dtype=dtype, device=generator.device) for s in shapes]
    return [w.normal_(std=0.02, generator=generator) for w in made]


def firsts(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Return the place of the first of each shape: those are checked whole."""
    return sorted({shape: i for i, shape in reversed(list(enumerate(shapes)))}.values())


class Masked:
    """Masked layers over given weights, with a gradient on each leaf."""

    def __init__(self, weights: list[Tensor], density: float, rule: Rule) -> None:
        self.weights, self.rule = weights, rule
        device = weights[0].device
        drawn = [
            random_pattern(tuple(w.shape), density, device=device, seed=i)
            for i, w in enumerate(weights)
        ]
        self.patterns = _evened(drawn)
        self.before = {i: weights[i].clone() for i in firsts([tuple(w.shape) for w in weights])}
        layers = nn.ModuleList()
        for weight in weights:
            rows, cols = weight.shape
            layer = nn.Linear(cols, rows, bias=False, device="meta")
            layer.weight = nn.Parameter(weight)
            layers.append(layer)
        names = [f"{i}.weight" for i in range(len(weights))]
        self.layers = layers
        self.attachment = attach(layers, dict(zip(names, self.patterns, strict=True)))
        self.leaves = [self.attachment.leaves[name] for name in names]
        generator = torch.Generator(device).manual_seed(1)
        for leaf in self.leaves:
            leaf.grad = torch.randn(leaf.shape, device=device, generator=generator)

    @property
    def nnz(self) -> int:
        return self.attachment.nnz

    def bytes_moved(self) -> int:
        """The streams, and each 32-byte piece of the weight that holds an entry, in and out."""
        itemsize = self.weights[0].element_size()
        touched = sum(sectors_touched(p, itemsize) for p in self.patterns)
        return self.rule.streamed(itemsize) * self.nnz + 64 * touched

    def check(self, optimizer: Optimizer, decay: float) -> list[Check]:
        """Step, and compare diffs with torch's loop, weights with rn(base + diff), the rest with
        what was there.
        """
        starts = [leaf.detach().clone() for leaf in self.leaves]
        for _ in range(_CHECKED_STEPS):
            optimizer.step()
        # Squares of our error, of torch's and of the diffs: over all leaves, as one of few entries
        # may have no error by chance.
        mine = by_torch = size = 0.0
        for i, (leaf, start) in enumerate(zip(self.leaves, starts, strict=True)):
            if leaf.grad is None:
                raise RuntimeError(f"leaf {i} has lost its gradient")
            theirs, exact = (
                _stepped(self.rule, start, leaf.grad, dtype, decay)
                for dtype in (torch.float32, torch.float64)
            )
            mine += float((leaf.detach() - exact).square().sum())
            by_torch += float((theirs - exact).square().sum())
            size += float(exact.square().sum())
        limit = 2 * math.sqrt(by_torch / size) + torch.finfo(torch.float32).eps
        diffs = Check("diffs: error", math.sqrt(mine / size), limit)
        written, frozen = [], []
        for i, before in self.before.items():
            at, after = self.patterns[i].indices, self.weights[i]
            wanted = sum_entries(
                gather_entries(before, at), self.leaves[i].detach(), after.dtype
            )  # fmt: skip
            written.append(equal_bits(f"weight {i}", gather_entries(after, at), wanted))
            masked = before.clone()
            masked.view(-1)[at.long()] = wanted
            frozen.append(equal_bits(f"all of weight {i}", after, masked))
        return [diffs, worst(written), worst(frozen)]

    def entries(self) -> list[tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]]:
        """Return an `EntryStep`'s operands for each tensor, with diffs and moments of their own."""
        made = []
        for weight, leaf, pattern in zip(self.weights, self.leaves, self.patterns, strict=True):
            grad, at = leaf.grad, pattern.indices.long()
            if grad is None:
                raise RuntimeError("a leaf has lost its gradient")
            moments = [torch.zeros_like(grad) for _ in range(self.rule.moments)]
            flat = weight.view(-1)
            made.append((torch.zeros_like(grad), grad, moments, flat[at], flat, at))
        return made


def _evened(patterns: Patterns) -> Patterns:
    """Cut patterns of tensors of one size to one count, by their last entries.

    A step that is compiled for fixed shapes then serves all of them; random masks differ in count
    by a thousandth.
    """
    least: dict[int, int] = {}
    for p in patterns:
        least[p.numel] = min(least.get(p.numel, p.nnz), p.nnz)
    return [SparsePattern.from_indices(p.indices[: least[p.numel]], p.shape) for p in patterns]


class Dense:
    """Dense layers with a dense gradient each; one optimizer for all its sides."""

    def __init__(self, weights: list[Tensor], patterns: Patterns, rule: Rule) -> None:
        self.rule = rule
        self.parameters = [nn.Parameter(w) for w in weights]
        self.masks = [p.to_mask() for p in patterns]
        self.generator = torch.Generator(weights[0].device).manual_seed(2)
        for p in self.parameters:
            p.grad = torch.empty_like(p).normal_(generator=self.generator)
        self.optimizer = rule.theirs(self.parameters)

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def step(self) -> None:
        self.optimizer.param_groups[0]["weight_decay"] = self.rule.decay
        self.optimizer.step()

    def masked_step(self) -> None:
        """What is frozen gets no gradient, and no decay either, or it would move."""
        for p, mask in zip(self.parameters, self.masks, strict=True):
            if p.grad is not None:
                p.grad.mul_(mask)
        self.optimizer.param_groups[0]["weight_decay"] = 0.0
        self.optimizer.step()

    def check(self, *, masked: bool) -> list[Check]:
        """From a new state: torch's loop in fp64, each step rounded to the weights' dtype; what is
        masked out keeps its bits.
        """
        self.optimizer.state.clear()
        shapes = [tuple(p.shape) for p in self.parameters]
        starts = {i: self.parameters[i].detach().clone() for i in firsts(shapes)}
        grads = {}
        for i in starts:
            p, grad = self.parameters[i], self.parameters[i].grad
            grads[i] = torch.zeros_like(p) if grad is None else grad.clone()
            if masked:
                grads[i].mul_(self.masks[i])
        for _ in range(_CHECKED_STEPS):
            self.masked_step() if masked else self.step()
        moved, frozen = [], []
        decay = 0.0 if masked else self.rule.decay
        for i, start in starts.items():
            after = self.parameters[i].detach()
            exact = _stepped(self.rule, start, grads[i], torch.float64, decay)
            moved.append(in_its_dtype(f"weight {i}", after, exact, terms=2 * _CHECKED_STEPS))
            if masked:
                out = ~self.masks[i]
                frozen.append(equal_bits(f"frozen of {i}", after[out], start[out]))
        self.optimizer.state.clear()
        return [worst(moved), *([worst(frozen)] if masked else [])]
