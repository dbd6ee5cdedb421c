"""What checkpoints without weights add after stochastic rounding: the rounded entries.

``rn(base + leaf)`` is then not what the weight holds, so a run that went on from base and leaf
alone would differ from the next forward on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparseft.errors import BaseMismatchError
from sparseft.modules.leaves import MaskedParameter, leaf_attribute
from sparseft.modules.names import STATE_KEY
from sparseft.modules.weight_storage import read_entries
from sparseft.ops._rounding import rounds_either_way

__all__ = ["rounded_entries", "rounded_key", "rounded_keys", "rounded_tensors", "write_rounded_"]


def rounded_key(prefix: str, attr: str) -> str:
    """Return where in a state dict the entries of a module's masked attribute are."""
    return f"{prefix}{leaf_attribute(attr)}_rounded"


def rounded_entries(masked: MaskedParameter) -> Tensor | None:
    """Return (nnz,) entries of a weight, where some were not rounded to nearest; else None."""
    if masked.separate or masked.weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    masked.follow_weight_()
    found = read_entries(masked.weight, masked.indices, backend=masked.backend)
    if torch.equal(found, masked.expected_entries(masked.leaf)):
        return None
    return found if rounds_either_way(found, masked.base, masked.leaf) else None


@torch.no_grad()
def write_rounded_(masked: MaskedParameter, entries: Tensor | None) -> None:
    """Write what `rounded_entries` gave, if the weight has that dtype; its leaf is loaded already.

    Raises:
        BaseMismatchError: they are no roundings of this base plus this leaf.
    """
    if entries is None or entries.dtype != masked.weight.dtype:
        return
    found = entries.to(masked.weight.device)
    if found.shape != masked.leaf.shape or not rounds_either_way(found, masked.base, masked.leaf):
        raise BaseMismatchError(
            f"the checkpoint's rounded entries of {masked.name!r} are not this base plus its diff. "
            "Load the base model that the run began with, and attach its masks, before loading."
        )
    masked.write_entries_(found)


def _owned(model: nn.Module) -> Iterator[tuple[str, MaskedParameter]]:
    """Yield the key and the masked parameter of each leaf in a model."""
    for name, module in model.named_modules():
        for attr, masked in module.__dict__.get(STATE_KEY, {}).items():
            if module._parameters.get(leaf_attribute(attr)) is masked.leaf:
                yield rounded_key(f"{name}." if name else "", attr), masked


def rounded_keys(model: nn.Module) -> set[str]:
    """Return the keys that `rounded_tensors` may have."""
    return {key for key, _ in _owned(model)}


def rounded_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of a model that were not rounded to nearest, by state dict key."""
    found = {key: rounded_entries(masked) for key, masked in _owned(model)}
    return {key: entries for key, entries in found.items() if entries is not None}
