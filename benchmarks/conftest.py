"""`pytest benchmarks`: what to measure, and where.

Not part of the default run: `testpaths` is `tests`. Needs pytest-benchmark (the `bench` extra).
"""

from __future__ import annotations

import importlib.util
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
    if importlib.util.find_spec("sparseft") is None:
        raise pytest.UsageError(
            "sparseft is not importable. Install the checkout (pip install -e '.[bench]') or put "
            "it on the path (PYTHONPATH=.:kernels)."
        )
    import sparseft  # noqa: F401  (found once, its submodules no longer need the root on the path)

    # See tests/conftest.py: the root on the path would make a package of the folder kernels/.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "pytest-benchmark is not installed: pip install 'sparseft[bench]', or measure with "
            "`sparseft bench`, which does not need it."
        )
