"""Tokens whose output got no gradient need no backward: their rows of dY are exactly zero.

They are common: every padded position, 85 % of a masked language model's logits, and in a
classifier's last layer all positions but the first. Both products of a linear layer's backward
(dX = dY W and dW = dY^T X) then run over the others alone.

Off CPUs this is not done: looking at the values would make the host wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.ops._common import watched

__all__ = ["live_rows"]

# Below this share of zero rows the copies of the others are not worth it.
_LEAST = 0.25


def live_rows(grad_output: Tensor, input: Tensor) -> Tensor | None:
    """Return the positions of the rows of ``grad_output`` that are not all zero, if they pay.

    Args:
        grad_output: (T, M) floating.
        input: (T, N) floating. Where it is not finite in a skipped row the dense product is NaN
            (0 * inf), so nothing is skipped then.

    Returns:
        (L,) int64 ascending, or None: fewer than a quarter of the rows are zero, the tensors are
        not on a CPU, or a tracer, transform or autograd is looking on.
    """
    tokens, width = grad_output.shape
    if grad_output.device.type != "cpu" or width == 0 or watched(grad_output, input):
        return None
    least = max(1.0, _LEAST * tokens)
    # A first look at one column: a real gradient is rarely zero there, so most calls end here.
    if tokens - int(torch.count_nonzero(grad_output[:, 0])) < least:
        return None
    # The largest magnitude of each row, without a temporary of the operand's size; NaN stays NaN.
    largest = torch.linalg.vector_norm(grad_output, ord=torch.inf, dim=1)
    zero = largest == 0
    if int(zero.sum()) < least:
        return None
    if not bool(input[zero].sum(dtype=torch.float64).isfinite()):
        return None
    return (~zero).nonzero().view(-1)
