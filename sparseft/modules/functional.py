"""Masked weights under `torch.func`, forward-mode differentiation and `functional_call`.

There the weight is spelled out in ordinary torch operations: ``W`` with ``rn(base + leaf)`` put in
at the mask, which every transform can differentiate and batch, twice if asked. Each use costs a
copy of the weight and, in a backward, its dense gradient; loops that train need neither and do not
come here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from sparseft.modules.leaves import MaskedParameter

__all__ = ["given_weight"]


# torch.compile enters the transforms that it traces, and asks here, then; it guards on those around
# it by itself. (Nothing else about the answer can be traced.)
def _transformed() -> bool:
    """Whether a function transform or forward-mode differentiation looks at this call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def given_weight(weight: Tensor, masked: MaskedParameter) -> Tensor | None:
    """Return what a masked layer computes with where its parameters were passed to it.

    A leaf that was passed in (``functional_call``) is put in at the mask, and gets the gradient
    there; a weight that was passed in alone is taken as it is. Under a transform the masked weight
    is spelled out.

    Args:
        weight: what the module has in its parameter's place.
        masked: the mask on it.

    Returns:
        A tensor of the weight's shape and dtype, or None in the ordinary case: go on as always.

    Numerics: values are those of the masked weight, bit for bit, where the leaf is the trained one.
    """
    home = masked.home
    leaf = masked.leaf if home is None else home[0]._parameters.get(home[1])
    if leaf is not None and leaf is not masked.leaf:
        return _with_diff(weight, masked, leaf)
    if not masked.is_weight(weight):  # e.g. a copy of another dtype, whose gradient nobody wants
        wanted = weight.requires_grad and torch.is_grad_enabled()
        return weight if wanted or _transformed() else None
    if masked.leaf.requires_grad and torch.is_grad_enabled() and _transformed():
        return _with_diff(weight.detach(), masked, masked.leaf)
    return None


def _with_diff(weight: Tensor, masked: MaskedParameter, leaf: Tensor) -> Tensor:
    """``weight`` with ``rn(base + leaf)`` at the mask, differentiable in both."""
    wide = torch.promote_types(masked.base.dtype, leaf.dtype)
    entries = (masked.base.to(wide) + leaf.to(wide)).to(weight.dtype)
    return weight.reshape(-1).scatter(0, masked.indices.long(), entries).view(weight.shape)
