"""Write every trained diff into its weight after each optimizer step, whatever the optimizer.

Two global hooks of ``torch.optim``, there while any mask is attached.
(A pre-forward hook that watches ``leaf._version`` trains nothing, silently, with
``AdamW(fused=True)`` and under ``torch.compile``.)

torch.compile traces them as part of a compiled step: what they call has to be plain enough for it
(dicts, ``weakref.ref``; no ``WeakValueDictionary``, no messages), see tests/attach/test_compile.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sparseft._text import first_of
from sparseft.modules.leaves import (
    MaskedParameter,
    masked_by_leaf,
    masked_by_weight,
    registered,
)
from sparseft.modules.optimizer_guards import (
    check_groups,
    check_places,
    frozen_note,
    note_without_leaves,
    report_idle,
)
from sparseft.modules.traced import once_while_traced
from sparseft.modules.transplant import note_step

__all__ = ["install_hooks", "remove_idle_hooks"]

logger = logging.getLogger(__name__)

_handles: list[Any] = []


def _in_groups(optimizer: Optimizer) -> tuple[list[MaskedParameter], list[MaskedParameter]]:
    """Return the masked parameters whose leaf, and those whose weight, the optimizer holds."""
    leaves, weights = [], []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (masked := masked_by_leaf(parameter)) is not None:
                leaves.append(masked)
            elif (masked := masked_by_weight(parameter)) is not None:
                weights.append(masked)
    return leaves, weights


def _check(optimizer: Optimizer) -> None:
    leaves, weights = _in_groups(optimizer)
    check_groups(optimizer, leaves, weights)
    if leaves:
        check_places(optimizer, leaves)
    else:
        note_without_leaves(optimizer)


# What replaces a weight or module that a compiled step reads has the step traced again.
@once_while_traced
def _check_while_traced(optimizer: Optimizer) -> bool:
    _check(optimizer)
    return True


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Stop a step that would train nothing, see `sparseft.modules.optimizer_guards`.

    A closure is wrapped: L-BFGS moves the leaves and evaluates again inside one step, which has to
    see the weights of those leaves.
    """
    if torch.compiler.is_compiling():
        _check_while_traced(optimizer)
    else:
        _check(optimizer)
    leaves, _ = _in_groups(optimizer)
    for masked in leaves:
        masked.require_top("take an optimizer step on")
    # torch hands the hook the optimizer itself as the first of the arguments.
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not leaves or not callable(closure) or getattr(optimizer, "writes_masked_weights", False):
        return None  # ours evaluate once, with the weights that the last step wrote

    def evaluate() -> Any:
        for masked in leaves:
            masked.write_()
        return closure()

    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluate}
    return (args[0], evaluate, *args[2:]), kwargs


def _report_untouched(leaves: Iterable[MaskedParameter]) -> None:
    """Name, once, the masked tensors that the first backward gave no gradient."""
    first = [masked for masked in leaves if not masked.reported]
    for masked in first:
        masked.reported = True
    silent = [masked.name for masked in first if masked.leaf.grad is None]
    frozen = sum(not masked.leaf.requires_grad for masked in first)
    if silent:
        logger.warning(
            "no gradient reached %d of %d masked tensors before the first optimizer step: %s%s. Is "
            "the layer used in this loss, and not read around its module or under no_grad? With "
            "reentrant checkpointing, inputs of a block must require grad: pass "
            "input_grads=True to attach, or use_reentrant=False.",
            len(silent), len(first), first_of(silent), frozen_note(frozen),
        )  # fmt: skip


# torch.compile runs this while it traces a step: a message in the graph would break it.
@once_while_traced
def _report_while_traced(optimizer: Optimizer) -> bool:
    leaves, _ = _in_groups(optimizer)
    if any(masked.leaf.grad is not None for masked in leaves):  # else backward is traced, too
        _report_untouched(leaves)
    return True


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    leaves, _ = _in_groups(optimizer)
    if leaves:
        note_step(optimizer)  # its state of them has to follow masks that move
    if torch.compiler.is_compiling():
        _report_while_traced(optimizer)
    else:
        report_idle(optimizer, leaves)
        _report_untouched(leaves)
    if getattr(optimizer, "writes_masked_weights", False):
        return  # ours wrote each weight in the pass that updated its leaf
    for masked in leaves:
        masked.write_()


def install_hooks() -> None:
    """Install the hooks unless they are there."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def remove_idle_hooks() -> None:
    """Remove the hooks if no masked parameter is left."""
    if _handles and next(registered(), None) is None:
        while _handles:
            _handles.pop().remove()
