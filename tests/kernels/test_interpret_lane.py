"""Runs the interpreter lane in a process of its own, from the default lane.

`@triton.jit` reads TRITON_INTERPRET when it decorates, so one process cannot both interpret and
compile.
"""

from __future__ import annotations

import os
import re

import pytest


def passed(summary: str) -> int:
    found = re.search(r"(\d+) passed", summary)
    return int(found[1]) if found else 0


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process already is the interpreter lane"
)
def test_interpreter_lane_passes(interpreter_lane):
    """The lane was started when the tests had been collected, on a core of its own if there is."""
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    lane = interpreter_lane()
    returncode = lane.process.wait(timeout=900)
    output = lane.output.read_text(encoding="utf-8")
    assert returncode == 0, output[-6000:]
    assert passed(output) > 0, f"the lane ran no tests:\n{output[-6000:]}"
    assert "skipped" not in output.splitlines()[-1], output[-6000:]


def test_an_empty_lane_is_seen():
    assert passed("3 deselected in 0.01s") == 0
    assert passed("41 passed, 2 skipped in 3.1s") == 41
