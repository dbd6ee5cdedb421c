"""`TrainingMeter`: readings, tokens, entries without a gradient, underflow."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparseft import SparseAdamW, TrainingMeter, attach
from sparseft.errors import AttachError
from sparseft.training import LoopTrainer, underflow
from sparseft.training.meter import tokens_in
from sparseft.training.trained_state import trained_state


class Net(nn.Module):
    """An embedding of ten tokens of which three occur, and two layers."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4, dtype=dtype)
        self.up = nn.Linear(4, 8, dtype=dtype)
        self.head = nn.Linear(8, 2, dtype=dtype)

    def forward(self, ids):
        return self.head(torch.tanh(self.up(self.embed(ids)))).float()


IDS = torch.tensor([[1, 2, 3], [3, 2, 1]])


def attached(dtype=torch.float32, **options):
    model = Net(dtype)
    masks = {"embed.weight": torch.ones(10, 4) > 0, "up.weight": torch.eye(8, 4) > 0}
    return model, attach(model, masks, **options)


def train(model, optimizer, meter, steps=3, scale=1.0):
    for _ in range(steps):
        meter.see(IDS)
        (model(IDS).pow(2).sum() * scale).backward()
        meter.before_step()
        optimizer.step()
        optimizer.zero_grad()


def test_a_reading(monkeypatch):
    clock = SimpleNamespace(now=10.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("sparseft.training.meter.time", clock)
    model, sparse = attached(full_params=["head.*"])
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    meter = TrainingMeter(sparse, optimizer)
    train(model, optimizer, meter)
    clock.now += 2.0
    reading = meter.read()
    leaves = torch.cat([leaf.detach() for leaf in sparse.leaves.values()])
    assert (reading.steps, reading.nnz, reading.density) == (3, 44, sparse.density)
    assert reading.diff_norm == pytest.approx(float(leaves.norm()), rel=1e-6)
    assert reading.l1 == pytest.approx(float(leaves.abs().sum()), rel=1e-6)
    assert reading.never_touched == {"embed.weight": 28}
    assert reading.tokens_per_second == 9.0
    assert reading.rounded_away == reading.report.total.rounded_away
    state = trained_state(sparse, optimizer)
    assert (state.index, state.base, state.diff) == (44 * 4, 44 * 4 + 18 * 4, 44 * 4)
    assert (state.gradients, state.optimizer) == (62 * 4, 62 * 4)
    assert reading.trained_state_bytes == state.total == meter.trained_state_bytes
    assert trained_state(sparse, optimizer, full_params=False).total == 44 * 20
    assert trained_state(sparse) == state, "the optimizer that has stepped the leaves"
    assert meter.read().tokens_per_second is None, "none since"


def test_state_of_eight_bits_and_of_a_frozen_leaf():
    model, sparse = attached()
    optimizer = SparseAdamW(sparse.parameters(), lr=0.1, moment_bits=8)
    train(model, optimizer, TrainingMeter(sparse, optimizer), steps=1)
    state = trained_state(sparse, optimizer)
    assert state.optimizer == 2 * (44 + 2 * 4), "a byte an entry, a scale for each block of 256"
    sparse.leaves["up.weight"].requires_grad_(False)
    assert trained_state(sparse, optimizer).gradients == state.gradients - 4 * 4
    meter = TrainingMeter(sparse, optimizer)
    meter.before_step()
    rows = {row.name: row.no_gradient for row in sparse.report()}
    assert rows == {"embed.weight": 28, "up.weight": 0}


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"input_ids": torch.zeros(2, 7, dtype=torch.long), "labels": torch.zeros(2, 9)}, 14),
        ({"inputs_embeds": torch.zeros(2, 5, 16)}, 10),
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, 0),
        (torch.zeros(3, 4, dtype=torch.int32), 12),
        (torch.zeros(3, 4), 0),
        ((torch.zeros(3), torch.zeros(2, 6, dtype=torch.long), torch.zeros(9, 9).long()), 12),
        ([{"input_ids": torch.zeros(1, 3, dtype=torch.long)}], 3),
        ("text", 0),
        (None, 0),
    ],
    ids=["ids", "embeds", "pixels", "tensor", "floats", "tuple", "list", "text", "none"],
)
def test_tokens_in(batch, count):
    assert tokens_in(batch) == count


def test_entries_without_a_gradient_are_logged_once(caplog):
    model, sparse = attached()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    for _ in range(2):  # two meters, as of two epochs
        meter = TrainingMeter(sparse, optimizer)
        train(model, optimizer, meter)
        meter.warn(meter.read())
        meter.warn(meter.read(), last=True)
    messages = [r.getMessage() for r in caplog.records if "never got" in r.getMessage()]
    assert len(messages) == 1
    assert (
        "28 of 44 trained entries never got a gradient in 3 steps: embed.weight (28 of 40)"
        in (messages[0])
    )
    assert "sparseft.Reselection" in messages[0]


