"""Tensors that ride in a model's state dict beside its parameters.

Masks that move in training have to be saved and loaded with the leaves they order, by whatever
saves and loads the model: Trainer's checkpoints, its best model, a plain loop. A rider names the
tensors, and takes them back before the parameters are loaded. Where there is none to take them,
loading says so, rather than that leaves and weights do not fit the masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparseft.errors import AttachError, ResumeError
from sparseft.modules.compact import ATTACHMENTS
from sparseft.modules.leaves import leaf_attribute

__all__ = ["Rider", "board", "leave", "listen", "riding", "unlisten"]

# In front of a rider's keys in the state dict, and where a module keeps its rider.
_MOVING = "_sparseft_moving"
_PREFIX = f"{_MOVING}."
_RIDER = "_sparseft_rider"


class Rider(Protocol):
    """What rides: always the same keys, in a state dict and back."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what to save, by name."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave; the model's parameters are loaded right after."""


def _save(module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    rider = module.__dict__.get(_RIDER)
    if rider is not None:
        for key, tensor in rider.tensors().items():
            state_dict[f"{prefix}{_PREFIX}{key}"] = tensor


def _load(module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
    rider, start = module.__dict__.get(_RIDER), prefix + _PREFIX
    if rider is None:
        _refuse_moved(module, state_dict, start)
        return
    found = [key for key in state_dict if key.startswith(start)]
    if found:
        _refuse_own_tensors(module, state_dict, prefix)
        rider.load_tensors({key.removeprefix(start): state_dict.pop(key) for key in found})


def _refuse_moved(module: nn.Module, state_dict: Any, start: str) -> None:
    """Raise ResumeError where masks of a checkpoint moved and nothing here moves masks."""
    for attachment in module.__dict__.get(ATTACHMENTS, ()):
        for name, pattern in attachment.patterns.items():
            saved = state_dict.get(f"{start}indices.{name}")
            if saved is None or torch.equal(saved.to(pattern.indices), pattern.indices):
                continue
            raise ResumeError(
                f"this checkpoint's masks moved in training (its {start}* keys): that of {name!r} "
                "is another than the one attached. Make Reselection(attachment, ...) with the "
                "options of that run first, then load: it moves the masks there."
            )


def _refuse_own_tensors(module: nn.Module, state_dict: Any, prefix: str) -> None:
    """Raise ResumeError where masks are about to move under the tensors that are to be loaded."""
    for attachment in module.__dict__.get(ATTACHMENTS, ()):
        for name, pattern in attachment.patterns.items():
            saved = state_dict.get(f"{prefix}{_PREFIX}indices.{name}")
            if saved is None or torch.equal(saved.to(pattern.indices), pattern.indices):
                continue
            leaf, key = attachment.leaves[name], f"{prefix}{leaf_attribute(name)}"
            values = state_dict.get(key)
            if isinstance(values, Tensor) and values.data_ptr() == leaf.data_ptr():
                raise ResumeError(
                    f"{key!r} was loaded in place (torch.distributed.checkpoint.load does so), but "
                    f"the mask of {name!r} has yet to move to where it was saved. Load into "
                    "sparseft.training.load_target(state, folder) instead of into the model's own "
                    "tensors, then set_state_dict; the base has to be loaded again first."
                )


class _Moving:
    """What keys of riders lead to: torch.distributed.checkpoint follows each through the model."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_fqn_modifiers":
            raise AttributeError(name)
        return self


def listen(model: nn.Module) -> None:
    """Install the hooks on a model, once. They do nothing until something rides."""
    if not any(hook is _save for hook in model._state_dict_hooks.values()):
        model.register_state_dict_post_hook(_save)
        model.register_load_state_dict_pre_hook(_load)


def unlisten(model: nn.Module) -> None:
    """Remove the hooks; found by themselves, because a deep copy has hooks but no handles."""
    for hooks, own in ((model._state_dict_hooks, _save), (model._load_state_dict_pre_hooks, _load)):
        for number, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) is own:  # torch wraps those that get the module
                del hooks[number]


def board(model: nn.Module, rider: Rider) -> None:
    """Let a rider's tensors be part of ``model.state_dict()``.

    Raises:
        AttachError: another one is there.
    """
    if _RIDER in model.__dict__:
        raise AttachError(
            f"a {type(model.__dict__[_RIDER]).__name__} moves masks of this model already; close() "
            "it first."
        )
    listen(model)
    model.__dict__[_RIDER] = rider
    model.__dict__[_MOVING] = _Moving()


def leave(model: nn.Module, rider: Rider) -> None:
    """End what `board` began. The hooks stay as long as masks are attached."""
    if model.__dict__.get(_RIDER) is rider:
        del model.__dict__[_RIDER]
        model.__dict__.pop(_MOVING, None)


def riding(model: nn.Module) -> dict[str, Tensor]:
    """Return what rides in ``model.state_dict()``, by its keys there."""
    out: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        _save(module, out, f"{name}." if name else "", None)
    return out
