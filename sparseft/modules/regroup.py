"""Rewrite an existing optimizer's groups for a model that has just got masks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from sparseft.modules.leaves import MaskedParameter

__all__ = ["regroup_"]


def regroup_(
    optimizer: Optimizer, masked: Iterable[MaskedParameter], full: Iterable[nn.Parameter]
) -> None:
    """Put each leaf where its weight was, keep fully trained parameters, drop the frozen ones.

    Hyper-parameters of the groups stay, and so does the number of groups, which schedulers built on
    the optimizer rely on. What no group held goes to the first group. State of dropped parameters
    is dropped.
    """
    replaced = {id(m.weight): m.leaf for m in masked}
    kept = {id(p): p for p in full}
    placed: set[int] = set()
    for group in optimizer.param_groups:
        params = []
        for parameter in group["params"]:
            new = replaced.get(id(parameter), kept.get(id(parameter)))
            if new is not None:
                params.append(new)
                placed.add(id(new))
            if new is not parameter:
                optimizer.state.pop(parameter, None)
        group["params"][:] = params  # L-BFGS keeps this very list
    if hasattr(optimizer, "_numel_cache"):
        optimizer._numel_cache = None  # and how many entries it has
    rest = [p for p in (*replaced.values(), *kept.values()) if id(p) not in placed]
    optimizer.param_groups[0]["params"].extend(rest)
