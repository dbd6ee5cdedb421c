"""One optimizer step on the compact vector of one tensor, and the weight rewritten in the same
pass.

The update is torch.optim's, on ``values`` (the fp32 diff): so weight decay pulls the diff to zero,
which is the weight to its base. Then ``weight.flatten()[indices] = rn(base + values)``: only masked
entries are ever written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseft.errors import DiffError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._common import check_entries, operator
from sparseft.ops.apply_diff import write_sum_reference_

__all__ = ["adamw_step_", "sgd_step_"]

# Entries updated at a time: five fp32 vectors of this length (640 KiB) stay in a core's L2 through
# all passes.
_CHUNK = 1 << 15


# The definitions.


def adamw_update_reference_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), in torch.optim's order of operations.

    ``values *= 1 - lr*wd;  m += (1-b1)(g - m);  v = b2 v + (1-b2) g^2;
    values -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)``
    """
    if weight_decay != 0:
        values.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1**step)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    values.addcdiv_(exp_avg, denominator, value=-step_size)


def sgd_update_reference_(
    values: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    first: bool,
) -> None:
    """SGD with momentum as in torch.optim; the buffer starts as the first gradient.

    ``g += wd * values;  b = momentum * b + (1 - dampening) g;  values -= lr * (g + momentum * b if
    nesterov else b)``
    """
    if weight_decay != 0:
        grad = grad.add(values, alpha=weight_decay)
    if momentum_buffer is not None:
        if first:
            momentum_buffer.copy_(grad)
        else:
            momentum_buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
        grad = grad.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    values.add_(grad, alpha=-lr)


