"""Ops made for tests: test folders are not importable under importlib mode."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseft.benchmarking.catalogue import OpBench

_spec = importlib.util.spec_from_file_location("_benches", Path(__file__).with_name("_benches.py"))
_benches = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_benches)


@pytest.fixture(scope="session")
def adding() -> Callable[..., OpBench]:
    """Makes an op of a few microseconds."""
    return _benches.adding
