"""Runs the interpreter lane in a process of its own, from the default lane.

`@triton.jit` reads TRITON_INTERPRET when it decorates, so one process cannot both interpret and
compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def run_lane(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("SPARSEFT_REQUIRE_GPU", None)  # the child selects interpreter tests only
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=HERE.parent.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def passed(summary: str) -> int:
    found = re.search(r"(\d+) passed", summary)
    return int(found[1]) if found else 0


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process already is the interpreter lane"
)
def test_interpreter_lane_passes():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    done = run_lane("-m", "interpret", str(HERE))
    report = done.stdout[-4000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    assert passed(done.stdout) > 0, f"the lane ran no tests:\n{report}"
    assert "skipped" not in done.stdout.splitlines()[-1], report


def test_an_empty_lane_is_seen():
    assert passed("3 deselected in 0.01s") == 0
    assert passed("41 passed, 2 skipped in 3.1s") == 41
