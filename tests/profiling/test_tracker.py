"""Storages followed from the operation that makes them to the last reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseft.profiling.tracker import MemoryTracker

MLP_WEIGHTS = 2 * (64 * 64 + 64) * 4


def test_a_storage_counts_until_its_last_tensor_is_gone():
    with MemoryTracker() as tracker:
        a = torch.zeros(100)
        view = a[10:20]
        b = a + 1
        assert tracker.level == 800
        del b
        assert tracker.level == 400
        del a
        assert tracker.level == 400, "a view keeps it"
        del view
        assert tracker.level == 0
    assert tracker.peak.total == 800


def test_in_place_operations_and_reshapes_make_nothing():
    with MemoryTracker() as tracker:
        a = torch.zeros(10, 10)
        a.add_(1).mul_(2)
        a.view(-1).t()
    assert tracker.peak.total == 400


def test_sizes_are_rounded_to_blocks():
    with MemoryTracker(block=512) as tracker:
        kept = torch.zeros(1), torch.zeros(129)
    assert tracker.level == 512 + 1024
    del kept


def test_what_an_operation_holds_within_itself_counts_for_the_peak_alone():
    def inside(func, args, kwargs):
        return 1000 if func is torch.ops.aten.mul.Tensor else 0

    with MemoryTracker(workspace=inside) as tracker:
        a = torch.zeros(10)
        b = a * 2
    assert tracker.level == 80
    assert tracker.peak.total == 1080
    assert tracker.peak.inside == 1000
    assert "mul" in tracker.peak.operation
    del b


def step(fake):
    """A steady step's highest moment and the levels by kind."""
    with MemoryTracker() as tracker:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        tracker.adopt(model.parameters(), "weights")
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        inputs = torch.zeros(32, 64)
        with tracker.gradients_of(model.parameters()):
            for _ in range(2):
                tracker.restart()
                optimizer.zero_grad()
                model(inputs).pow(2).sum().backward()
                optimizer.step()
    return tracker.peak.total, dict(tracker.kinds)


def test_fake_tensors_are_followed_like_real_ones():
    with FakeTensorMode(allow_non_fake_inputs=True):
        faked = step(True)
    assert faked == step(False)


def test_gradients_are_named_when_they_accumulate_and_go_when_they_are_dropped():
    _, kinds = step(False)
    assert kinds["weights"] == MLP_WEIGHTS
    assert kinds["gradients"] == MLP_WEIGHTS


def test_adopting_moves_bytes_between_kinds():
    with MemoryTracker() as tracker:
        a, b = torch.zeros(10), torch.zeros(20)
        tracker.adopt([a], "weights")
        tracker.adopt_rest("diff")
        tracker.adopt([b], "optimizer")
    assert {k: v for k, v in tracker.kinds.items() if v} == {"weights": 40, "optimizer": 80}
    with MemoryTracker() as tracker:
        tracker.adopt([a], "weights")  # made before: counts from here on
    assert tracker.level == 40


def test_restart_forgets_the_peak():
    with MemoryTracker() as tracker:
        torch.zeros(1000)
        tracker.restart()
        torch.zeros(10)
    assert tracker.peak.total == 40


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_nothing_is_left_when_everything_is_gone(fake):
    import contextlib

    with FakeTensorMode() if fake else contextlib.nullcontext(), MemoryTracker() as tracker:
        layer = nn.Linear(8, 8)
        layer(torch.zeros(4, 8)).sum().backward()
        del layer
    assert tracker.level == 0
    assert not tracker._known
