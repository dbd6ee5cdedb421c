"""Ops made for tests: test folders are not importable under importlib mode."""

from __future__ import annotations

import gc
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


@pytest.fixture(autouse=True)
def short_collections():
    """The harness collects between its rounds and cases; what libraries hold (transformers) is left
    out of it here, or each tiny run walks that again and again.
    """
    gc.freeze()
    yield
    gc.unfreeze()
