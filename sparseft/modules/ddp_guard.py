"""DistributedDataParallel around masks it does not fit: ranks would drift apart without a word.

A wrapper knows the parameters that there were when it was made: leaves that come later are not
reduced. Found at `attach`, where it is given the wrapper, and else in the first forward pass
through one. Masks and bases that `attach` did not compare, because it knew of one process alone,
are compared in that pass, too.
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
from sparseft.modules.agreement import check_attached
from sparseft.modules.compact import ATTACHMENTS
from sparseft.modules.leaves import masked_by_leaf
from sparseft.modules.ranks import started

__all__ = ["guard_wrapping", "refuse_wrapped"]

_FIX = (
    "DistributedDataParallel reduces the parameters that a model has when it is wrapped. Attach "
    "first, then wrap: model = ...; sparse = attach(model, masks); "
    "ddp = DistributedDataParallel(model)."
)
# Wrapper -> modules that were looked at, and by which check, in a forward pass through it.
_Seen = set[tuple[str, int]]
_seen: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()


def refuse_wrapped(model: nn.Module) -> None:
    """Raise AttachError for a model that is, or holds, a DistributedDataParallel."""
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise AttachError(
                f"{name or 'the model'!r} is a DistributedDataParallel, which would not reduce the "
                f"leaves made now: every rank would train by itself. {_FIX}"
            )


def guard_wrapping(model: nn.Module, group: Group) -> list[Callable[[], None]]:
    """Check the first forward pass in each wrapper, where several processes were started.

    Returns:
        What takes the checks off again.
    """
    _seen.clear()
    if started() == 1:
        return []
    checks = [_check] if Ranks(group).several else [_check, _compare]
    return [model.register_forward_pre_hook(check).remove for check in checks]


def _entered(module: nn.Module, check: str) -> Any:
    """Return the wrapper whose training forward reached a module first now; None at other times."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return None if wrapper is None or (check, id(module)) in _seen.get(wrapper, ()) else wrapper


def _compare(module: nn.Module, args: Any) -> None:
    """Compare what was attached with group=False, or before there was a process group."""
    wrapper = _entered(module, "compare")
    if wrapper is None:
        return
    for attachment in module.__dict__.get(ATTACHMENTS, ()):
        full = attachment.full_params
        check_attached(attachment._masked.values(), full, wrapper.process_group)
    _seen.setdefault(wrapper, set()).add(("compare", id(module)))


def _check(module: nn.Module, args: Any) -> None:
    wrapper = _entered(module, "check")
    if wrapper is None:
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
    _seen.setdefault(wrapper, set()).add(("check", id(module)))
