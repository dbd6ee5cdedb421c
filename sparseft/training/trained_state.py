"""What training keeps for each entry that it trains, in bytes: one definition for logs and tables.

Not here: what a whole step takes, activations included (``sparseft profile``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparseft.attachment import Attachment
from sparseft.modules.transplant import as_optimizers, holding, stepped

__all__ = ["TrainedState", "trained_state"]


@dataclass(frozen=True, kw_only=True)
class TrainedState:
    """Bytes kept for what trains, by part.

    Args:
        index: where the trained entries are.
        base: what they were before; of full parameters, too.
        diff: the leaves.
        gradients: one of each leaf and full parameter, as they are within a step.
        optimizer: its state of leaves and full parameters, step counts aside.
    """

    index: int
    base: int
    diff: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.index + self.base + self.diff + self.gradients + self.optimizer


def trained_state(
    attachment: Attachment, optimizer: Any = None, *, full_params: bool = True
) -> TrainedState:
    """Count the bytes of what trains, from shapes alone: no device is waited for.

    Args:
        attachment: whose masks.
        optimizer: the one (or several) that trains it; None: those alive that have stepped it.
        full_params: count parameters that are trained densely, too.
    """
    masks = list(attachment._masked.values())
    full = attachment._full if full_params else []
    trained: list[nn.Parameter] = [*(m.leaf for m in masks), *(f.parameter for f in full)]
    optimizers = as_optimizers(optimizer) or stepped()
    moments: list[Any] = [
        value
        for parameter in trained
        for held in holding(optimizers, parameter)
        for value in held.state.get(parameter, {}).values()
    ]
    return TrainedState(
        index=_bytes(m.indices for m in masks),
        # None beside quantised weights.
        base=_bytes([*(m.holder.saved for m in masks), *(f.holder.saved for f in full)]),
        diff=_bytes(m.leaf for m in masks),
        gradients=_bytes(p for p in trained if p.requires_grad),
        optimizer=_bytes(v for v in moments if isinstance(v, Tensor) and v.ndim > 0),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
