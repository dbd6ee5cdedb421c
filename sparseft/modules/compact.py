"""Compact state dicts: leaves, fully trained parameters and buffers, without the frozen weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparseft.modules.dequantise import drop_scales

__all__ = ["ATTACHMENTS", "start_compact_state_dict", "stop_compact_state_dict"]

# Where a model keeps its attachments: `model.__dict__[ATTACHMENTS]`, the oldest first.
ATTACHMENTS = "_sparseft_attachments"
# Which attributes stand for keys of the state dict: `module.__dict__[_NAMED]`.
_NAMED = "_sparseft_keys"


def _drop_frozen(module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """State dict post-hook of a model with masks. Buffers stay: training may have changed them."""
    attachments = module.__dict__.get(ATTACHMENTS, ())
    if not any(a.compact_state_dict for a in attachments):
        return
    kept = {id(p) for a in attachments for p in a.parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in kept:
            state_dict.pop(prefix + name, None)
    for name, part in module.named_modules():
        drop_scales(part, state_dict, f"{prefix}{name}." if name else prefix)


def _nothing_missing(module: nn.Module, incompatible_keys: Any) -> None:
    """Load post-hook: a compact state dict lacks every frozen weight, and that is no fault.

    Trainer would list them all in a warning, and fail where the model is not one of transformers'.
    """
    kept = {id(p) for a in module.__dict__.get(ATTACHMENTS, ()) for p in a.parameters()}
    names = {True: set[str](), False: set[str]()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter) in kept].add(name)
    missing = incompatible_keys.missing_keys
    if names[False] and names[False] <= set(missing) and names[True].isdisjoint(missing):
        missing[:] = [name for name in missing if name not in names[False]]


def _name_keys(model: nn.Module) -> None:
    """Give modules an attribute for each key that is none of theirs in their compact state dict.

    torch.distributed.checkpoint's get_state_dict follows every key through the model by getattr.
    """
    for attachment in model.__dict__.get(ATTACHMENTS, ()):
        for masked in attachment._masked.values():
            if masked.compact and masked.home is not None:
                module, leaf = masked.home
                names = {f"{leaf}_base", f"{leaf}_rounded"}
                module.__dict__.setdefault(_NAMED, set()).update(names)
                module.__dict__.update(dict.fromkeys(names, "a key of the compact state dict"))


def start_compact_state_dict(model: nn.Module) -> None:
    """Install the hooks on a model, once. They do nothing unless an attachment asks for it, or a
    compact state dict is loaded.
    """
    _name_keys(model)
    if not any(hook is _drop_frozen for hook in model._state_dict_hooks.values()):
        model.register_state_dict_post_hook(_drop_frozen)
        model.register_load_state_dict_post_hook(_nothing_missing)


def stop_compact_state_dict(model: nn.Module) -> None:
    """Remove the hooks; found by themselves, because a deep copy has hooks but no handles."""
    for module in model.modules():
        for name in module.__dict__.pop(_NAMED, ()):
            module.__dict__.pop(name, None)
    own = (_drop_frozen, _nothing_missing)
    for hooks in (model._state_dict_hooks, model._load_state_dict_post_hooks):
        for number, hook in list(hooks.items()):
            if hook in own:
                del hooks[number]