def test_a_run_that_diverged_says_nothing_of_entries_without_a_gradient(caplog):
    model, sparse = attached()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    meter = TrainingMeter(sparse, optimizer)
    train(model, optimizer, meter, scale=math.nan)
    reading = meter.read()
    assert reading.never_touched == {"embed.weight": 40, "up.weight": 4}
    meter.warn(reading, last=True)
    assert "never got" not in caplog.text


def test_half_precision_that_drops_diffs_is_logged(caplog, monkeypatch):
    monkeypatch.setattr(underflow, "STEPS", 3)
    for dtype, lr, warned in (
        (torch.bfloat16, 1e-7, True),
        (torch.float16, 1e-7, True),
        (torch.bfloat16, 0.1, False),
        (torch.float32, 1e-7, False),
    ):
        caplog.clear()
        model, sparse = attached(dtype)
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=lr, weight_decay=0.0)
        meter = TrainingMeter(sparse, optimizer)
        train(model, optimizer, meter, steps=2)
        meter.warn(meter.read())
        assert "too small to change" not in caplog.text, "diffs grow from zero"
        train(model, optimizer, meter, steps=2)
        meter.warn(meter.read())
        meter.warn(meter.read(), last=True)
        assert caplog.text.count("too small to change their weight") == warned
        if warned:
            row = {row.name: row for row in sparse.report()}["up.weight"]
            assert f"up.weight ({row.rounded_away} of {row.changed})" in caplog.text
            assert str(dtype).removeprefix("torch.") in caplog.text
            assert "stochastic_rounding=True" in caplog.text


def test_stochastic_rounding_is_right_on_average(caplog):
    model, sparse = attached(torch.bfloat16)
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-7, stochastic_rounding=True)
    meter = TrainingMeter(sparse, optimizer)
    train(model, optimizer, meter)
    assert meter.read().rounded_away > 0
    meter.warn(meter.read(), last=True)
    assert "too small to change" not in caplog.text


def test_gradients_of_zero_in_fp16_are_logged(caplog):
    """With the loss scaled they are there; embeddings, whose rows are zero anyway, do not count."""
    for scale, warned in ((1e-9, True), (1.0, False)):
        caplog.clear()
        model, sparse = attached(torch.float16)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        meter = TrainingMeter(sparse, optimizer)
        train(model, optimizer, meter, steps=2, scale=scale)
        meter.warn(meter.read())
        train(model, optimizer, meter, steps=2, scale=scale)
        meter.warn(meter.read(), last=True)
        assert caplog.text.count("is exactly zero") == warned
        if warned:
            assert "up.weight (8 of 8)" in caplog.text
            assert "torch.amp.GradScaler" in caplog.text
            text = next(r.getMessage() for r in caplog.records if "exactly zero" in r.getMessage())
            assert "embed.weight" not in text


def test_what_it_refuses():
    _, sparse = attached()
    with pytest.raises(AttachError, match="reads an Attachment, got Net"):
        TrainingMeter(sparse.model)
    sparse.detach()
    with pytest.raises(AttachError, match="detached"):
        TrainingMeter(sparse)


def test_in_a_loop_trainer(tmp_path):
    model, sparse = attached()
    loop = LoopTrainer(
        model, [IDS] * 8, steps=3, batch_size=2, output_dir=tmp_path, collate=torch.cat,
        loss_fn=lambda model, batch: model(batch).pow(2).mean(),
    )  # fmt: skip
    meter = TrainingMeter(sparse)
    loop.add_callback(meter)
    loop.train()
    assert meter.steps == 3
    assert meter.read().never_touched == {"embed.weight": 28}


def test_not_looking_is_not_knowing():
    model, sparse = attached()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    meter = TrainingMeter(sparse, optimizer, watch_entries=False)
    train(model, optimizer, meter)
    assert meter.read().never_touched is None
    assert math.isfinite(meter.read().diff_norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_reads_no_value(dtype, monkeypatch):
    """Whatever a step did read would make a GPU's queue run dry."""
    model, sparse = attached(dtype)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    meter = TrainingMeter(sparse, optimizer)
    for _ in range(2):
        model(IDS).pow(2).sum().backward()
        with monkeypatch.context() as patched:
            for read in ("item", "tolist", "nonzero", "cpu", "__bool__", "__int__", "__float__"):
                patched.setattr(torch.Tensor, read, None)
            meter.see(IDS)
            meter.before_step()
            assert meter.trained_state_bytes > 0
        optimizer.step()
        optimizer.zero_grad()
    assert meter.read().never_touched == {"embed.weight": 28}


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device():
    model, sparse = attached(torch.float16)
    model.cuda()
    optimizer = SparseAdamW(sparse.parameters(), lr=0.1)
    meter = TrainingMeter(sparse, optimizer)
    ids = IDS.cuda()
    for round_ in range(3):
        meter.see(ids)
        model(ids).pow(2).sum().backward()
        if round_:  # the first one makes the flags and follows the masks to the device
            torch.cuda.set_sync_debug_mode("error")
        try:
            meter.before_step()
            assert meter.trained_state_bytes > 0
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.step()
    assert meter.read().never_touched == {"embed.weight": 28}


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level(logging.WARNING)
