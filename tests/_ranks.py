"""Run a function of a test file in several gloo processes, as torchrun would, without its start-up.

``run_ranks(function, 2, ...)`` calls ``function(rank, *arguments)`` in two processes of one group
and returns what they returned, by rank. Processes are forked from a server that has imported torch
and sparseft once, so a call takes a second, not ten.

The function is found by its file and name, so it stands at the top level of a test file; arguments
pickle. What it returns is carried by ``torch.save`` (tensors, numbers, strings, lists and dicts of
them). An exception in any rank stops all of them and is raised here with its
traceback; a rank that waits for another that never comes does so for `TIMEOUT` seconds.
"""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["TIMEOUT", "RankError", "run_ranks"]

TIMEOUT = 120.0
_PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._dynamo",  # which fully_shard imports: half a second
    "sparseft.attachment",
    "sparseft.selection",
]
_IN_RANK = "_in_rank"


class RankError(AssertionError):
    """What went wrong in which rank; ``errors`` maps rank to the text of its traceback."""

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        texts = [f"rank {rank}:\n{text}" for rank, text in sorted(errors.items())]
        super().__init__("\n".join(texts))


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Return ``[function(rank, *arguments) for each rank]``, run side by side in one gloo group.

    Raises:
        RankError: a rank raised, died, or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    folder = Path(tempfile.mkdtemp(prefix="sparseft-ranks-"))
    file, name = function.__code__.co_filename, function.__qualname__
    if "<locals>" in name:
        raise TypeError(
            f"{name} is not at the top level of its file; other processes cannot find it"
        )
    call = world_size, file, name, arguments, str(folder), sys.path
    try:
        processes = [
            context.Process(
                # By path: no name of this file can be imported in another process.
                target=runpy.run_path,
                args=(__file__, {"CALL": (rank, *call)}, _IN_RANK),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes, folder)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(processes: list[Any], folder: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        if any(p.exitcode not in (None, 0) for p in processes):
            end = min(end, time.monotonic() + 5.0)  # the others may have a reason of their own
        time.sleep(0.02)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    errors = {}
    for rank, process in enumerate(processes):
        text = folder / f"{rank}.txt"
        if text.exists():
            errors[rank] = text.read_text()
        elif rank in late:
            errors[rank] = "was still running when it was stopped"
        elif process.exitcode != 0:
            errors[rank] = f"ended with exit code {process.exitcode} and no message"
    if errors:
        raise RankError(errors)


def _rank(
    rank: int,
    world_size: int,
    file: str,
    name: str,
    arguments: Iterable[Any],
    folder: str,
    path: list[str],
) -> None:
    out = Path(folder)
    sys.path[:] = path
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"
    )
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{out / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
        spec = importlib.util.spec_from_file_location(f"_rank_of_{Path(file).stem}", file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} cannot be loaded")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        result = getattr(module, name)(rank, *arguments)
        torch.save(result, out / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (out / f"{rank}.txt").write_text(traceback.format_exc())
        sys.exit(1)


if __name__ == _IN_RANK:
    _rank(*CALL)  # type: ignore[name-defined]  # noqa: F821  (given by run_path)
