"""The test lane of the GPU suite: pytest in a process of its own, with an end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "run_tests"]

ROOT = Path(__file__).resolve().parent.parent
# Compiling kernels takes most of the time, and processors; one GPU serves them all.
_MOST_WORKERS = 8
_LISTED = 20


@dataclass
class Outcome:
    """What became of the tests.

    Args:
        status: ``"passed"``, ``"failed"``, ``"cut off"`` by the budget, ``"not run"``.
        reason: why not run, or how far it came; else empty.
        counts: tests, failures, errors, skipped.
        failed: names of those that failed.
        seconds: that it took.
    """

    status: str
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def markdown(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in self.counts.items())
        text = f"## Tests\n{self.status}"
        text += f": {counts}" if counts else ""
        text += f"; {self.reason}" if self.reason else ""
        text += f" ({self.seconds:.0f} s)\n"
        text += "".join(f"- {name}\n" for name in self.failed[:_LISTED])
        if len(self.failed) > _LISTED:
            text += f"- and {len(self.failed) - _LISTED} more, in tests.txt\n"
        return text


def run_tests(arguments: Sequence[str], folder: Path, *, seconds: float, need_gpu: bool) -> Outcome:
    """Run pytest in the checkout and keep what it prints, and its JUnit report, in the folder.

    Args:
        arguments: which tests.
        folder: of ``tests.txt`` and ``tests.xml``.
        seconds: after these it is killed.
        need_gpu: a GPU test that finds no GPU fails instead of being skipped.
    """
    printed, report = folder / "tests.txt", folder / "tests.xml"
    report.unlink(missing_ok=True)
    if importlib.util.find_spec("pytest") is None:
        reason = "pytest is not installed (pip install 'sparseft[test]')"
        printed.write_text(f"{reason}\n", encoding="utf-8")
        return Outcome("not run", reason)
    # A module that another package is missing for costs its own tests alone.
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report.resolve()}"]
    if need_gpu and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) // 2)))]
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    if need_gpu:
        environment["SPARSEFT_REQUIRE_GPU"] = "1"
    began = time.monotonic()
    with printed.open("wb") as out:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            # Its workers, too: they hold memory of the GPU.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    took = time.monotonic() - began
    if code is None:
        reason = f"stopped after {seconds:.0f} s; tests.txt has what it printed"
        return Outcome("cut off", reason, failed=_printed(printed), seconds=took)
    counts, failed = _reported(report)
    status = "passed" if code == 0 else "failed"
    reason = "" if code in (0, 1) else f"pytest ended with status {code}"
    if code == 5:
        status, reason = "not run", "pytest found no test"
    return Outcome(status, reason, counts, failed or _printed(printed), took)


def _reported(report: Path) -> tuple[dict[str, int], list[str]]:
    """Return counts and failed tests of a JUnit report; nothing where there is none."""
    if not report.is_file():
        return {}, []
    root = ElementTree.parse(report).getroot()
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    failed = []
    for suite in root.iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    for case in root.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return counts, failed


def _printed(printed: Path) -> list[str]:
    """Return the failed tests that the summary names, where there is no report."""
    lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
