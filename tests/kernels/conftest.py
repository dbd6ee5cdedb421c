"""Fixtures of the kernel lanes: poisoned launcher memory and the devices a lane runs on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN-fill the launchers' one allocator: a kernel that misses an element cannot pass."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from sparseft_kernels import _launch, compose

    allocate = _launch.empty

    def poisoned(*args, **kwargs):
        return allocate(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(_launch, "empty", poisoned)
    monkeypatch.setattr(compose, "empty", poisoned)
