"""One optimizer step on compact vectors, and the weights rewritten in the same pass.

The update is torch.optim's, on ``values`` (the fp32 diff): so weight decay pulls the diff to zero,
which is the weight to its base. Then ``weight.flatten()[indices] = rn(base + values)``: only masked
entries are ever written, and none is read.

`adamw_step_`, `sgd_step_` and `lion_step_` take one tensor; the registered ``sparse_step_``, which
the optimizers call, takes all tensors of an optimizer, with the options of
:class:`sparseft.optim.SparseAdamW` (8-bit moments, stochastic rounding, device scalars).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseft.errors import BackendError, DiffError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._common import accumulation_dtype, bits, check_entries, flat_chunks, operator
from sparseft.ops._moments import QUANTUM, decode_moment, encode_moment_
from sparseft.ops._rounding import round_stochastically
from sparseft.ops.apply_diff import sum_entries

__all__ = ["HYPER", "adamw_step_", "lion_step_", "sgd_step_", "sparse_step_"]

# One group's row of hyper-parameters, the same for every rule. a, b: the betas of AdamW and Lion,
# momentum and dampening of SGD.
HYPER = ("lr", "weight_decay", "a", "b", "eps", "nesterov")

# Entries updated at a time, a multiple of QUANTUM: temporaries stay at 512 KiB each. Longer pieces
# were no faster on a CPU, shorter ones pay torch's call overhead (32 Ki: 5 % slower at 10 %
# density).
_CHUNK = 1 << 17


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


def lion_update_reference_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    ``values *= 1 - lr*wd;  values -= lr * sign(m + (1-b1)(g - m));  m += (1-b2)(g - m)``
    """
    if weight_decay != 0:
        values.mul_(1 - lr * weight_decay)
    values.add_(torch.lerp(exp_avg, grad, 1 - beta1).sign_(), alpha=-lr)
    exp_avg.lerp_(grad, 1 - beta2)


def _update_(
    rule: str,
    values: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    hyper: Sequence[float],
    step: int,
) -> None:
    """Apply a rule with a row of hyper-parameters; ``step`` is 1 at the first."""
    lr, decay, a, b, eps, nesterov = hyper
    if rule == "adamw":
        adamw_update_reference_(
            values, grad, first, second,  # type: ignore[arg-type]  # AdamW has both moments
            lr=lr, beta1=a, beta2=b, eps=eps, weight_decay=decay, step=step,
        )  # fmt: skip
    elif rule == "sgd":
        sgd_update_reference_(
            values, grad, first, lr=lr, momentum=a, dampening=b, nesterov=bool(nesterov),
            weight_decay=decay, first=step == 1,
        )  # fmt: skip
    else:
        lion_update_reference_(
            values, grad, first,  # type: ignore[arg-type]  # Lion has one
            lr=lr, beta1=a, beta2=b, weight_decay=decay,
        )  # fmt: skip


def _write_(
    weight: Tensor,
    indices: Tensor,
    base: Tensor,
    values: Tensor,
    stream: tuple[int, int, int] | None,
) -> None:
    """``weight.flatten()[indices] = rn(base + values)``; with (seed, id, step), stochastically."""
    if stream is None:
        total = sum_entries(base, values, weight.dtype)
    else:
        wide = sum_entries(base, values, accumulation_dtype(base.dtype, values.dtype))
        seed, tensor, step = stream
        total = round_stochastically(
            wide, weight.dtype, indices, seed=seed, tensor=tensor, step=step
        )
    # scatter_ takes half the time of put_ and index_copy_ on a few thousand entries. On integers:
    # of bf16 and fp16 torch's CPU scatter_ rewrites the whole tensor, NaN payloads included.
    total = bits(total)
    if weight.is_contiguous():
        bits(weight).view(-1).scatter_(0, indices.long(), total)
        return
    for entries, flat, address in flat_chunks("sparse_step_", bits(weight), indices, write=True):
        flat.scatter_(0, address, total[entries])


