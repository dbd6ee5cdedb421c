"""Clipping by the norm of gradients of which some are sharded and some are not.

``torch.nn.utils.clip_grad_norm_`` takes either kind alone: leaves are plain tensors, a head that
``fully_shard`` has cut is a ``DTensor``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sparseft.modules.weight_storage import is_sharded

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``.

    A collective where any is sharded: every process calls it, after backward.

    Args:
        parameters: leaves, full parameters, any mix; those without a gradient are passed over.
        max_norm: what the norm may be.
        norm_type: of the p-norm.
        error_if_nonfinite: raise where the norm is NaN or infinite.

    Returns:
        The norm of before, a 0-d tensor, the same on every process.

    Raises:
        RuntimeError: a norm that is not finite, where that is asked for.

    Numerics: without sharded gradients ``torch.nn.utils.clip_grad_norm_``, bit for bit.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> float(clip_grad_norm_([weight], 1.0)), weight.grad
        (5.0, tensor([0.6000, 0.8000]))
    """
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        grad: Any = parameter.grad
        if grad is not None:
            kind = (grad.device_mesh, grad.placements) if is_sharded(grad) else None
            kinds.setdefault(kind, []).append(parameter)
    norms = []
    for held in kinds.values():
        norm: Any = get_total_norm([p.grad for p in held if p.grad is not None], norm_type)
        norms.append(norm.full_tensor() if is_sharded(norm) else norm)
    if not norms:
        return torch.zeros(())
    total = norms[0]
    if len(norms) > 1:
        total = torch.linalg.vector_norm(torch.stack([n.to(total) for n in norms]), norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"the norm of the gradients is {float(total)}, so they cannot be clipped by it. With "
            "GradScaler, unscale_ first and let it skip the step."
        )
    for held in kinds.values():
        clip_grads_with_norm_(held, max_norm, total)
    return total
