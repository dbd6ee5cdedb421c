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
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from sparseft.errors import SparseFtError

__all__ = ["NotMeasuredError", "call_apart", "call_ranks", "failure", "main"]

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


def call_ranks(
    request: Mapping[str, Any], world_size: int, *, threads: int
) -> list[dict[str, Any]]:
    """Return what `measure_rank` finds in each of so many new processes, by rank.

    Args:
        request: ``workload``, ``way`` (fields of each), ``device``, ``sharding``.
        world_size: how many.
        threads: of torch in each.

    Raises:
        NotMeasuredError: one failed, ran out of memory or was killed; the others are then ended.
    """
    with tempfile.TemporaryDirectory(prefix="sparseft-profile-") as name, ExitStack() as opened:
        folder = Path(name)
        processes = []
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size, "store": str(folder / "store")}
            asked = folder / f"request-{rank}.json"
            asked.write_text(json.dumps({**request, **place, "threads": threads}))
            files = [opened.enter_context(open(asked)), _errors_of(folder, rank)]
            opened.enter_context(files[1])
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        _CODE,
                        json.dumps(sys.path),
                        str(_answer_of(folder, rank)),
                    ],
                    stdin=files[0],
                    stdout=subprocess.DEVNULL,
                    stderr=files[1],
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                )
            )
        try:
            _all_end(processes, folder)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads(_answer_of(folder, r).read_text()) for r in range(world_size)]


def _answer_of(folder: Path, rank: int) -> Path:
    return folder / f"answer-{rank}.json"


def _errors_of(folder: Path, rank: int) -> IO[str]:
    return open(folder / f"errors-{rank}.txt", "w+")


def _all_end(processes: list[subprocess.Popen], folder: Path) -> None:
    """Wait for all; raise what the first one that fails says, for the others then wait for it."""
    left = dict(enumerate(processes))
    while left:
        time.sleep(0.02)
        for rank, process in list(left.items()):
            code = process.poll()
            if code is None:
                continue
            del left[rank]
            file = _answer_of(folder, rank)
            if not file.is_file():
                said = (folder / f"errors-{rank}.txt").read_text(errors="replace")
                raise NotMeasuredError(f"rank {rank}: {_end(code, said)}")
            answer = json.loads(file.read_text(encoding="utf-8"))
            if "reason" in answer:
                raise NotMeasuredError(f"rank {rank}: {answer['reason']}")


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
    step = Workload(**request["workload"]), Way(**request["way"])
    try:
        if "rank" in request:
            found = _of_a_rank(request, *step)
        else:
            found = measure_here(*step, request["device"], steps=request["steps"])
    except SparseFtError as error:
        return {"reason": str(error)}
    except Exception as error:
        return {"reason": failure(error, request["device"])}
    return found.to_json()


def _of_a_rank(request: Mapping[str, Any], workload: Any, way: Any) -> Any:
    """Join the group that the request names, measure, and leave it."""
    import torch
    import torch.distributed as dist

    from sparseft.profiling.rank_measure import measure_rank

    rank, device = request["rank"], torch.device(request["device"])
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=Path(request["store"]).as_uri(),
        rank=rank,
        world_size=request["world_size"],
    )
    try:
        return measure_rank(workload, way, device, request["sharding"])
    finally:
        dist.destroy_process_group()


def failure(error: Exception, device: str) -> str:
    """Say in a line why a step failed: out of memory with the numbers, else torch's own words."""
    from sparseft.benchmarking.limits import out_of_memory

    lines = str(error).strip().splitlines() or [""]
    said = f"{type(error).__name__}: {lines[0]}"[:_LONGEST]
    return out_of_memory(error, device) or said
