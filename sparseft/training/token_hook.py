"""Count the input tokens of every training forward of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparseft.training.meter import TrainingMeter, tokens_in

__all__ = ["count_tokens"]


class _TokenHook:
    """A forward pre-hook. Copies and pickles of the model have one that counts nothing."""

    def __init__(self, meter: TrainingMeter | None = None) -> None:
        self.meter = (lambda: None) if meter is None else weakref.ref(meter)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # In a graph that torch.compile makes, a count would be a constant, or a recompilation.
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        meter = self.meter()
        if meter is not None:
            meter.tokens(tokens_in(kwargs) or tokens_in(args))

    def __reduce__(self) -> Any:
        return _TokenHook, ()


def count_tokens(model: nn.Module, meter: TrainingMeter) -> Callable[[], None]:
    """Count into a meter from now on; returns what ends it."""
    return model.register_forward_pre_hook(_TokenHook(meter), with_kwargs=True).remove
