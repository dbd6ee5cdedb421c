"""Fixtures of the kernel lanes: poisoned launcher memory and the devices a lane runs on."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import shutil
import signal
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
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass
class Lane:
    """What runs beside the other tests, on a core of its own if there is one: two minutes of it.

    First every kernel is compiled, into a cache that the tests of that find warm; then the
    interpreter lane runs, whose output is kept.
    """

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    @classmethod
    def start(cls) -> Lane:
        folder = Path(tempfile.mkdtemp(prefix="kernel-lanes-"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
        aot = (*_PYTEST, str(HERE / "test_aot.py"))
        interpret = (*_PYTEST, "-m", "interpret", str(HERE))
        program = (
            "import os, subprocess, sys\n"
            f"subprocess.run({aot!r}, stdout=subprocess.DEVNULL)\n"
            "os.environ['TRITON_INTERPRET'] = '1'\n"
            "sys.stdout.flush()\n"
            f"sys.exit(subprocess.run({interpret!r}).returncode)\n"
        )
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env.pop("SPARSEFT_REQUIRE_GPU", None)  # the child selects interpreter tests only
        with open(folder / "output.txt", "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                cwd=HERE.parent.parent,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that all of it can be ended
            )
        return cls(process, folder)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if os.environ.get("TRITON_CACHE_DIR") == str(self.folder / "triton"):
            del os.environ["TRITON_CACHE_DIR"]
        shutil.rmtree(self.folder, ignore_errors=True)


_lanes: list[Lane] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what the lane prepares last."""
    if any(item.name == _LANE for item in items):
        items.sort(key=lambda item: (item.name == _LANE) + (item.path.name == "test_aot.py") / 2)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the lane if its test is among those chosen."""
    wanted = any(item.name == _LANE for item in session.items)
    if wanted and not session.config.option.collectonly and not _lanes:
        if os.environ.get("TRITON_INTERPRET") != "1":
            _lanes.append(Lane.start())


def pytest_sessionfinish() -> None:
    while _lanes:
        _lanes.pop().end()


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
