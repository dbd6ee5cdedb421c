"""Learning-rate factors by step, and the order in which a loop visits its examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

__all__ = ["SCHEDULES", "batch_order"]


def _linear(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _constant(step: int, steps: int, warmup: int) -> float:
    return min(1.0, step / max(1, warmup)) if warmup else 1.0


def _cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


# Factor of the learning rate at 0-based step ``step`` of ``steps``, after ``warmup`` steps of
# linear increase.
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "linear": _linear,
    "constant": _constant,
    "cosine": _cosine,
}


def batch_order(
    examples: int, batch_size: int, *, seed: int, shuffle: bool = True, start: int = 0
) -> Iterator[list[int]]:
    """Yield the index lists of batches ``start``, ``start + 1``, ... without end.

    Epoch e is a permutation drawn from a generator seeded with (seed, e), so batch m depends on
    nothing but the
    arguments: going on after a kill needs only the count. The last batch of an epoch may be
        smaller.
    """
    per_epoch = -(-examples // batch_size)
    epoch, offset = divmod(start, per_epoch)
    while True:
        if shuffle:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(examples, generator=generator).tolist()
        else:
            order = list(range(examples))
        for i in range(offset, per_epoch):
            yield order[i * batch_size : (i + 1) * batch_size]
        epoch, offset = epoch + 1, 0
