"""What the cases of single operations have in common: gates of the others, skips in their words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.benchmarking.checks import Check, rel_rms
from sparseft.benchmarking.suite import Contender

__all__ = ["in_its_dtype", "typical", "where_torch_can"]


def typical(densities: Sequence[float]) -> float:
    """Return the density nearest to 1 %: for sides that cost the same at any, or take long to
    compile.
    """
    return min(densities, key=lambda d: abs(math.log(d / 0.01)))


def in_its_dtype(name: str, got: Tensor, exact: Tensor, *, terms: int = 1) -> Check:
    """The gate of a side that keeps sums in the dtype of its result, as ours does not.

    ``terms`` numbers summed one after the other, each sum rounded, are off by about ``eps / 3 *
    sqrt(terms)`` of the result; three times that is let pass.
    """
    if got.shape != exact.shape:
        return Check(f"{name}: shape {tuple(got.shape)} for {tuple(exact.shape)}", 1.0, 0.0)
    limit = torch.finfo(got.dtype).eps * math.sqrt(max(1, terms))
    return Check(f"{name}: error", rel_rms(got, exact), limit)


def where_torch_can(
    run: Callable[[], Any],
    check: Callable[[Any], list[Check]],
    *,
    density: float | None = None,
    bytes: float | None = None,
    flops: float | None = None,
) -> Contender:
    """Return a checked contender; skipped, in torch's words, where torch has no kernel for it."""
    try:
        result = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"torch has no kernel for it: {words[0][:160]}"
        return Contender(skipped=reason, density=density)
    return Contender(run, check(result), density=density, bytes=bytes, flops=flops)
