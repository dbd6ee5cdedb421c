"""What the allocators' records say, on allocations whose sizes are known."""

from __future__ import annotations

import os

import pytest
import torch

from sparseft.profiling import allocations
from sparseft.profiling.allocations import Allocations, RecordLostError, how_measured, peak_of

MIB = 1 << 20


def mib(n, device="cpu"):
    return torch.empty(n * MIB, dtype=torch.int8, device=device)


def known(device):
    """Levels 3, then 8 falling to 3, then 5 falling to 0."""
    there = mib(2, device)
    with Allocations(device) as memory:
        kept = mib(3, device)
        memory.mark("one")
        more = mib(5, device)
        del more
        memory.mark("two")
        last = mib(2, device)
        del last, kept
    del there
    return memory


def check(memory):
    assert memory.complete
    assert [s.name for s in memory.stretches] == ["one", "two", ""]
    assert [s.peak for s in memory.stretches] == [3 * MIB, 8 * MIB, 5 * MIB]
    assert [s.level for s in memory.stretches] == [3 * MIB, 3 * MIB, 0]
    assert memory.peak == 8 * MIB
    assert memory.kept == 0


def test_levels_and_peaks_between_marks():
    check(known("cpu"))
    assert "torch.profiler" in how_measured("cpu")


@pytest.mark.gpu
def test_levels_and_peaks_on_the_gpu():
    check(known("cuda"))
    assert "caching allocator" in how_measured("cuda:0")


def test_marks_of_hooks_lie_where_autograd_calls_them():
    a, b = (torch.ones(MIB // 4, requires_grad=True) for _ in range(2))
    with Allocations() as memory:
        for p, name in ((a, "a"), (b, "b")):
            p.register_post_accumulate_grad_hook(lambda _, name=name: memory.mark(name))
        ((a.exp() + 1).exp() * b).sum().backward()
    levels = {s.name: s.level for s in memory.stretches}
    assert sorted(levels) == ["", "a", "b"]
    assert memory.kept == 2 * MIB, "the two gradients"
    assert memory.peak >= 4 * MIB


def test_peak_of_a_step_is_above_what_was_there():
    standing = [mib(7)]

    def step():
        standing.append(mib(4))
        del standing[1:]

    assert peak_of(step) == 4 * MIB


def test_a_step_that_allocates_nothing():
    assert peak_of(lambda: None) == 0


def test_a_lost_record_is_noticed(monkeypatch):
    real = Allocations._replay
    monkeypatch.setattr(Allocations, "_replay", lambda self, events: real(self, []))
    with Allocations() as memory:
        memory.mark("one")
    assert not memory.complete
    calls = []
    with pytest.raises(RecordLostError, match="0 of 6"):
        peak_of(lambda: calls.append(mib(1)))
    assert len(calls) == allocations._TRIES


def test_the_profilers_marks_stay_off_the_terminal_and_nothing_else_does(capfd, monkeypatch):
    real = allocations.torch.profiler.profile

    class Loud(real):
        def __enter__(self):
            os.write(2, b"USDT:2026 it.cpp:52] profiler_start\na real error\n")
            return super().__enter__()

    monkeypatch.setattr(allocations.torch.profiler, "profile", Loud)
    with Allocations() as memory:
        os.write(2, b"what the block says\n")
        mib(1)
    assert memory.peak == MIB
    assert capfd.readouterr().err == "a real error\nwhat the block says\n"
