"""DistributedDataParallel around a model before its masks: leaves would not be reduced, silently.

A wrapper knows the parameters that there were when it was made. Leaves that come later train on
each rank's own rows, and the ranks drift apart without a word. Found at `attach`, where it is given
the wrapper, and else in the first forward pass through one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparseft.errors import AttachError
from sparseft.modules._collective import Group, Ranks
from sparseft.modules.leaves import masked_by_leaf

__all__ = ["guard_wrapping", "refuse_wrapped"]

_FIX = (
    "DistributedDataParallel reduces the parameters that a model has when it is wrapped. Attach "
    "first, then wrap: model = ...; sparse = attach(model, masks); "
    "ddp = DistributedDataParallel(model)."
)
# Wrapper -> modules that were looked at in a forward pass through it.
_seen: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()


def refuse_wrapped(model: nn.Module) -> None:
    """Raise AttachError for a model that is, or holds, a DistributedDataParallel."""
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise AttachError(
                f"{name or 'the model'!r} is a DistributedDataParallel, which would not reduce the "
                f"leaves made now: every rank would train by itself. {_FIX}"
            )


def guard_wrapping(model: nn.Module, group: Group) -> list[Callable[[], None]]:
    """Check the first forward pass in each wrapper, where several processes train together.

    Returns:
        What takes the check off again.
    """
    _seen.clear()
    if not Ranks(group).several:
        return []
    return [model.register_forward_pre_hook(_check).remove]


def _check(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or id(module) in _seen.get(wrapper, ()):
        return
    reduced = {id(p) for p in wrapper._module_parameters}
    for parameter in module.parameters():
        masked = masked_by_leaf(parameter)
        if masked is not None and parameter.requires_grad and id(parameter) not in reduced:
            raise AttachError(
                f"the masks of {masked.name!r} and others were attached after the model was "
                "wrapped in DistributedDataParallel, which does not reduce their leaves: every "
                f"rank would train by itself. {_FIX}"
            )
    _seen.setdefault(wrapper, set()).add(id(module))
