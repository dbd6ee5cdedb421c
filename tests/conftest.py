"""Shared by every test: the lanes, the uninstalled checkout, and where the optional real data lies.

Lanes: default (any CPU), ``-m interpret`` (own process, TRITON_INTERPRET=1), ``-m gpu`` and
``-m slow``.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# One thread an operation, before torch is loaded: the kernel lane has the second core, and threads
# that wait for one another on a taken core make small operations up to ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("SPARSEFT_TEST_DATA", ROOT.parent / "shared" / "data"))


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("sparseft") is None:
        raise pytest.UsageError(
            "sparseft is not importable. Install the checkout (pip install -e '.[test]') or put "
            "it on the path (PYTHONPATH=.:kernels)."
        )
    import sparseft  # noqa: F401  (found once, its submodules no longer need the root on the path)

    # With the checkout's root on sys.path (PYTHONPATH=. or `python -m pytest`) the folder kernels/
    # is a namespace package, which libraries take for the Hugging Face `kernels` package.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    expression = config.getoption("markexpr", default="")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in expression:
            item.add_marker(pytest.mark.skip(reason="slow lane: run with -m slow"))
        if item.get_closest_marker("interpret") and not interpreting:
            item.add_marker(
                pytest.mark.skip(
                    reason="interpreter lane: own process, TRITON_INTERPRET=1 pytest -m interpret"
                )
            )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.get_closest_marker("gpu"):
        return
    import torch

    if torch.cuda.is_available():
        return
    reason = "GPU lane: torch sees no CUDA or ROCm device"
    if os.environ.get("SPARSEFT_REQUIRE_GPU") == "1":
        pytest.fail(f"{reason}, and SPARSEFT_REQUIRE_GPU=1 asks for one")
    pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """Keep what is loaded by now (torch, transformers, every test) out of later collections.

    Code that calls ``gc.collect`` before it measures would walk all of it each time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or the interpreter's end would report what it cannot free


def _beside(name: str) -> ModuleType:
    """Load a file beside this one (test folders are not importable under importlib mode)."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise pytest.UsageError(f"tests/{name}.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The functions of ``_tiny.py``."""
    return _beside("_tiny")


@pytest.fixture(scope="session")
def run_ranks() -> Any:
    """``run_ranks(function, world_size, *arguments)`` of ``_ranks.py``: several gloo processes."""
    import torch

    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo, which processes on one CPU talk through")
    return _beside("_ranks").run_ranks


@pytest.fixture(scope="session")
def tokenizer(tiny: ModuleType) -> Any:
    """Fast tokenizer of the words in ``_tiny.py``."""
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real encoder and datasets; tests that use it skip where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"real data not found at {REAL_DATA} (set SPARSEFT_TEST_DATA to a copy)")
    return REAL_DATA


@pytest.fixture(scope="session")
def real_encoder(real_data: Path) -> Path:
    """Folder of the trimmed multilingual encoder (31.1 M parameters)."""
    folder = real_data / "multilingual-e5-small-trimmed"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no model.safetensors in {folder}")
    return folder
