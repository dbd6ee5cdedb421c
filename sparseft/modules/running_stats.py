"""Running statistics of batch norms: what a forward in training mode writes into a model.

No parameter, no mask and no adapter holds them, so undoing an attach has to bring them back.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from sparseft._text import first_of

__all__ = ["RunningStatistics"]

logger = logging.getLogger(__name__)

_NAMES = ("running_mean", "running_var", "num_batches_tracked")


class RunningStatistics:
    """The statistics that a model's norm layers have now, to tell and undo what becomes of them.

    Args:
        model: any module; layers that torch has (batch norms, instance norms that track) count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved: list[tuple[str, nn.Module, dict[str, Tensor]]] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                found = {n: b.clone() for n in _NAMES if (b := module._buffers.get(n)) is not None}
                if found:
                    self._saved.append((name, module, found))

    def moved(self) -> list[str]:
        """Return the names of the layers whose statistics are others now."""
        return [
            name
            for name, module, saved in self._saved
            if any(
                (now := module._buffers.get(n)) is not None and not torch.equal(now, before.to(now))
                for n, before in saved.items()
            )
        ]

    def warn_if_moved(self) -> None:
        """Say that an adapter made now lacks them."""
        if moved := self.moved():
            logger.warning(
                "running statistics of %d norm layers moved in training and are not in the "
                "adapter, which holds parameters only: %s. On a fresh base it gives other outputs "
                "in evaluation mode. Fix: keep these layers in eval() while training, or carry "
                "their buffers along (model.state_dict() has them).",
                len(moved), first_of(moved),
            )  # fmt: skip

    @torch.no_grad()
    def restore_(self) -> None:
        """Put them back, bit for bit (cast to the layer's dtype where that has changed)."""
        for _, module, saved in self._saved:
            for name, buffer in saved.items():
                current = module._buffers.get(name)
                if current is not None:
                    current.copy_(buffer)
