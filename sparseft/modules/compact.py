"""Compact state dicts: leaves, fully trained parameters and buffers, without the frozen weights."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["ATTACHMENTS", "start_compact_state_dict", "stop_compact_state_dict"]

# Where a model keeps its attachments: `model.__dict__[ATTACHMENTS]`, the oldest first.
ATTACHMENTS = "_sparseft_attachments"


def _drop_frozen(module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """State dict post-hook of a model with masks. Buffers stay: training may have changed them."""
    attachments = module.__dict__.get(ATTACHMENTS, ())
    if not any(a.compact_state_dict for a in attachments):
        return
    kept = {id(p) for a in attachments for p in a.parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in kept:
            state_dict.pop(prefix + name, None)


def start_compact_state_dict(model: nn.Module) -> None:
    """Install the hook on a model, once. It does nothing unless an attachment asks for it."""
    if not any(hook is _drop_frozen for hook in model._state_dict_hooks.values()):
        model.register_state_dict_post_hook(_drop_frozen)


def stop_compact_state_dict(model: nn.Module) -> None:
    """Remove the hook; found by itself, because a deep copy has hooks but no handles."""
    for number, hook in list(model._state_dict_hooks.items()):
        if hook is _drop_frozen:
            del model._state_dict_hooks[number]
