"""A measurement in a process of its own: its memory is its own, and its end is no one else's.

A fresh interpreter, not a fork: no threads, no CUDA context and no cache of another measurement.
The request goes in as JSON, and the answer, or why there is none, comes back in a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseft.errors import SparseFtError

__all__ = ["NotMeasuredError", "call_apart", "failure", "main"]

# `-m` and a script's path would both put folders in front of the caller's path.
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from sparseft.profiling.worker import main; main(sys.argv[2])"
)
_LONGEST = 300  # characters of a reason


class NotMeasuredError(SparseFtError, RuntimeError):
    """A step that could not be measured; the message says why."""


def call_apart(request: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """Return what `measure_here` finds in a new process, as plain data.

    Args:
        request: ``workload``, ``way`` (fields of each), ``device``, ``steps``.
        threads: of torch there.

    Raises:
        NotMeasuredError: it failed, ran out of memory or was killed.
    """
    with tempfile.TemporaryDirectory(prefix="sparseft-profile-") as folder:
        file = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-c", _CODE, json.dumps(sys.path), str(file)],
            input=json.dumps({**request, "threads": threads}),
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if file.is_file():
            answer = json.loads(file.read_text(encoding="utf-8"))
            if "reason" in answer:
                raise NotMeasuredError(answer["reason"])
            return answer
    raise NotMeasuredError(_end(done.returncode, done.stderr))


def _end(code: int, stderr: str) -> str:
    """Say how a process ended that left no answer."""
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            why = "; the system had no memory left, most likely" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{why}"
    lines = stderr.strip().splitlines()
    return f"its process ended with code {code}" + (f": {lines[-1][:_LONGEST]}" if lines else "")


def main(path: str) -> None:
    """Read a request from standard input and write the answer to ``path``."""
    # Where memory runs out the system shall end this process, not whoever waits for it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    request = json.loads(sys.stdin.read())
    answer = _answer(request)
    part = Path(path).with_suffix(".part")
    part.write_text(json.dumps(answer), encoding="utf-8")
    part.replace(path)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from sparseft.profiling.measure import measure_here
    from sparseft.profiling.workload import Way, Workload

    torch.set_num_threads(request["threads"])
    try:
        found = measure_here(
            Workload(**request["workload"]),
            Way(**request["way"]),
            request["device"],
            steps=request["steps"],
        )
    except SparseFtError as error:
        return {"reason": str(error)}
    except Exception as error:
        return {"reason": failure(error, request["device"])}
    return found.to_json()


def failure(error: Exception, device: str) -> str:
    """Say in a line why a step failed: out of memory with the numbers, else torch's own words."""
    from sparseft.benchmarking.limits import out_of_memory

    lines = str(error).strip().splitlines() or [""]
    said = f"{type(error).__name__}: {lines[0]}"[:_LONGEST]
    return out_of_memory(error, device) or said
