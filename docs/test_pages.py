"""The guide leaves out none of what it means to list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparseft import errors
from sparseft.composition import methods
from sparseft.selection import selectors
from sparseft.training import callback

HERE = Path(__file__).resolve().parent
GUIDE = HERE / "guide"


def named(page: str) -> set[str]:
    """Return what stands in code spans."""
    text = (GUIDE / f"{page}.md").read_text(encoding="utf-8")
    return {span.removeprefix("sparseft.") for span in re.findall(r"`([^`\n]+)`", text)}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("troubleshooting", set(errors.__all__)),
        # Those of the package: the guide to a method registers its own.
        ("composing", {n for n, e in methods().items() if "sparseft." in e.fn.__module__}),
        ("selecting", {n for n, e in selectors().items() if "sparseft." in e.fn.__module__}),
    ],
    ids=["errors", "composition methods", "selection methods"],
)
def test_all_are_named(page: str, names: set[str]):
    assert names - named(page) == set()


def test_every_figure_of_the_callback_is_explained():
    keys = set(re.findall(r"``(sparse/\w+)``", callback.SparseCallback.__doc__))
    assert len(keys) > 5
    assert keys - named("observability") == set()


def test_no_example_is_skipped_without_a_reason():
    for page in HERE.rglob("*.md"):
        for line in page.read_text(encoding="utf-8").splitlines():
            if "skip:" in line:
                assert re.fullmatch(r'% skip: next "[^"]+"', line), f"{page.name}: {line}"
