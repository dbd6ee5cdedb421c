"""`SparseCallback`'s figures: in Trainer's logs, TensorBoard and W&B; tokens a second; warnings."""

from __future__ import annotations

import copy
import importlib.util
import logging
import pickle
from pathlib import Path

import pytest
import torch

from sparseft import SparseCallback, TrainingMeter, attach
from sparseft.training.token_hook import count_tokens
from sparseft.training.trained_state import trained_state

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_spec = importlib.util.spec_from_file_location("_trainer", Path(__file__).with_name("_trainer.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
masked_trainer = _module.masked_trainer

KEYS = {
    f"sparse/{key}"
    for key in (
        "nnz", "density", "diff_norm", "l1", "trained_state_bytes", "rounded_away",
        "no_gradient_yet", "tokens_per_second",
    )
}  # fmt: skip


class Reporter(transformers.TrainerCallback):
    """As TensorBoard's and W&B's: given the logs at each event."""

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append(dict(logs))


def sparse_keys(entry):
    return {key for key in entry if key.startswith("sparse/")}


@pytest.mark.parametrize("added", [True, False], ids=["add_to", "callbacks"])
def test_the_figures_are_in_training_logs(added, tiny, rows, tmp_path):
    reporter = Reporter()
    mine = SparseCallback()
    _, sparse, trainer = masked_trainer(
        tiny, rows, tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="no",
        callbacks=[reporter] if added else [reporter, mine],
    )  # fmt: skip
    if added:
        mine.add_to(trainer)
    result = trainer.train()
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(training) == 3
    assert all(sparse_keys(entry) == KEYS for entry in training)
    assert evaluations
    assert not any(map(sparse_keys, evaluations))
    heard = [entry for entry in reporter.heard if "loss" in entry]
    assert [sparse_keys(entry) == KEYS for entry in heard] == [added] * 3

    metrics, diffs = result.metrics, list(sparse.leaves.values())
    assert metrics["sparse/nnz"] == sparse.nnz == 300
    assert metrics["sparse/density"] == pytest.approx(sparse.density)
    norm = torch.cat(diffs).detach().double().norm()
    assert metrics["sparse/diff_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert metrics["sparse/l1"] == pytest.approx(float(sparse.l1_norm().detach()), rel=1e-5)
    # Index, base, leaf, gradient, two moments; of the head a copy, gradient and two moments.
    assert metrics["sparse/trained_state_bytes"] == 300 * 24 + (16 * 3 + 3) * 16
    assert metrics["sparse/trained_state_bytes"] == trained_state(sparse, trainer.optimizer).total


def test_tensorboard_has_the_figures(tiny, rows, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    _, sparse, trainer = masked_trainer(
        tiny, rows, tmp_path, save_strategy="no", report_to=["tensorboard"]
    )
    SparseCallback().add_to(trainer)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for key in KEYS:
        points = events.Scalars(f"train/{key}")
        wanted = [e for e in trainer.state.log_history if key in e]
        assert [p.step for p in points] == [e["step"] for e in wanted]
        assert [p.value for p in points] == pytest.approx([e[key] for e in wanted])


def test_wandb_has_the_figures(tiny, rows, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="W&B is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    _, sparse, trainer = masked_trainer(
        tiny, rows, tmp_path, save_strategy="no", report_to=["wandb"]
    )
    SparseCallback().add_to(trainer)
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/sparse/nnz"] == sparse.nnz
    assert {f"train/{key}" for key in KEYS} <= set(summary)


def test_tokens_are_counted_from_shapes_or_by_trainer(tiny, rows, tmp_path, monkeypatch):
    """4 rows of 8 tokens, 3 steps a log, accumulated twice; the clock is ours: 2 s a log."""
    from sparseft.training import meter

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    class Tick(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.now += 1.0

    rates = {}
    for counted in ("no", "all"):
        clock = Clock()
        monkeypatch.setattr(meter, "time", clock)
        if counted == "all" and transformers.__version__ < "5":
            changes = {"include_num_input_tokens_seen": True}
        else:
            changes = {"include_num_input_tokens_seen": counted}
        _, _, trainer = masked_trainer(
            tiny, rows, tmp_path / counted, save_strategy="no", gradient_accumulation_steps=2,
            eval_strategy="steps", eval_steps=2, callbacks=[Tick()], **changes,
        )  # fmt: skip
        SparseCallback().add_to(trainer)
        trainer.train()
        found = [e["sparse/tokens_per_second"] for e in trainer.state.log_history if "loss" in e]
        rates[counted] = found
    assert rates == {"no": [64.0] * 3, "all": [64.0] * 3}


def test_only_training_forwards_of_the_model_itself_count(monkeypatch):
    """Not evaluation, copies and pickles of the model, nor what torch.compile traces."""
    model = torch.nn.Sequential(torch.nn.Embedding(64, 16), torch.nn.Linear(16, 2))
    meter = TrainingMeter(attach(model, {"0.weight": torch.eye(64, 16) > 0}))
    end = count_tokens(model, meter)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        each(ids)
    with torch.no_grad():
        model(ids)
    with monkeypatch.context() as traced:
        traced.setattr(torch.compiler, "is_compiling", lambda: True)
        model(ids)
    model.eval()(ids)
    assert meter.counted == 0
    model.train()(ids)
    assert meter.counted == 10
    end()
    model(ids)
    assert meter.counted == 10


@pytest.mark.slow
def test_a_compiled_model_trains_the_same_with_and_without(tiny, rows, tmp_path):
    """No count is traced into the graph."""
    digests = set()
    for watched in (False, True):
        torch._dynamo.reset()
        _, sparse, trainer = masked_trainer(
            tiny, rows, tmp_path / str(watched), save_strategy="no", torch_compile=True,
            torch_compile_backend="eager", max_steps=4,
        )  # fmt: skip
        counters = torch._dynamo.utils.counters
        counters.clear()
        mine = SparseCallback()
        if watched:
            mine.add_to(trainer)
        trainer.train()
        assert not watched or mine.meter.counted == 4 * 4 * 8
        digests.add(sparse.adapter().digest)
        breaks = dict(counters["graph_break"])
        graphs = counters["stats"]["unique_graphs"]
        digests.add((graphs, len(breaks)))
    assert len(digests) == 2, digests


def test_entries_without_a_gradient_are_named_when_training_ends(tiny, rows, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    _, sparse, trainer = masked_trainer(tiny, rows, tmp_path, save_strategy="no")
    mine = SparseCallback().add_to(trainer)
    trainer.train()
    count = int((sparse.leaves["embed.weight"] == 0).sum())  # AdamW moves what has a gradient
    assert count > 0
    assert {r.name: r.no_gradient for r in sparse.report() if r.no_gradient} == {
        "embed.weight": count
    }
    of = sparse.patterns["embed.weight"].nnz
    text = [r.getMessage() for r in caplog.records if "never got a gradient" in r.getMessage()]
    assert len(text) == 1
    assert f"{count} of 300 trained entries never got a gradient in 6 steps" in text[0]
    assert f"embed.weight ({count} of {of})" in text[0]
    assert mine.meter.steps == 6


def test_nothing_is_watched_or_logged_unless_wanted(tiny, rows, tmp_path, caplog):
    _, sparse, trainer = masked_trainer(tiny, rows, tmp_path, save_strategy="no")
    SparseCallback(watch_entries=False, log=False).add_to(trainer)
    trainer.train()
    assert not any(map(sparse_keys, trainer.state.log_history))
    assert {row.no_gradient for row in sparse.report()} == {None}
    assert "never got a gradient" not in caplog.text
