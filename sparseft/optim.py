"""Optimizers that update a compact leaf and write its weight in one pass.

Ordinary ``torch.optim.Optimizer``s: parameter groups, schedulers, ``state_dict``, resume. They take
leaves and ordinary parameters alike. Any other optimizer trains leaves as well; the weight is then
written by a hook after its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparseft.modules.leaves import MaskedParameter, masked_by_leaf
from sparseft.ops.sparse_step import (
    adamw_step_,
    adamw_update_reference_,
    sgd_step_,
    sgd_update_reference_,
)

__all__ = ["SparseAdamW", "SparseSGD"]


def _check_at_least_zero(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not float(value) >= 0.0:
            raise ValueError(f"{owner}: {name}={value}; it should be 0 or more.")


class _SparseOptimizer(Optimizer):
    """The loop over groups, leaves and ordinary parameters."""

    # The hook after each step leaves the writing to us.
    writes_masked_weights: ClassVar[bool] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step on every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            StackOrderError: something was applied on top of a masked weight since `attach`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} got a torch.sparse gradient for a parameter of "
                        f"shape {tuple(parameter.shape)}; make the layer with sparse=False."
                    )
                masked = masked_by_leaf(parameter)
                if masked is not None:
                    masked.require_top("take an optimizer step on")
                    masked.follow_weight_()
                self._update(group, parameter, parameter.grad, masked)
        return loss

    def _update(
        self, group: dict[str, Any], p: Tensor, grad: Tensor, masked: MaskedParameter | None
    ) -> None:
        raise NotImplementedError


class SparseAdamW(_SparseOptimizer):
    """AdamW whose step on a compact leaf also writes ``W[indices] = rn(base + leaf)``.

    ``leaf *= 1 - lr*wd;  m += (1-b1)(g - m);  v = b2 v + (1-b2) g^2;
    leaf -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)``

    Args:
        params: leaves, ordinary parameters, or groups of them.
        lr: learning rate, a float or a 0-d tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled; pulls a diff to zero, that is the weight to its base.

    Raises:
        ValueError: a hyper-parameter out of range.

    Numerics: bit-equal to ``torch.optim.AdamW(foreach=False, fused=False)``, whose state dicts it
    shares. Source: Loshchilov & Hutter, ICLR 2019, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        _check_at_least_zero("SparseAdamW", lr=float(lr), eps=eps, weight_decay=weight_decay)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"SparseAdamW: {betas=}; each should be in [0, 1).")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def _update(
        self, group: dict[str, Any], p: Tensor, grad: Tensor, masked: MaskedParameter | None
    ) -> None:
        state = self.state[p]
        if not state:
            # As torch.optim.AdamW keeps it, so that either resumes the other's checkpoint.
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        rates: dict[str, Any] = {
            "lr": float(group["lr"]),
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "step": int(state["step"]),
        }
        if masked is None:
            adamw_update_reference_(p, grad, state["exp_avg"], state["exp_avg_sq"], **rates)
            return
        adamw_step_(
            p,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            masked.weight,
            masked.base,
            masked.indices,
            backend=masked.backend,
            **rates,
        )


class SparseSGD(_SparseOptimizer):
    """SGD with momentum whose step on a compact leaf also writes ``W[indices] = rn(base + leaf)``.

    ``g += wd * leaf;  b = momentum * b + (1 - dampening) g;
    leaf -= lr * (g + momentum * b if nesterov else b)``

    Args:
        params: leaves, ordinary parameters, or groups of them.
        lr: learning rate, a float or a 0-d tensor.
        momentum: 0 keeps no buffer.
        dampening: of the momentum.
        weight_decay: added to the gradient; pulls a diff to zero, that is the weight to its base.
        nesterov: needs momentum and no dampening.

    Raises:
        ValueError: a hyper-parameter out of range.

    Numerics: bit-equal to ``torch.optim.SGD(foreach=False, fused=False)``, whose state dicts it
    shares.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        _check_at_least_zero(
            "SparseSGD", lr=float(lr), momentum=momentum, weight_decay=weight_decay
        )
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"SparseSGD: nesterov needs momentum > 0 and dampening 0; got {momentum=}, "
                f"{dampening=}."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    def _update(
        self, group: dict[str, Any], p: Tensor, grad: Tensor, masked: MaskedParameter | None
    ) -> None:
        state = self.state[p]
        first, buffer = False, None
        if group["momentum"] != 0:
            buffer = state.get("momentum_buffer")
            first = buffer is None
            if buffer is None:
                buffer = state["momentum_buffer"] = torch.empty_like(p)
        rates = {key: float(group[key]) for key in ("lr", "momentum", "dampening", "weight_decay")}
        if masked is None:
            sgd_update_reference_(p, grad, buffer, nesterov=group["nesterov"], first=first, **rates)
            return
        sgd_step_(
            p,
            grad,
            buffer,
            masked.weight,
            masked.base,
            masked.indices,
            nesterov=group["nesterov"],
            first=first,
            backend=masked.backend,
            **rates,
        )
