"""Denoising the matrices of an encoder against a loop over them.

Truncated SVDs alone, and the whole: differences, SVD, residual pruned. The competitors are
`torch.linalg.svd` and ``torch.svd_lowrank(q=rank + 8, niter=2)``, cut to the rank, one matrix after
the other; their plain pruning stores each residual. Before anything is timed our residuals must be
no larger than those of svd_lowrank for any matrix, and within 1.01 of optimal for one of each
shape; pruned matrices must keep exactly the count of entries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparseft.benchmarking.cases.compose_sides import MODELS
from sparseft.benchmarking.checks import Check, worst
from sparseft.benchmarking.rotation import Clock
from sparseft.benchmarking.suite import Case, Contender, Prepared, at_most, faster
from sparseft.denoise import Denoise, denoised
from sparseft.ops import plan_svd

__all__ = ["FULL", "LOWRANK", "OURS", "denoise_cases", "encoder_shapes"]

FULL = "loop of torch.linalg.svd"
LOWRANK = "loop of torch.svd_lowrank"
OURS = "ours"

_OVERSAMPLE = 8  # of svd_lowrank
_NITER = 2
# Of the singular values of the differences: i ** -0.5, as flat as those of fine-tuning.
_DECAY = 0.5
_SIZE = 1e-3

Matrices = dict[str, Tensor]


def denoise_cases(
    model: str = "xlmr_base", *, rank: int = 64, residual: float = 0.1, clock: Clock = "wall"
) -> list[Case]:
    """Return the two cases on the shapes of a model's encoder, in fp32."""
    judged = model != "tiny"
    return [
        _factors_case(model, rank, clock, judged),
        _pruned_case(model, rank, residual, clock),
    ]


def encoder_shapes(model: str) -> dict[str, tuple[int, int]]:
    """Return the weight matrices of a model's layers: four square ones, one tall, one wide."""
    sizes = MODELS[model]
    h, inner = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = {}
    for i in range(sizes["num_hidden_layers"]):
        for part in ("key", "output", "query", "value"):
            shapes[f"layer.{i:02}.attention.{part}"] = (h, h)
        shapes[f"layer.{i:02}.intermediate"] = (inner, h)
        shapes[f"layer.{i:02}.output"] = (h, inner)
    return shapes


def _random_differences(shapes: dict[str, tuple[int, int]], device: torch.device) -> Matrices:
    generator = torch.Generator(device).manual_seed(0)
    made = {}
    for name, (m, n) in shapes.items():
        short = min(m, n)
        left = torch.randn(m, short, device=device, generator=generator)
        right = torch.randn(short, n, device=device, generator=generator)
        sizes = torch.arange(1, short + 1, device=device) ** -_DECAY
        made[name] = (left * sizes) @ right * (_SIZE / short**0.5)
    return made


def _full(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def _lowrank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(delta, q=min(rank + _OVERSAMPLE, *delta.shape), niter=_NITER)
    return u[:, :rank], s[:rank], v.mT[:rank]


def _left_over(delta: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> float:
    u, s, vh = factors
    return float(torch.linalg.vector_norm(delta - (u * s) @ vh, dtype=torch.float64))


def _factors_case(model: str, rank: int, clock: Clock, judged: bool) -> Case:
    def build(device: torch.device) -> Prepared:
        shapes = encoder_shapes(model)
        deltas = _random_differences(shapes, device)
        plan = plan_svd(shapes, rank=rank)
        left_over = {name: float(found.residual) for name, found in plan.run(deltas.__getitem__)}
        against = {name: _left_over(delta, _lowrank(delta, rank)) for name, delta in deltas.items()}
        one_each = {shape: name for name, shape in shapes.items()}
        optimal = {n: _left_over(deltas[n], _full(deltas[n], rank)) for n in one_each.values()}
        checks = [
            worst(
                Check(f"{n}: residual over svd_lowrank's", left_over[n] / against[n], 1 + 1e-6)
                for n in shapes
            ),
            *(
                Check(f"{n}: residual over optimal", left_over[n] / best, 1.01)
                for n, best in optimal.items()
            ),
        ]

        def loop(factorise: Callable[[Tensor, int], object]) -> Callable[[], None]:
            def run() -> None:
                for delta in deltas.values():
                    factorise(delta, rank)

            return run

        def ours() -> None:
            for _ in plan.run(deltas.__getitem__):
                pass

        mean = float(np.mean([left_over[n] / against[n] for n in shapes]))
        facts = {"residual over svd_lowrank's, mean": mean, "most bytes": plan.bytes}
        contenders = {
            FULL: Contender(loop(_full)),
            LOWRANK: Contender(loop(_lowrank)),
            OURS: Contender(ours, checks, facts),
        }
        targets = (
            faster(7, OURS, FULL, devices=("cpu",)),
            at_most(1.0, OURS, LOWRANK, devices=("cpu",)),
        )
        if device.type == "cuda":
            targets = (faster(50, OURS, FULL), faster(3, OURS, LOWRANK))
        return Prepared(
            contenders,
            FULL,
            clocks=(clock,),
            targets=targets if judged else (),
            facts={"matrices": len(shapes), "rank": rank},
            warmup=1,
            least=3,
        )

    return Case(f"denoise/svd/{model}", build)


def _pruned_case(model: str, rank: int, residual: float, clock: Clock) -> Case:
    def build(device: torch.device) -> Prepared:
        shapes = encoder_shapes(model)
        deltas = _random_differences(shapes, device)
        theta0 = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
        triples = [(name, delta, theta0[name]) for name, delta in deltas.items()]
        how = Denoise(rank=rank, residual=residual)

        def theirs() -> None:
            for _, new, old in triples:
                _pruned(new - old, _lowrank(new - old, rank), residual)

        def ours() -> None:
            for _ in denoised(triples, how):
                pass

        contenders = {
            LOWRANK: Contender(theirs),
            OURS: Contender(ours, [_counts_check(triples, how)]),
        }
        return Prepared(
            contenders,
            LOWRANK,
            clocks=(clock,),
            facts={"matrices": len(shapes), "rank": rank, "residual kept": residual},
            warmup=1,
            least=5,
        )

    return Case(f"denoise/whole/{model}", build)


def _pruned(delta: Tensor, factors: tuple[Tensor, Tensor, Tensor], residual: float) -> Tensor:
    """Return what `denoised` does, the plain way; the threshold by numpy's partition on a CPU."""
    u, s, vh = factors
    low = (u * s) @ vh
    rest = (delta - low).abs()
    count = round(residual * rest.numel())
    if rest.device.type == "cpu":
        place = rest.numel() - count
        limit = float(np.partition(rest.view(-1).numpy(), place)[place])
    else:
        limit = float(torch.topk(rest.view(-1), count, sorted=False).values.min())
    return torch.where(rest >= limit, delta, low)


def _counts_check(triples: list[tuple[str, Tensor, Tensor]], how: Denoise) -> Check:
    """Entries too many or too few that kept their value, over all matrices."""
    wrong = 0
    for (_, value), (_, new, old) in zip(denoised(triples, how), triples, strict=True):
        same = int((value == new - old).sum())
        # An entry whose residual rounds to nothing has the difference's value, too.
        wrong += max(0, how.kept(new.numel()) - same) + max(0, same - how.kept(new.numel()) - 16)
    return Check("kept entries too many or too few", float(wrong), 0.0)
