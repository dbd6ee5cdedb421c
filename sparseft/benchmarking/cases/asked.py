"""What was asked for: shapes and dtypes checked before allocations, densities in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparseft.benchmarking.catalogue import DTYPES, Shape

__all__ = ["check_densities", "check_shape", "percent", "torch_dtype"]


def check_shape(op: str, dims: str, shape: Shape) -> None:
    """Refuse a shape of other dimensions than ``dims`` names, or with one below 1.

    Raises:
        ValueError: naming the dims.
    """
    names = dims.split("x")
    text = "x".join(map(str, shape))
    if len(shape) != len(names):
        raise ValueError(f"{op}: shape {text} has {len(shape)} numbers; wanted {dims}")
    for name, size in zip(names, shape, strict=True):
        if size < 1:
            raise ValueError(f"{op}: {name} of shape {text} is {size}; wanted {dims}, each >= 1")


def torch_dtype(op: str, dtype: str, allowed: Sequence[str]) -> torch.dtype:
    """Return torch's dtype of a name.

    Raises:
        ValueError: the op does not take it; the message has the list of those it takes.
    """
    if dtype not in allowed:
        raise ValueError(f"{op}: dtype is {dtype!r}; wanted one of {', '.join(allowed)}")
    return getattr(torch, DTYPES[dtype])


def check_densities(op: str, densities: Sequence[float]) -> None:
    """Refuse densities outside (0, 1], and none at all.

    Raises:
        ValueError: naming the first that is.
    """
    if not densities:
        raise ValueError(f"{op}: no density was given; wanted at least one in (0, 1]")
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"{op}: density is {density!r}; wanted a number in (0, 1]")


def percent(density: float) -> str:
    """Return ``2.76%``, as names of contenders have it."""
    return f"{100 * density:.4g}%"
