"""Every example of the pages runs: Python blocks, ``>>>`` sessions and console blocks.

The blocks of a page run in order, in one namespace, in an empty folder. Output that is shown is
compared; ``...`` stands for anything. What cannot run here says so in the page's source:
``% skip: next "why"``.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, as in tests/conftest.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "100"  # tables are as wide as the pages show them

from sybil import Document, Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SESSIONS = 300  # seconds

sys.path.append(str(HERE / "developing" / "code"))  # the developer guides import their files


class ConsoleParser(CodeBlockParser):
    """Run the ``$`` lines of console blocks and compare the lines below each.

    ``sparseft`` runs in this process, in the page's folder; anything else in a shell, in the
    checkout.
    """

    language = "console"

    def evaluate(self, example: Example) -> str | None:
        checker = doctest.OutputChecker()
        for command, wanted in commands(str(example.parsed)):
            got = run(command)
            if wanted and not checker.check_output(wanted, got, FLAGS):
                shown = doctest.Example(command, wanted)
                return f"$ {command}\n{checker.output_difference(shown, got, FLAGS)}"
        return None


def commands(block: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a block with the output that is shown for it."""
    command: list[str] = []
    output: list[str] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            if command:
                yield " ".join(command), "".join(output)
            command, output = [line[2:]], []
        elif command and command[-1].endswith("\\"):
            command[-1:] = [command[-1][:-1].strip(), line.strip()]
        else:
            output.append(line + "\n")
    if command:
        yield " ".join(command), "".join(output)


def run(command: str) -> str:
    """Return what a command prints; a failure is raised with all of it."""
    words = shlex.split(command)
    if words[0] == "sparseft":
        from sparseft.cli.main import main

        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(words[1:])
        printed = out.getvalue()
    else:
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        env.pop("PYTEST_ADDOPTS", None)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=SESSIONS,
        )
        code, printed = done.returncode, done.stdout + done.stderr
    if code:
        raise RuntimeError(f"$ {command}\nended with {code}\n{printed}")
    return printed


class Page:
    """An empty folder and fixed seeds for one page; what a page changed is put back."""

    def __init__(self) -> None:
        self.left = contextlib.ExitStack()

    def enter(self, namespace: dict[str, Any]) -> None:
        import torch

        from sparseft import composition, selection
        from sparseft.ops import _backend

        folder = self.left.enter_context(tempfile.TemporaryDirectory())
        self.left.callback(os.chdir, os.getcwd())
        os.chdir(folder)
        log = logging.getLogger("sparseft")
        self.left.callback(setattr, log, "handlers", list(log.handlers))
        for registry in (composition.registry.REGISTRY, selection.registry.REGISTRY):
            self.left.callback(setattr, registry, "_entries", dict(registry._entries))
        self.left.callback(setattr, _backend, "_TRITON_OPS", _backend._TRITON_OPS)
        torch.manual_seed(0)

    def leave(self, namespace: dict[str, Any]) -> None:
        self.left.close()


page = Page()
pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=FLAGS),
        ConsoleParser(),
        SkipParser(),
    ],
    patterns=["*.md"],
    excludes=["_build/*"],
    document_types={".md": Document},
    setup=page.enter,
    teardown=page.leave,
).pytest()
