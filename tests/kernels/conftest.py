"""Fixtures of the kernel lanes: poisoned launcher memory and the devices a lane runs on."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
_LANE = "test_interpreter_lane_passes"


@dataclass
class Lane:
    """The interpreter lane in a process of its own."""

    process: subprocess.Popen[bytes]
    output: Path

    @classmethod
    def start(cls) -> Lane:
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        env.pop("SPARSEFT_REQUIRE_GPU", None)  # the child selects interpreter tests only
        handle, name = tempfile.mkstemp(prefix="interpreter-lane-", suffix=".txt")
        with os.fdopen(handle, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
                + ["-m", "interpret", str(HERE)],
                cwd=HERE.parent.parent,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return cls(process, Path(name))


_lanes: list[Lane] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the lane beside the other tests, if it is among them: it takes a minute of a core."""
    wanted = any(item.name == _LANE for item in session.items)
    if wanted and not session.config.option.collectonly and not _lanes:
        if os.environ.get("TRITON_INTERPRET") != "1":
            _lanes.append(Lane.start())


def pytest_sessionfinish() -> None:
    for lane in _lanes:
        lane.process.kill()
        lane.process.wait()
        lane.output.unlink(missing_ok=True)
    _lanes.clear()


@pytest.fixture
def interpreter_lane() -> Callable[[], Lane]:
    """Give the lane that was started after collection."""
    return lambda: _lanes[0]


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
