"""Optimizers that update compact leaves and write their weights in one pass.

Ordinary ``torch.optim.Optimizer``s: parameter groups, schedulers, ``state_dict``, GradScaler,
CUDA graphs, resume. They take leaves and ordinary parameters alike. Any other optimizer trains
leaves as well; the weight is then written by a hook after its step.

On a GPU one kernel launch per weight dtype steps every tensor, without a host sync; elsewhere the
plain-torch definition runs tensor by tensor.

``torch.compile(optimizer.step)`` is one graph, hooks included (from torch 2.13 on), for loops that
are compiled as a whole; alone it gains nothing, as the step is one op already. It is not compiled
again as a learning rate changes (a float's second value makes it an input; a tensor is one at
once), nor as masks of equal counts move. A CUDA graph needs ``capturable=True``, a learning rate on
the device where it is to change, and a step taken before the capture; after
`Attachment.reselect_`, capture again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from sparseft.modules.sparse_optimizer import (
    SparseOptimizer,
    check_at_least_zero,
    check_betas,
    check_decoupled,
)

__all__ = ["SparseAdamW", "SparseLion", "SparseSGD"]


class SparseAdamW(SparseOptimizer):
    """AdamW whose step on a compact leaf also writes ``W[indices] = rn(base + leaf)``.

    ``leaf *= 1 - lr*wd;  m += (1-b1)(g - m);  v = b2 v + (1-b2) g^2;
    leaf -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)``

    Args:
        params: leaves, ordinary parameters, or groups of them.
        lr: learning rate, a float or a 0-d tensor (on the parameters' device for CUDA graphs).
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled; pulls a diff to zero, that is the weight to its base.
        capturable: count steps on the device, so that ``step()`` can be captured in a CUDA graph.
        moment_bits: 8 keeps a byte per moment and entry, with one scale per 256 entries (the map is
            in `sparseft.ops._moments`; in ``state``, ``exp_avg_code`` and ``exp_avg_scale``); 32
            keeps them in the parameter's dtype.
        stochastic_rounding: write masked bf16 and fp16 weights as ``sr(base + leaf)``, whose mean
            is the exact sum. The leaf stays the fp32 master either way, so nothing small is lost by
            rounding to nearest; this removes the bias of the weights the forward pass sees.
            Checkpoints keep these weights bit for bit; `Attachment.sync_`, a cast, and loading a
            compact checkpoint, which has no weights, write the nearest again.
        seed: of the stochastic rounding, with parameter number, flat index and step.

    Raises:
        ValueError: a hyper-parameter out of range.

    Numerics: with the defaults the reference is bit-equal to ``torch.optim.AdamW(foreach=False,
    fused=False)``, whose state dicts it shares; the kernel computes in fp32 with correctly rounded
    divisions and roots. Source: Loshchilov & Hutter, ICLR 2019, algorithm 2.
    """

    _rule = "adamw"
    _all_moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        capturable: bool = False,
        moment_bits: int = 32,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        shared = {
            "capturable": capturable,
            "moment_bits": moment_bits,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # As torch.optim.AdamW has it: torch.optim.Adam, given our state, goes on in the same way.
        defaults["decoupled_weight_decay"] = True
        super().__init__(params, defaults | shared)

    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return group["weight_decay"], float(beta1), float(beta2), group["eps"], 0.0

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_at_least_zero("SparseAdamW", eps=group["eps"])
        check_betas("SparseAdamW", group["betas"])
        check_decoupled("SparseAdamW", group)


class SparseLion(SparseOptimizer):
    """Lion whose step on a compact leaf also writes ``W[indices] = rn(base + leaf)``.

    ``leaf *= 1 - lr*wd;  leaf -= lr * sign(b1 m + (1-b1) g);  m = b2 m + (1-b2) g``

    Args:
        params: leaves, ordinary parameters, or groups of them.
        lr: length of every entry's step, as a rule 3 to 10 times below AdamW's.
        betas: share of the momentum in the direction, and its decay rate; each in [0, 1).
        weight_decay: decoupled; as a rule 3 to 10 times above AdamW's.
        capturable, moment_bits, stochastic_rounding, seed: as in :class:`SparseAdamW`.

    Raises:
        ValueError: a hyper-parameter out of range.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv 2302.06675.
    """

    _rule = "lion"
    _all_moments = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        capturable: bool = False,
        moment_bits: int = 32,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        shared = {
            "capturable": capturable,
            "moment_bits": moment_bits,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay} | shared)

    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return group["weight_decay"], float(beta1), float(beta2), 0.0, 0.0

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("SparseLion", group["betas"])
        check_decoupled("SparseLion", group)


class SparseSGD(SparseOptimizer):
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
        capturable, moment_bits, stochastic_rounding, seed: as in :class:`SparseAdamW`.

    Raises:
        ValueError: a hyper-parameter out of range.

    Numerics: with the defaults the reference is bit-equal to ``torch.optim.SGD(foreach=False,
    fused=False)``, whose state dicts it shares (with a ``step`` besides, which torch ignores).
    """

    _rule = "sgd"
    _all_moments = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        capturable: bool = False,
        moment_bits: int = 32,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "capturable": capturable,
            "moment_bits": moment_bits,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        return group["weight_decay"], momentum, dampening, 0.0, float(group["nesterov"])

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._all_moments if group["momentum"] != 0 else ()

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        momentum, dampening = group["momentum"], group["dampening"]
        check_at_least_zero("SparseSGD", momentum=momentum)
        if group["nesterov"] and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"SparseSGD: nesterov needs momentum > 0 and dampening 0; got {momentum=}, "
                f"{dampening=}."
            )
