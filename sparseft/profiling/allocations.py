"""Bytes that torch's allocators hand out while code runs: levels and peaks, cut at marks.

CPU: the allocator's events as ``torch.profiler`` records them, so allocations inside custom ops
count. CUDA and ROCm: the caching allocator's own counters, read and reset at each mark. What
libraries take without torch's allocator (MKL, oneDNN, the CUDA context) is in neither.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from sparseft.errors import SparseFtError

__all__ = ["Allocations", "RecordLostError", "Stretch", "how_measured", "peak_of"]

_MARK = "sparseft.profiling.mark "
_TRIES = 6
_PROBE = 97  # bytes


class RecordLostError(SparseFtError, RuntimeError):
    """A busy machine's profiler lost events, again and again."""


@dataclass(frozen=True)
class Stretch:
    """What happened from one mark to the next, in bytes above what was there at the beginning.

    Args:
        name: of the mark that ended it; ``""`` for the end of the block.
        peak: highest level within it.
        level: at its end.
    """

    name: str
    peak: int
    level: int


def how_measured(device: torch.device | str) -> str:
    """Say where the figures of a device come from."""
    if torch.device(device).type == "cuda":
        return "CUDA caching allocator"
    return "CPU allocator as recorded by torch.profiler"


class Allocations:
    """Bytes allocated inside a ``with`` block above what was there: highest, last, by stretch.

    A block that was there before and is freed inside counts on CUDA (downwards) and not on a CPU,
    whose profiler does not know its size.

    Args:
        device: ``"cpu"`` or a CUDA device.

    Attributes:
        peak, kept: highest level, and the level at the end.
        stretches: one for each mark and one to the end.
        complete: False if a busy machine's profiler lost events (seen now and then; usually all of
            them): run it again.

    Example:
        >>> with Allocations() as memory:
        ...     x = torch.zeros(1000)
        ...     memory.mark("made")
        ...     del x
        >>> memory.peak, memory.kept, memory.stretches[0].level
        (4000, 0, 4000)
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.peak = self.kept = 0
        self.complete = True
        self.stretches: list[Stretch] = []
        self._names: list[str] = []
        self._start = 0
        self._profile: Any = None

    def __enter__(self) -> Allocations:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            with _without_its_marks():
                self._profile.__enter__()
            torch.empty(_PROBE, dtype=torch.int8)  # freed at once; `_replay` looks for it
        return self

    def mark(self, name: str) -> None:
        """End a stretch here; from any thread that runs a part of the block's autograd graph."""
        if self.device.type == "cuda":
            self._read(name)
            return
        with torch.profiler.record_function(f"{_MARK}{len(self._names)}"):
            self._names.append(name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self._read("")
        else:
            with _without_its_marks():
                self._profile.__exit__(kind, error, trace)
            self._replay(self._profile.profiler.kineto_results.events())
            self._profile = None
        self.peak = max((s.peak for s in self.stretches), default=0)
        self.kept = self.stretches[-1].level if self.stretches else 0

    def _read(self, name: str) -> None:
        peak = torch.cuda.max_memory_allocated(self.device) - self._start
        level = torch.cuda.memory_allocated(self.device) - self._start
        torch.cuda.reset_peak_memory_stats(self.device)
        self.stretches.append(Stretch(name, peak, level))

    def _replay(self, events: Any) -> None:
        """Add the profiler's events up in the order of their time."""
        cpu = torch._C._autograd.DeviceType.CPU
        timeline: list[tuple[int, int, int]] = []  # time, bytes, number of the mark or -1
        for event in events:
            name = event.name()
            if name == "[memory]":
                if event.device_type() == cpu:
                    timeline.append((event.start_ns(), event.nbytes(), -1))
            elif name.startswith(_MARK):
                timeline.append((event.start_ns(), 0, int(name[len(_MARK) :])))
        timeline.sort(key=lambda one: one[0])
        probed = [size for _, size, _ in timeline[:2]] == [_PROBE, -_PROBE]
        level = peak = seen = 0
        for _, size, mark in timeline[2 * probed :]:
            level += size
            peak = max(peak, level)
            if mark >= 0:
                self.stretches.append(Stretch(self._names[mark], peak, level))
                peak, seen = level, seen + 1
        self.stretches.append(Stretch("", peak, level))
        self.complete = probed and seen == len(self._names)


@contextlib.contextmanager
def _without_its_marks() -> Iterator[None]:
    """Keep the profiler's "USDT:... profiler_start" from the terminal, and nothing else.

    torch 2.13 writes such a line at each start and stop. Its log level would hide errors too, which
    rank below. What is written meanwhile is held back and passed on, those lines aside.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            rest = b"".join(line for line in held if not line.startswith(b"USDT:"))
            if rest:
                os.write(2, rest)


def peak_of(step: Callable[[], Any], device: torch.device | str = "cpu", *, runs: int = 2) -> int:
    """Return the highest number of bytes that a step has allocated above what was there.

    Args:
        step: called ``runs`` times, or more where the profiler lost events; the first call of a
            training step also makes what later ones keep, so make that call before.
        device: where it allocates.
        runs: the highest of so many is taken.

    Raises:
        RecordLostError: fewer than ``runs`` of six calls left a record.
    """
    seen: list[int] = []
    for _ in range(max(_TRIES, runs)):
        with Allocations(device) as memory:
            step()
        if memory.complete:
            seen.append(memory.peak)
        if len(seen) == runs:
            return max(seen)
    raise RecordLostError(
        f"the profiler recorded allocations in {len(seen)} of {max(_TRIES, runs)} runs; wanted "
        f"{runs}. The machine is too busy: try again."
    )
