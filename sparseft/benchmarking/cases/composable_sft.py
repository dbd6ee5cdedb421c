"""What composable-sft does with adapters, in our own words: load, add, subtract.

Its files hold a Python list of index steps per tensor, counted column-major. Loading sums them up
with numpy in 32 bits, turns them into coordinates, and makes coalesced ``sparse_coo`` tensors of
them; applying adds these parameter by parameter, reverting subtracts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparseft.adapter import Adapter

__all__ = ["as_coo", "load", "revert", "save", "subtract_and_add"]

Diffs = Mapping[str, Tensor]


def as_coo(adapter: Adapter, device: torch.device) -> dict[str, Tensor]:
    """Return an adapter's diffs as its loader makes them: coalesced, int64 coordinates."""
    made = {}
    for name, diff in adapter.items():
        at = torch.stack(torch.unravel_index(diff.indices.to(device).long(), diff.shape))
        made[name] = torch.sparse_coo_tensor(
            at,
            diff.values.to(device),
            diff.shape,
            is_coalesced=True,
            check_invariants=False,
        )
    return made


@torch.no_grad()
def subtract_and_add(
    model: nn.Module, off: Mapping[int, float], on: Mapping[int, float], adapters: Sequence[Diffs]
) -> None:
    """Take adapters off by subtraction, the last one first, and put others on by addition.

    Args:
        model: changed in place.
        off, on: place in ``adapters`` -> coefficient. It has none of its own; other than 1, the
            addition takes it as ``alpha``.
        adapters: by `as_coo`; on another device, they are copied over, as it does.
    """
    for number, coeff in reversed(list(off.items())):
        _add(model, adapters[number], -coeff)
    for number, coeff in on.items():
        _add(model, adapters[number], coeff)


def revert(model: nn.Module, off: Mapping[int, float], adapters: Sequence[Diffs]) -> None:
    """Take adapters off by subtraction, the last one first."""
    subtract_and_add(model, off, {}, adapters)


def _add(model: nn.Module, diffs: Diffs, coeff: float) -> None:
    for name, diff in diffs.items():
        parameter: Tensor = model.get_parameter(name)
        own = diff.to(parameter.device)
        if coeff == 1:
            parameter += own
        elif coeff == -1:
            parameter -= own
        else:
            parameter.add_(own, alpha=coeff)


def save(adapter: Adapter, file: Path) -> None:
    """Write the file as it does, the first step of each list a numpy integer."""
    diffs = {}
    for name, diff in adapter.items():
        shape = tuple(diff.shape)
        at = np.unravel_index(diff.indices.numpy().astype(np.int64), shape)
        flat = np.ravel_multi_index(at, shape, order="F")
        order = np.argsort(flat, kind="stable")
        flat = flat[order]
        steps: list[Any] = np.diff(flat).tolist()
        diffs[name] = {
            "size": torch.Size(shape),
            "index_steps": [flat[0], *steps] if len(flat) else [],
            "values": diff.values[torch.from_numpy(order)].clone(),
        }
    torch.save({"diffs": diffs, "abs": {}}, file)


def load(file: Path) -> dict[str, Tensor]:
    """Read a file of `save` as it does, but under ``weights_only`` with the list of what its files
    need; it leaves that to ``torch.load``'s default, which has refused them since 2.6.
    """
    scalar: Any = np.int64(0).__reduce__()[0]  # its module has another name in numpy 2
    with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype(np.int64))]):
        content = torch.load(file, weights_only=True)
    return {name: _decoded(entry) for name, entry in content["diffs"].items()}


def _decoded(entry: Mapping[str, Any]) -> Tensor:
    size = entry["size"]
    flat = np.cumsum(entry["index_steps"], dtype=np.int32)
    divisors = np.concatenate([[1], np.cumprod(list(size))[:-1]], dtype=np.int32)
    sizes = np.array(list(size), dtype=np.int32)
    at = torch.from_numpy(flat[None] // divisors[:, None] % sizes[:, None])
    return torch.sparse_coo_tensor(at, entry["values"], size, check_invariants=False).coalesce()
