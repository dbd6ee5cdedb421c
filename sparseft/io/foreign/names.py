"""Parameter names of the bare model from the names that trainers, wrappers and PEFT write."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparseft.errors import AdapterFormatError

__all__ = ["checked_shape", "module_of", "parameter_name"]

# Put in by wrappers at any depth: torch.compile, FSDP, activation checkpointing, PEFT.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_PEFT = ["base_model", "model"]


def parameter_name(key: str, *, module: bool = False) -> str:
    """Return the name a parameter has in the bare model.

    Args:
        key: as a file has it, e.g. ``base_model.model.encoder.q.base_layer.weight``.
        module: ``key`` names a module; its ``weight`` is meant.
    """
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    # Only in front: deeper down these are somebody's own attributes.
    while len(parts) > 1 and (parts[0] == "module" or (parts[:2] == _PEFT and len(parts) > 2)):
        parts = parts[1:] if parts[0] == "module" else parts[2:]
    name = ".".join(parts)
    return f"{name}.weight" if module else name


def module_of(name: str) -> str:
    """Return the module a parameter belongs to, "" for one of the model itself."""
    return name.rpartition(".")[0]


def checked_shape(shape: object, what: str) -> tuple[int, ...]:
    """Return ``shape`` as a tuple of sizes that int64 positions can address, or raise.

    Args:
        shape: anything a file may hold there.
        what: file and tensor, for the message.

    Raises:
        AdapterFormatError: not a short sequence of non-negative integers, or too many entries.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes) or len(shape) > 64:
        raise AdapterFormatError(f"{what}: shape is {type(shape).__name__}, wanted a few integers.")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise AdapterFormatError(
            f"{what}: shape is {str(list(shape))[:80]}, wanted integers of 0 or more."
        )
    if math.prod(shape) >= 2**63:
        raise AdapterFormatError(f"{what}: shape {list(shape)} has more than 2**63 - 1 entries.")
    return tuple(shape)
