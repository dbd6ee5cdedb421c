"""One compiled piece for tensors of any size, where a graph of a whole model takes minutes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from sparseft.benchmarking.competitors import COMPILE
from sparseft.benchmarking.suite import Contender

__all__ = ["compiled_for_any_size"]


def compiled_for_any_size(
    each: Callable[..., Any],
    make: Callable[[Callable[..., Any]], Contender],
    *,
    density: float | None = None,
) -> Contender:
    """Return ``make(torch.compile(each))``; skipped where it cannot be compiled.

    Args:
        each: what is done to one tensor, sizes left open (but 0 and 1, which torch specialises on).
        make: builds and checks the contender, which calls the compiled piece tensor by tensor.
        density: as in `Contender`.
    """
    if os.environ.get(COMPILE) == "0":
        return Contender(skipped=f"{COMPILE}=0", density=density)
    try:
        return make(torch.compile(each, dynamic=True))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Contender(skipped=f"torch.compile failed: {lines[0][:160]}", density=density)
