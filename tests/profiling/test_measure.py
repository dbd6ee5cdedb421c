"""Measured memory: by hand where sizes are known, and what becomes of a process that fails."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparseft import attach
from sparseft.errors import OptionError
from sparseft.ops._layout import TILE
from sparseft.profiling import measure as measuring
from sparseft.profiling import worker
from sparseft.profiling.measure import Measurement, measure, measure_here
from sparseft.profiling.worker import NotMeasuredError, call_apart
from sparseft.profiling.workload import Way, Workload

MIB = 1 << 20
TINY = Workload(model="encoder:2x64x400", batch=2, length=16)


class Loss(nn.Module):
    """Two square layers far larger than what passes through them."""

    def __init__(self, side):
        super().__init__()
        self.first = nn.Linear(side, side, bias=False)
        self.second = nn.Linear(side, side, bias=False)
        self.register_buffer("extra", torch.zeros(side * side // 4))

    def forward(self, x):
        return SimpleNamespace(loss=self.second(self.first(x)).square().sum())


def built(model, attachment=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inputs = {"x": torch.randn(2, 1024)}

    def step():
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    return SimpleNamespace(
        model=model,
        optimizer=optimizer,
        attachment=attachment,
        inputs=inputs,
        trainable=sum(p.numel() for p in model.parameters()),
        step=step,
    )


def test_parts_of_a_dense_step(monkeypatch):
    monkeypatch.setattr(measuring, "build", lambda *_: built(Loss(1024)))
    found = measure_here(TINY, Way("dense"), steps=2)
    use = found.use
    assert use.weights == 9 * MIB, "two layers and the buffer"
    assert use.diff == 0
    assert use.optimizer == 8 * MIB, "one momentum"
    # The peak: both gradients, and nothing else of a weight's size.
    assert use.gradients + use.temporary + use.activations == pytest.approx(8 * MIB, abs=MIB / 8)
    assert use.activations < MIB / 8
    assert found.trainable == 2 * MIB
    assert 0 < found.seconds["quartile1"] <= found.seconds["median"] <= found.seconds["quartile3"]
    assert found.tokens_per_second == pytest.approx(2 * 16 / found.seconds["median"])
    assert "torch.profiler" in found.how
    assert Measurement.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_parts_of_an_attached_step(monkeypatch):
    nnz = 100_000

    def make(*_):
        model = Loss(1024)
        mask = torch.zeros(MIB, dtype=torch.bool)
        mask[torch.randperm(MIB)[:nnz]] = True
        attachment = attach(model, {"second.weight": mask.view(1024, 1024)})
        return built(model, attachment)

    monkeypatch.setattr(measuring, "build", make)
    use = measure_here(TINY, Way("attached", 0.1), steps=2).use
    assert use.weights == 9 * MIB
    # The tile that a CPU reuses; index, base, leaf, and at most as much again of the ops' plans.
    assert 12 * nnz <= use.diff - 4 * TILE <= 24 * nnz
    assert use.optimizer == 4 * nnz
    assert use.gradients in (0, 4 * nnz)
    assert use.peak < 9 * MIB + 4 * TILE + 60 * nnz, "no dense gradient"


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    def activations(**options):
        work = Workload(model="encoder:2x64x100", length=64, dropout=False, **options)
        return measure_here(work, Way("frozen"), steps=2).use.activations

    one, two = activations(batch=2), activations(batch=4)
    assert two == pytest.approx(2 * one, rel=0.05)
    assert activations(batch=4, checkpointing=True) < 0.5 * two


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(OptionError, match="4bit is predicted only"):
        measure(Workload(model="tiny-encoder", base="4bit"), Way("dense"))
    with pytest.raises(OptionError, match="at least 2 steps"):
        measure(TINY, Way("dense"), steps=1)


REQUEST = {
    "workload": {"model": "tiny-encoder"},
    "way": {"kind": "dense"},
    "device": "cpu",
    "steps": 2,
}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL; the system had no memory left"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("import sys; sys.exit('the last word')", "code 1: the last word"),
    ],
    ids=["killed", "crashed", "failed"],
)
def test_the_end_of_a_process_is_a_reason(monkeypatch, code, reason):
    monkeypatch.setattr(worker, "_CODE", code)
    with pytest.raises(NotMeasuredError, match=reason):
        call_apart(REQUEST, threads=1)


def test_errors_of_the_step_come_back_as_reasons(monkeypatch):
    threads = torch.get_num_threads()
    request = {**REQUEST, "threads": threads}
    answer = worker._answer({**request, "workload": {"model": "/no/such/folder"}})
    assert "no such folder" in answer["reason"]

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 12.50 GiB. GPU 0 has ...")

    monkeypatch.setattr(measuring, "measure_here", no_memory)
    answer = worker._answer(request)
    assert answer["reason"].startswith("out of memory: asked for 12.50 GiB more")

    def fail(*_, **__):
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(measuring, "measure_here", fail)
    assert worker._answer(request) == {"reason": "ZeroDivisionError: by zero"}


def test_sparse_tensors_of_the_caller_are_in_nobodys_way():
    kept = torch.eye(4).to_sparse()
    found = measure_here(TINY, Way("frozen"), steps=2)
    assert found.use.diff == 0
    assert kept._nnz() == 4


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way("attached", 0.1), Way("dense"), Way("lora", 0.1)], ids=str)
def test_a_process_of_its_own_finds_the_same(way):
    work = Workload(model="encoder:2x128x1000", batch=2, length=32)
    apart, here = measure(work, way, steps=2), measure_here(work, way, steps=2)
    assert apart.trainable == here.trainable
    assert apart.use.peak == pytest.approx(here.use.peak, rel=0.01)
    for part, size in here.use.parts().items():
        assert apart.use.parts()[part] == pytest.approx(size, abs=0.01 * here.use.peak), part
