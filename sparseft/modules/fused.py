"""The layers that have a fused backward: `nn.Linear`, `nn.Embedding` and transformers' `Conv1D`.

Each class here goes into the method resolution order of a swapped class just before the stock layer
it stands for. A subclass with its own forward (a scaled embedding, say) that ends in
``super().forward(...)`` is therefore fused too; one that reads ``self.weight`` gets the alias.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparseft.modules.functional import given_weight
from sparseft.modules.names import STATE_KEY
from sparseft.modules.taps import conv1d_at_mask, embedding_at_mask, linear_at_mask

if TYPE_CHECKING:
    from sparseft.modules.leaves import MaskedParameter

__all__ = ["fused_class"]


def _training_mask(module: nn.Module) -> tuple[Tensor, MaskedParameter] | None:
    """Return ``module.weight`` and the mask on it if this call can train it."""
    weight, masked = module._parameters["weight"], module.__dict__[STATE_KEY].get("weight")
    if masked is None or weight is None or given_weight(weight, masked) is not None:
        return None  # the stock layer reads its weight, which then is the given one
    return (weight, masked) if torch.is_grad_enabled() and masked.leaf.requires_grad else None


class FusedLinear(nn.Linear):
    """`nn.Linear` whose backward makes the weight's gradient at the mask alone."""

    def forward(self, input: Tensor) -> Tensor:
        training = _training_mask(self)
        if training is None:
            return super().forward(input)
        weight, masked = training
        return linear_at_mask(input, weight, self.bias, masked)


class FusedEmbedding(nn.Embedding):
    """`nn.Embedding` whose backward makes the table's gradient at the mask alone."""

    def forward(self, input: Tensor) -> Tensor:
        training = _training_mask(self)
        if training is None:
            return super().forward(input)
        weight, masked = training
        return embedding_at_mask(
            input,
            weight,
            masked,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


_conv1d: dict[type, type] = {}


def _fused_conv1d(stock: type) -> type:
    """Return the fused class of transformers' Conv1D, which may not be importable at our import."""
    if stock not in _conv1d:

        def forward(self, x: Tensor) -> Tensor:
            training = _training_mask(self)
            if training is None:
                return stock.forward(self, x)  # type: ignore[attr-defined]
            weight, masked = training
            return conv1d_at_mask(x, weight, self.bias, masked)

        doc = "transformers' `Conv1D` whose backward makes the weight's gradient at the mask alone."
        _conv1d[stock] = type("FusedConv1D", (stock,), {"forward": forward, "__doc__": doc})
    return _conv1d[stock]


def fused_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return the fused layer for ``weight`` of a module class, None where there is none."""
    if issubclass(cls, nn.Linear):
        return FusedLinear
    if issubclass(cls, nn.Embedding):
        return FusedEmbedding
    # Never imported by us: a model with Conv1D layers has imported it already.
    loaded = sys.modules.get("transformers.pytorch_utils")
    stock = getattr(loaded, "Conv1D", None)
    if stock is not None and issubclass(cls, stock):
        return _fused_conv1d(stock)
    return None
