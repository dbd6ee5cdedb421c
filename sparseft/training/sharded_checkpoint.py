"""What torch.distributed.checkpoint needs to load masks that move: room of the sizes saved.

``dcp.load`` writes into the tensors it is given. Parts of a `Reselection`'s state have other sizes
at every step, and leaves, moments and weights must not change before the masks have moved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_target"]


def load_target(
    state: Mapping[str, Any],
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    storage_reader: Any = None,
) -> dict[str, Any]:
    """Return a state to give to ``torch.distributed.checkpoint.load`` in place of the live one.

    Needed where masks move in training (`Reselection`); harmless elsewhere, at the price of memory
    for a second copy of what is loaded (with ``compact_state_dict=True`` that of leaves and moments
    alone). Every process calls it::

        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = load_target({"model": model_state, "optimizer": optimizer_state}, folder)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])

    Args:
        state: what was saved, taken from the model and optimizer that go on: dicts of tensors.
        checkpoint_id: the checkpoint's folder.
        storage_reader: or a reader of it.

    Returns:
        The same names with tensors of their own; what masks add to a model's state dict is there as
        it was saved, in its size.

    Raises:
        FileNotFoundError: no such checkpoint.
    """
    from torch.distributed.checkpoint import FileSystemReader

    if storage_reader is None:
        storage_reader = FileSystemReader(os.fspath(checkpoint_id or ""))
    saved = storage_reader.read_metadata().state_dict_metadata
    return _copied(state, "", saved)


def _copied(value: Any, path: str, saved: Mapping[str, Any]) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value)
    if not isinstance(value, Mapping):
        return value
    start = f"{path}." if path else ""
    copied = {key: _copied(inner, f"{start}{key}", saved) for key, inner in value.items()}
    if any(isinstance(inner, Tensor) for inner in value.values()):
        copied = {key: inner for key, inner in copied.items() if not _varies(str(key))}
        for name, found in saved.items():
            key = name.removeprefix(start)
            if name.startswith(start) and _varies(key) and hasattr(found, "size"):
                copied[key] = torch.empty(found.size, dtype=found.properties.dtype)
    return copied


def _varies(key: str) -> bool:
    """Whether a key of a model's state dict is one that masks add, of no fixed size."""
    return "_sparseft_moving." in key or (key.endswith("_rounded") and "diff_" in key)