def _chunks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut vectors of one length into pieces of _CHUNK; short ones pass as they are."""
    if vectors[0].numel() <= _CHUNK:
        return iter((vectors,))
    return zip(*(v.split(_CHUNK) for v in vectors), strict=True)


# Registration: dispatch, fake. (In-place updates record no gradient.)


@operator(
    "adamw_step_(Tensor(a!) values, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!) weight, Tensor base, Tensor indices, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, int step, float? grad_scale=None, str backend='') -> ()"
)
def _adamw_step_(
    values, grad, exp_avg, exp_avg_sq, weight, base, indices,
    lr, beta1, beta2, eps, weight_decay, step, grad_scale=None, backend="",
):  # fmt: skip
    resolve_backend("adamw_step_", values, grad, weight, backend=backend)
    for u, g, m, v, b, i in _chunks(values, grad, exp_avg, exp_avg_sq, base, indices):
        adamw_update_reference_(
            u, g if grad_scale is None else g * grad_scale, m, v,
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step,
        )  # fmt: skip
        write_sum_reference_(weight, i, b, u)


@operator(
    "sgd_step_(Tensor(a!) values, Tensor grad, Tensor(b!)? momentum_buffer, Tensor(c!) weight, "
    "Tensor base, Tensor indices, float lr, float momentum, float dampening, bool nesterov, "
    "float weight_decay, bool first, float? grad_scale=None, str backend='') -> ()"
)
def _sgd_step_(
    values, grad, momentum_buffer, weight, base, indices,
    lr, momentum, dampening, nesterov, weight_decay, first, grad_scale=None, backend="",
):  # fmt: skip
    resolve_backend("sgd_step_", values, grad, weight, backend=backend)
    buffer = values if momentum_buffer is None else momentum_buffer
    for u, g, m, b, i in _chunks(values, grad, buffer, base, indices):
        sgd_update_reference_(
            u, g if grad_scale is None else g * grad_scale, None if momentum_buffer is None else m,
            lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov,
            weight_decay=weight_decay, first=first,
        )  # fmt: skip
        write_sum_reference_(weight, i, b, u)


@torch.library.register_fake("sparseft::adamw_step_")
def _(values, grad, exp_avg, exp_avg_sq, weight, base, indices,
      lr, beta1, beta2, eps, weight_decay, step, grad_scale=None, backend=""):  # fmt: skip
    return None


@torch.library.register_fake("sparseft::sgd_step_")
def _(values, grad, momentum_buffer, weight, base, indices, lr, momentum, dampening,
      nesterov, weight_decay, first, grad_scale=None, backend=""):  # fmt: skip
    return None


# Public functions.


def _check_state(op: str, values: Tensor, **state: Tensor | None) -> None:
    for name, tensor in (("values", values), *state.items()):
        if tensor is None:
            continue
        if tensor.dtype != values.dtype or not tensor.is_floating_point():
            raise DiffError(f"{op}: {name} is {tensor.dtype} but values are {values.dtype}")
        if not tensor.is_contiguous():
            raise DiffError(
                f"{op}: {name} has strides {tensor.stride()}; compact vectors are contiguous"
            )


def adamw_step_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    base: Tensor,
    indices: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | None = None,
    backend: str | None = None,
) -> None:
    """Take one AdamW step on a diff in place and rewrite the weight: ``weight[indices] = rn(base +
    values)``.

    Args:
        values: (nnz,) fp32, the diff; updated.
        grad: (nnz,) its gradient; read only.
        exp_avg: (nnz,) first moment; updated.
        exp_avg_sq: (nnz,) second moment; updated.
        weight: the masked weight, any shape and floating dtype; masked entries are overwritten,
            never read.
        base: (nnz,) the weight's entries before any diff.
        indices: (nnz,) int32 or int64, flat row-major, ascending.
        lr, beta1, beta2, eps, weight_decay: as in ``torch.optim.AdamW``.
        step: 1 at the first step.
        grad_scale: multiplies the gradient (clipping, loss scale); None leaves it untouched.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``; None takes the context's or the
            environment's.

    Raises:
        DiffError: vectors that do not belong together.
        BackendError: ``"triton"`` was asked for (it has no kernel for this op yet).

    Numerics: bit-equal to ``torch.optim.AdamW(foreach=False, fused=False)`` on ``values``; one
    rounding into the weight. Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization",
    ICLR 2019, algorithm 2.
    """
    check_entries(
        "adamw_step_", weight, indices,
        values=values, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, base=base,
    )  # fmt: skip
    _check_state("adamw_step_", values, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _adamw_step_(
        values.detach(), grad.detach(), exp_avg, exp_avg_sq, weight.detach(), base, indices,
        lr, beta1, beta2, eps, weight_decay, step, grad_scale, backend or "",
    )  # fmt: skip


def sgd_step_(
    values: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    weight: Tensor,
    base: Tensor,
    indices: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    first: bool = False,
    grad_scale: float | None = None,
    backend: str | None = None,
) -> None:
    """Take one SGD step on a diff in place and rewrite the weight: ``weight[indices] = rn(base +
    values)``.

    Args:
        values: (nnz,) fp32, the diff; updated.
        grad: (nnz,) its gradient; read only.
        momentum_buffer: (nnz,) updated, or None when ``momentum`` is 0.
        weight, base, indices: as in :func:`adamw_step_`.
        lr, momentum, dampening, nesterov, weight_decay: as in ``torch.optim.SGD`` (decay is added
            to the gradient).
        first: the buffer holds nothing yet and becomes the gradient itself.
        grad_scale, backend: as in :func:`adamw_step_`.

    Raises:
        DiffError: vectors that do not belong together, or a buffer and ``momentum`` that disagree.
        BackendError: ``"triton"`` was asked for (it has no kernel for this op yet).

    Numerics: bit-equal to ``torch.optim.SGD(foreach=False, fused=False)`` on ``values``; one
    rounding into the weight.
    """
    if (momentum_buffer is None) != (momentum == 0):
        raise DiffError(
            f"sgd_step_: momentum={momentum} with momentum_buffer "
            f"{'missing' if momentum_buffer is None else 'given'}; give a buffer exactly when "
            "momentum is not 0"
        )
    check_entries(
        "sgd_step_", weight, indices,
        values=values, grad=grad, momentum_buffer=momentum_buffer, base=base,
    )  # fmt: skip
    _check_state("sgd_step_", values, grad=grad, momentum_buffer=momentum_buffer)
    _sgd_step_(
        values.detach(), grad.detach(), momentum_buffer, weight.detach(), base, indices,
        lr, momentum, dampening, nesterov, weight_decay, first, grad_scale, backend or "",
    )  # fmt: skip
