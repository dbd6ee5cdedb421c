"""A quantised weight as the dense tensor it stands for, made anew whenever values are read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.modules.dequantise import dequantise, is_quantised, logical_shape
from sparseft.modules.names import ParameterIndex

__all__ = ["DenseView", "readable"]


class DenseView:
    """What code that only reads a parameter may be given in place of a quantised one.

    Size and device are known without values. ``detach()``, any function of torch and any other
    attribute take the dense fp32 value, made then, and kept by nobody: one layer at a time.

    Args:
        module: that has the weight.
        attr: its attribute.
        name: of the parameter, for messages.
    """

    dtype = torch.float32
    is_meta = False
    requires_grad = False

    def __init__(self, module: nn.Module, attr: str, name: str) -> None:
        self._module, self._attr, self._name = module, attr, name
        self.shape = torch.Size(logical_shape(module, attr))
        self.ndim = len(self.shape)
        self.device: torch.device = module._parameters[attr].device  # type: ignore[union-attr]

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return True

    def detach(self) -> Tensor:
        return dequantise(self._module, self._attr, torch.float32, name=self._name)

    def new_empty(self, *size: Any, **options: Any) -> Tensor:
        return torch.empty(0, device=self.device).new_empty(*size, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.detach(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        dense = [a.detach() if isinstance(a, DenseView) else a for a in args]
        return function(*dense, **(kwargs or {}))


def readable(index: ParameterIndex, name: str) -> Any:
    """Return a parameter, or the view of it where it is quantised."""
    owner = index.owners(name)[0]
    return DenseView(*owner, name) if is_quantised(*owner) else index.get(name)
