"""Numbers too small for fp16 and bf16: diffs that leave no trace in a weight, gradients of zero.

A leaf is fp32 and keeps every small step; the weight that the model computes with is
``rn(base + leaf)``. Gradients are summed in fp32, but of products of what flows through the model
in its own dtype, and in fp16 that may be zero.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.attachment import Attachment
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.mask_report import MaskReports
from sparseft.modules.transplant import as_optimizers, stepped
from sparseft.training.warn_once import named, warn_once

__all__ = ["Underflow"]

logger = logging.getLogger(__name__)

# A tensor is named where more than this share of its entries is affected. Half: of entries chosen
# at random, units that are off (ReLU) leave that many without a gradient in a healthy model.
SHARE = 0.5
# Diffs grow from zero: at first, all of a low-precision weight's are too small.
STEPS = 100


class Underflow:
    """Watches one attachment for underflow.

    Args:
        attachment: whose gradients and diffs.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self._zeros: dict[str, Tensor] = {}
        self._entries: dict[str, int] = {}

    @torch.no_grad()
    def look(self) -> None:
        """Count gradients of exactly zero in fp16 tensors; does not wait for the device.

        Embeddings are left out: most of their rows have no gradient in any step.
        """
        for name, masked in self.attachment._masked.items():
            grad = masked.leaf.grad
            if grad is None or masked.weight.dtype != torch.float16 or self._sparse(masked):
                continue
            zeros = (grad == 0).sum()
            self._zeros[name] = self._zeros[name] + zeros if name in self._zeros else zeros
            self._entries[name] = self._entries.get(name, 0) + grad.numel()

    def _sparse(self, masked: MaskedParameter) -> bool:
        owners = self.attachment._owners[masked.name]
        return any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module, _ in owners)

    def warn(self, report: MaskReports, optimizer: Any, *, steps: int, last: bool) -> None:
        """Log what the counts since the last call, and a report, give cause for.

        Args:
            report: as of now.
            optimizer: the one, or several, that trains; None: those that have stepped the leaves.
            steps: optimizer steps done.
            last: training has ended.
        """
        self._warn_gradients()
        if last or steps >= STEPS:
            self._warn_diffs(report, as_optimizers(optimizer) or stepped())

    def _warn_gradients(self) -> None:
        if not self._zeros:
            return
        counts = {name: int(zeros) for name, zeros in self._zeros.items()}
        rows = [(n, c, self._entries[n]) for n, c in counts.items() if c > SHARE * self._entries[n]]
        self._zeros, self._entries = {}, {}
        if rows:
            warn_once(
                logger,
                self.attachment,
                "zero gradients",
                "in %d of %d fp16 tensors more than half of the gradient is exactly zero (summed "
                "over the steps since the last look): %s. What flows through an fp16 model "
                "underflows below 6e-8. Scale the loss (torch.amp.GradScaler; the leaves' "
                "gradients are fp32, so it takes an fp16 base, too), or train in bf16, or with "
                "model.float() under autocast.",
                len(rows), len(counts), named(rows),
            )  # fmt: skip

    def _warn_diffs(self, report: MaskReports, optimizers: list[Any]) -> None:
        leaves = self.attachment.leaves
        low = [row for row in report if row.dtype in ("float16", "bfloat16")]
        rows = [
            row
            for row in low
            if row.rounded_away > SHARE * row.changed
            and not _rounds_either_way(leaves[row.name], optimizers)
        ]
        if rows:
            warn_once(
                logger,
                self.attachment,
                "rounded away",
                "in %d of %d %s tensors more than half of the diffs that are not zero are too "
                "small to change their weight: %s. The model computes as if they were zero. Use a "
                "larger learning rate, sparseft.SparseAdamW(stochastic_rounding=True), or an fp32 "
                "base (model.float()) under autocast. The adapter has the diffs in fp32 in any "
                "case.",
                len(rows), len(low), " and ".join(sorted({row.dtype for row in rows})),
                named((row.name, row.rounded_away, row.changed) for row in rows),
            )  # fmt: skip


def _rounds_either_way(leaf: Tensor, optimizers: list[Any]) -> bool:
    """Whether a leaf's weight is rounded stochastically: right on average, however small."""
    return any(
        group.get("stochastic_rounding") and any(p is leaf for p in group["params"])
        for optimizer in optimizers
        for group in optimizer.param_groups
    )
