"""Make the inputs of reentrantly checkpointed blocks require grad.

``torch.utils.checkpoint`` with ``use_reentrant=True`` gives gradients only to blocks one of whose
inputs requires grad, and above frozen embeddings none does.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["InputGrads", "hook_input_embeddings", "unhook_input_embeddings"]

InputGrads = Literal["auto"] | bool


def _reentrant(model: nn.Module) -> bool:
    """Whether a transformers model checkpoints reentrantly at this moment."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return True
    return False


def _require_grad(model: nn.Module | None, module: nn.Module, args: Any, output: Any) -> None:
    wanted = isinstance(output, Tensor) and torch.is_grad_enabled() and not output.requires_grad
    if wanted and output.is_floating_point() and (model is None or _reentrant(model)):
        output.requires_grad_(True)


def _input_modules(model: nn.Module) -> list[nn.Module]:
    getter = getattr(model, "get_input_embeddings", None)
    if getter is not None:
        try:
            found = getter()
        except (NotImplementedError, AttributeError):
            found = None
        if isinstance(found, nn.Module):
            return [found]
    return [m for m in model.modules() if isinstance(m, nn.Embedding)]


def hook_input_embeddings(model: nn.Module, mode: InputGrads) -> list[tuple[nn.Module, int]]:
    """Let embedding outputs require grad where reentrant checkpointing needs it.

    Args:
        model: the model with masks.
        mode: ``"auto"``: while a transformers model has reentrant checkpointing on (asked at each
            forward, because Trainer turns it on late). True: always. False: never. Not always by
            itself, because activations of layers below the first mask would be kept for nothing.

    Returns:
        What `unhook_input_embeddings` takes.
    """
    if mode is False:
        return []
    if mode == "auto" and not any(hasattr(m, "gradient_checkpointing") for m in model.modules()):
        return []
    asked = model if mode == "auto" else None
    return [
        (module, module.register_forward_hook(partial(_require_grad, asked)).id)
        for module in _input_modules(model)
    ]


def unhook_input_embeddings(hooks: list[tuple[nn.Module, int]]) -> None:
    """Remove the hooks; by number, because a deep copy keeps numbers but not handles."""
    for module, number in hooks:
        module._forward_hooks.pop(number, None)
