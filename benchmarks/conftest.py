"""`pytest benchmarks`: what to measure, and where.

Not part of the default run: `testpaths` is `tests`. Needs pytest-benchmark (the `bench` extra).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("tiny", "cpu", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparseft benchmarks")
    group.addoption("--bench-size", choices=SIZES, help="shapes; left out: those of the device")
    group.addoption(
        "--bench-op", action="append", metavar="NAME", help="an operation; repeat it for more"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "pytest-benchmark is not installed: pip install 'sparseft[bench]', or measure with "
            "`sparseft bench`, which does not need it."
        )
    if importlib.util.find_spec("sparseft") is None:
        raise pytest.UsageError(
            "sparseft is not importable. Install the checkout (pip install -e '.[bench]') or put "
            "it on the path (PYTHONPATH=.:kernels)."
        )
    import sparseft  # noqa: F401  (found once, its submodules no longer need the root on the path)

    # See tests/conftest.py: the root on the path would make a package of the folder kernels/.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    from sparseft.benchmarking.cases import OPS

    for name in config.getoption("bench_op") or ():
        if name not in OPS:
            raise pytest.UsageError(
                f"--bench-op {name}: no such operation; there are: {', '.join(OPS)}"
            )
    if config.getoption("bench_size") == "tiny":
        os.environ.setdefault("SPARSEFT_BENCH_COMPILE", "0")  # compiling takes most of the time
    if config.getoption("bench_size") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--bench-size cuda: torch sees no CUDA or ROCm device")
