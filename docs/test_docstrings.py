"""Every ``>>>`` example in the package's docstrings runs and shows what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import sparseft

PACKAGE = Path(sparseft.__file__).parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FILES = sorted(f for f in PACKAGE.rglob("*.py") if ">>>" in f.read_text(encoding="utf-8"))


def module_of(file: Path) -> str:
    parts = ("sparseft", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(p for p in parts if p != "__init__")


def test_examples_are_found():
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_docstring_examples(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(module_of(file))
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    # `exclude_empty`: what remains has examples; names that a module imports are found elsewhere.
    found = [t for t in doctest.DocTestFinder().find(module, module.__name__) if t.examples]
    assert found, f"no docstring of {file} has the >>> that the file has"
    report: list[str] = []
    for test in found:
        torch.manual_seed(0)
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
