"""The one tolerance rule for ops that multiply and add (data movement is compared bit for bit).

An op may lose at most ``factor`` times what torch itself loses in the same dtype, both measured
against float64. No test carries its own tolerance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rel_rms(actual: Tensor, exact64: Tensor) -> float:
    """Return RMS(actual - exact) / RMS(exact), 0 for empty tensors."""
    if exact64.numel() == 0:
        return 0.0
    error = (actual.double() - exact64).square().mean().sqrt()
    return float(error / exact64.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny))


def assert_as_accurate(
    actual: Tensor, torch_same_dtype: Tensor, exact64: Tensor, factor: float = 2.0, name: str = ""
) -> None:
    """Fail unless ``actual`` is within ``factor`` of torch's own distance from ``exact64``."""
    assert actual.shape == exact64.shape, f"{name}: shape {actual.shape}, wanted {exact64.shape}"
    assert not actual.isnan().any(), f"{name}: NaN in the result (uninitialised memory?)"
    mine, theirs = rel_rms(actual, exact64), rel_rms(torch_same_dtype, exact64)
    limit = factor * theirs + torch.finfo(actual.dtype).eps
    assert mine <= limit, f"{name}: {mine:.2e} vs torch {theirs:.2e}"
