"""Fixtures of the kernel lanes: poisoned launcher memory and the devices a lane runs on."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assert_as_accurate():
    path = Path(__file__).resolve().parent.parent / "_accuracy.py"
    spec = importlib.util.spec_from_file_location("_accuracy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.assert_as_accurate


@pytest.fixture
def poisoned_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the launchers' one allocator returns with NaN (integers: their largest value): a
    kernel that misses an element cannot pass.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    import sparseft_kernels
    from sparseft_kernels import _launch

    allocate = _launch.empty

    def poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

    for found in pkgutil.iter_modules(sparseft_kernels.__path__):
        module = importlib.import_module(f"sparseft_kernels.{found.name}")
        if getattr(module, "empty", None) is allocate:
            monkeypatch.setattr(module, "empty", poisoned)
