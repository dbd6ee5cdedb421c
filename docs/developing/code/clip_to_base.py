"""Hold entries of a weight within a distance of their base values (a trust region)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.errors import DiffError, OptionError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._common import check_entries, flat_chunks, operator

__all__ = ["clip_to_base_"]


def clip_to_base_reference_(weight: Tensor, indices: Tensor, base: Tensor, limit: float) -> None:
    """The definition: ``clamp(weight, base - limit, base + limit)`` at ``indices``, in fp32."""
    for entries, flat, address in flat_chunks("clip_to_base_", weight, indices, write=True):
        here, centre = flat[address].float(), base[entries].float()
        here = torch.where(here < centre - limit, centre - limit, here)
        here = torch.where(here > centre + limit, centre + limit, here)
        flat.put_(address, here.to(weight.dtype))


@operator(
    "clip_to_base_(Tensor(a!) weight, Tensor indices, Tensor base, float limit, str backend='')"
    " -> ()"
)
def _clip_to_base_(
    weight: Tensor, indices: Tensor, base: Tensor, limit: float, backend: str = ""
) -> None:
    if resolve_backend("clip_to_base_", weight, indices, base, backend=backend) == "triton":
        from clip_kernel import launch_clip_to_base  # in the tree: sparseft_kernels.clip

        return launch_clip_to_base(weight, indices, base, limit)
    return clip_to_base_reference_(weight, indices, base, limit)


@torch.library.register_fake("sparseft::clip_to_base_")
def _(weight, indices, base, limit, backend=""):
    return None


def clip_to_base_(
    weight: Tensor, indices: Tensor, base: Tensor, limit: float, *, backend: str | None = None
) -> Tensor:
    """Clip ``weight``'s entries at ``indices`` to ``[base - limit, base + limit]``, in place.

    Args:
        weight: any shape, float32, bfloat16 or float16.
        indices: (nnz,) int32 or int64, flat row-major, ascending and unique.
        base: (nnz,) floating, the values to stay near.
        limit: the distance, 0 or more.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``; None: the ambient choice.

    Returns:
        The weight.

    Raises:
        DiffError: shapes, dtypes or devices that do not fit; a weight that wants a gradient.
        OptionError: a negative or NaN limit.

    Numerics: compared and clipped in fp32, rounded once to the weight's dtype. Reference and kernel
    give the same bits. A NaN stays a NaN.

    Example:
        >>> weight = torch.tensor([1.0, 5.0, -9.0])
        >>> clip_to_base_(weight, torch.tensor([1, 2]), torch.tensor([4.5, -8.0]), 0.25)
        tensor([ 1.0000,  4.7500, -8.2500])
    """
    check_entries("clip_to_base_", weight, indices, base=base)
    if weight.dtype == torch.float64:
        raise DiffError("clip_to_base_: weight is float64; it clips in fp32. Pass float32.")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise DiffError("clip_to_base_: weight requires grad; call it under torch.no_grad().")
    if not limit >= 0:
        raise OptionError(f"clip_to_base_: {limit=}; wanted 0 or more.")
    _clip_to_base_(weight, indices, base, float(limit), backend or "")
    return weight