def step_reference_(
    rule: str,
    hyper: Sequence[float],
    step: int,
    values: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    first_scale: Tensor | None = None,
    second_scale: Tensor | None = None,
    written: tuple[Tensor, Tensor, Tensor] | None = None,
    grad_scale: Tensor | float | None = None,
    stream: tuple[int, int, int] | None = None,
) -> None:
    """One step of one tensor, and of its weight where ``written`` is (weight, base, indices).

    Moments with scales are decoded, updated and encoded again, see :mod:`sparseft.ops._moments`.
    """
    if first_scale is not None:
        _eight_bit_step_(
            rule, hyper, step, values, grad, first, second, first_scale, second_scale, grad_scale
        )
    elif written is None or values.numel() <= _CHUNK:
        scaled = grad if grad_scale is None else grad * grad_scale
        _update_(rule, values, scaled, first, second, hyper, step)
    else:
        for start in range(0, values.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            m, v = (None if x is None else x[part] for x in (first, second))
            scaled = grad[part] if grad_scale is None else grad[part] * grad_scale
            _update_(rule, values[part], scaled, m, v, hyper, step)
    if written is not None:
        weight, base, indices = written
        if values.numel() <= _CHUNK:
            _write_(weight, indices, base, values, stream)
        else:
            for i, b, u in zip(*(x.split(_CHUNK) for x in (indices, base, values)), strict=True):
                _write_(weight, i, b, u, stream)


def _eight_bit_step_(
    rule, hyper, step, values, grad, first, second, first_scale, second_scale, grad_scale
) -> None:
    flat = values.reshape(-1)  # a copy where values are strided
    gradient = grad.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        scales = slice(start // QUANTUM, (start + _CHUNK) // QUANTUM)
        u, g = flat[part], gradient[part]
        m = decode_moment(first.view(-1)[part], first_scale[scales]).to(u.dtype)
        v = None
        if second is not None:
            v = decode_moment(second.view(-1)[part], second_scale[scales]).to(u.dtype)
        _update_(rule, u, g if grad_scale is None else g * grad_scale, m, v, hyper, step)
        encode_moment_(m, first.view(-1)[part], first_scale[scales])
        if v is not None:
            encode_moment_(v, second.view(-1)[part], second_scale[scales])
    if not values.is_contiguous():
        values.copy_(flat.view_as(values))


# Registration: dispatch, fake. (In-place updates record no gradient.)


@operator(
    "sparse_step_(str rule, Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] firsts, "
    "Tensor(c!)[] seconds, Tensor(d!)[] first_scales, Tensor(e!)[] second_scales, "
    "Tensor(f!)[] weights, Tensor[] bases, Tensor[] indices, Tensor(g!)[] steps, int[] groups, "
    "int[] ids, float[] hyper, Tensor?[] lr, Tensor? grad_scale=None, Tensor? found_inf=None, "
    "int? seed=None, str backend='') -> ()"
)
def sparse_step_(
    rule, values, grads, firsts, seconds, first_scales, second_scales, weights, bases, indices,
    steps, groups, ids, hyper, lr, grad_scale=None, found_inf=None, seed=None, backend="",
):  # fmt: skip
    """Take one step on every tensor of an optimizer; the arguments are `launch_step`'s, ``hyper``
    flat.
    """
    rows = [hyper[i : i + len(HYPER)] for i in range(0, len(hyper), len(HYPER))]
    if resolve_backend("sparse_step_", *values, *grads, *weights, backend=backend) == "triton":
        from sparseft_kernels.sparse_step import launch_step

        return launch_step(
            rule, values, grads, firsts, seconds, first_scales, second_scales, weights, bases,
            indices, steps, groups, ids, rows, lr, grad_scale, found_inf, seed,
        )  # fmt: skip
    if values and values[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "sparse_step_: a CUDA graph cannot capture the reference, which reads step counts on "
            "the host. Install Triton, or capture without the optimizer step."
        )
    if found_inf is not None and bool(found_inf):
        return None
    for group, rate in enumerate(lr):
        if rate is not None:
            rows[group] = [float(rate), *rows[group][1:]]
    for t, (u, g, count) in enumerate(zip(values, grads, steps, strict=True)):
        count += 1
        step = int(count)
        step_reference_(
            rule,
            rows[groups[t]],
            step,
            u,
            g,
            firsts[t] if firsts else None,
            seconds[t] if seconds else None,
            first_scales[t] if first_scales else None,
            second_scales[t] if second_scales else None,
            (weights[t], bases[t], indices[t]) if weights else None,
            grad_scale,
            None if seed is None else (seed, ids[t], step),
        )
    return None


def _single_step_(
    op: str,
    rule: str,
    values: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    written: tuple[Tensor, Tensor, Tensor],
    hyper: tuple[float, ...],
    step: int,
    grad_scale: float | None,
    backend: str,
) -> None:
    """One tensor on the backend asked for: what the three single ops share."""
    if resolve_backend(op, values, grad, written[0], backend=backend) == "reference":
        step_reference_(
            rule, hyper, step, values, grad, first, second, written=written, grad_scale=grad_scale
        )
        return
    from sparseft_kernels.sparse_step import launch_step

    def scalar(x: float) -> Tensor:
        return torch.full((), x, dtype=torch.float32, device=values.device)

    launch_step(
        rule, [values], [grad], [first] if first is not None else [],
        [second] if second is not None else [], [], [], *([w] for w in written),
        [scalar(step - 1)], [0], [0], [hyper], [None],
        None if grad_scale is None else scalar(grad_scale), None, None,
    )  # fmt: skip


@operator(
    "adamw_step_(Tensor(a!) values, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!) weight, Tensor base, Tensor indices, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, int step, float? grad_scale=None, str backend='') -> ()"
)
def _adamw_step_(
    values, grad, exp_avg, exp_avg_sq, weight, base, indices,
    lr, beta1, beta2, eps, weight_decay, step, grad_scale=None, backend="",
):  # fmt: skip
    _single_step_(
        "adamw_step_", "adamw", values, grad, exp_avg, exp_avg_sq, (weight, base, indices),
        (lr, weight_decay, beta1, beta2, eps, 0.0), step, grad_scale, backend,
    )  # fmt: skip


@operator(
    "sgd_step_(Tensor(a!) values, Tensor grad, Tensor(b!)? momentum_buffer, Tensor(c!) weight, "
    "Tensor base, Tensor indices, float lr, float momentum, float dampening, bool nesterov, "
    "float weight_decay, bool first, float? grad_scale=None, str backend='') -> ()"
)
def _sgd_step_(
    values, grad, momentum_buffer, weight, base, indices,
    lr, momentum, dampening, nesterov, weight_decay, first, grad_scale=None, backend="",
):  # fmt: skip
    _single_step_(
        "sgd_step_", "sgd", values, grad, momentum_buffer, None, (weight, base, indices),
        (lr, weight_decay, momentum, dampening, 0.0, float(nesterov)), 1 if first else 2,
        grad_scale, backend,
    )  # fmt: skip


@operator(
    "lion_step_(Tensor(a!) values, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) weight, "
    "Tensor base, Tensor indices, float lr, float beta1, float beta2, float weight_decay, "
    "float? grad_scale=None, str backend='') -> ()"
)
def _lion_step_(
    values, grad, exp_avg, weight, base, indices,
    lr, beta1, beta2, weight_decay, grad_scale=None, backend="",
):  # fmt: skip
    _single_step_(
        "lion_step_", "lion", values, grad, exp_avg, None, (weight, base, indices),
        (lr, weight_decay, beta1, beta2, 0.0, 0.0), 1, grad_scale, backend,
    )  # fmt: skip


for _name in ("sparse_step_", "adamw_step_", "sgd_step_", "lion_step_"):
    torch.library.register_fake(f"sparseft::{_name}", lambda *args, **kwargs: None)


# Public functions.


def _check(
    op: str, weight: Tensor, base: Tensor, indices: Tensor, values: Tensor, **state: Tensor | None
) -> None:
    """Raise DiffError unless vectors are (nnz,) contiguous, state in the dtype of the values."""
    check_entries(op, weight, indices, values=values, base=base, **state)
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
        BackendError: ``"triton"`` cannot run here.

    Numerics: the reference is bit-equal to ``torch.optim.AdamW(foreach=False, fused=False)`` on
    ``values``, the kernel as accurate; one rounding into the weight. Source: Loshchilov & Hutter,
    "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    """
    _check(
        "adamw_step_", weight, base, indices, values,
        grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq,
    )  # fmt: skip
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
        BackendError: ``"triton"`` cannot run here.

    Numerics: the reference is bit-equal to ``torch.optim.SGD(foreach=False, fused=False)`` on
    ``values``, the kernel as accurate; one rounding into the weight.
    """
    if (momentum_buffer is None) != (momentum == 0):
        raise DiffError(
            f"sgd_step_: momentum={momentum} with momentum_buffer "
            f"{'missing' if momentum_buffer is None else 'given'}; give a buffer exactly when "
            "momentum is not 0"
        )
    _check(
        "sgd_step_", weight, base, indices, values, grad=grad, momentum_buffer=momentum_buffer
    )  # fmt: skip
    _sgd_step_(
        values.detach(), grad.detach(), momentum_buffer, weight.detach(), base, indices,
        lr, momentum, dampening, nesterov, weight_decay, first, grad_scale, backend or "",
    )  # fmt: skip


def lion_step_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    weight: Tensor,
    base: Tensor,
    indices: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_scale: float | None = None,
    backend: str | None = None,
) -> None:
    """Take one Lion step on a diff in place and rewrite the weight: ``weight[indices] = rn(base +
    values)``.

    Args:
        values: (nnz,) fp32, the diff; updated.
        grad: (nnz,) its gradient; read only.
        exp_avg: (nnz,) momentum; updated.
        weight, base, indices: as in :func:`adamw_step_`.
        lr: length of every entry's step, as a rule 3 to 10 times below AdamW's.
        beta1: share of the momentum in the direction.
        beta2: decay rate of the momentum.
        weight_decay: decoupled.
        grad_scale, backend: as in :func:`adamw_step_`.

    Raises:
        DiffError: vectors that do not belong together.
        BackendError: ``"triton"`` cannot run here.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv 2302.06675.
    """
    _check("lion_step_", weight, base, indices, values, grad=grad, exp_avg=exp_avg)
    _lion_step_(
        values.detach(), grad.detach(), exp_avg, weight.detach(), base, indices,
        lr, beta1, beta2, weight_decay, grad_scale, backend or "",
    )  # fmt: skip
