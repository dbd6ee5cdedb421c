"""The tiny tokenizer and encoder of ``tests/_tiny.py`` as fixtures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny():
    path = Path(__file__).resolve().parent.parent / "_tiny.py"
    spec = importlib.util.spec_from_file_location("_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return tiny.tiny_tokenizer()
