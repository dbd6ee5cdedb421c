"""`SparseCallback` in a stock Trainer: adapters beside checkpoints, compact ones, the best one."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparseft import Adapter, Reselection, SparseCallback, attach, lottery_ticket
from sparseft.errors import AttachError
from sparseft.training import LoopTrainer
from sparseft.training.callback import _checkpoint as checkpoint_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_spec = importlib.util.spec_from_file_location("_trainer", Path(__file__).with_name("_trainer.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
masked_trainer = _module.masked_trainer


def checkpoints(folder):
    return {int(path.name.removeprefix("checkpoint-")): path for path in folder.glob("check*")}


def weights_in(checkpoint):
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


def same_values(adapter, tensors):
    """Whether an adapter has the diffs that a checkpoint's leaves have."""
    from sparseft.modules.leaves import leaf_attribute

    return all(torch.equal(d.values, tensors[leaf_attribute(n)]) for n, d in adapter.diffs.items())


def test_an_adapter_lies_beside_each_complete_checkpoint(tiny, rows, tmp_path):
    _, sparse, trainer = masked_trainer(tiny, rows, tmp_path, save_total_limit=2)
    SparseCallback().add_to(trainer)
    trainer.train()
    found = checkpoints(tmp_path)
    assert sorted(found) == [4, 6], "rotated away, adapters and all"
    for step, folder in found.items():
        adapter = Adapter.load(folder / "adapter")
        assert same_values(adapter, weights_in(folder))
        assert adapter.metadata.extra["global_step"] == step
        assert set(adapter.dense) == {"classifier.weight", "classifier.bias"}
    last = sparse.adapter()
    assert Adapter.load(tmp_path / "adapter").digest == last.digest
    assert Adapter.load(found[4] / "adapter").digest != last.digest
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize("compact", [False, True], ids=["complete", "compact"])
def test_the_last_adapter_is_the_best_models(compact, tiny, rows, tmp_path):
    """load_best_model_at_end, early stopping and a limit of one go on working."""
    _, sparse, trainer = masked_trainer(
        tiny, rows, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, save_total_limit=1, max_steps=20,
        callbacks=[transformers.EarlyStoppingCallback(2), SparseCallback(compact=compact)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 20, "stopped early"
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.state.global_step != int(best.name.removeprefix("checkpoint-"))
    assert list(checkpoints(tmp_path).values()) == [best]
    adapter = Adapter.load(tmp_path / "adapter")
    assert adapter.digest == Adapter.load(best / "adapter").digest == sparse.adapter().digest
    assert adapter.metadata.extra["global_step"] == int(best.name.removeprefix("checkpoint-"))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_compact_checkpoints_resume_bit_for_bit(safe, tiny, rows, tmp_path):
    changes = {}
    if "save_safetensors" in inspect.signature(transformers.TrainingArguments).parameters:
        changes["save_safetensors"] = safe
    elif not safe:
        pytest.skip("transformers 5 writes safetensors alone")
    _, sparse, trainer = masked_trainer(tiny, rows, tmp_path / "whole", **changes)
    SparseCallback(compact=True).add_to(trainer)
    trainer.train()
    file = "model.safetensors" if safe else "pytorch_model.bin"
    saved = tmp_path / "whole" / "checkpoint-2"
    kept = weights_in(saved) if safe else torch.load(saved / file, weights_only=True)
    assert not {"embed.weight", "body.0.weight", "norm.weight"} & set(kept)
    assert {"embed.diff_weight", "classifier.weight"} <= set(kept)
    assert not sparse.compact_state_dict, "after training, save_model() writes the whole model"
    assert "norm.weight" in trainer.model.state_dict()
    for attached in ({}, {"compact_state_dict": True}):
        model, again, trainer = masked_trainer(
            tiny, rows, tmp_path / f"again{len(attached)}", attached=attached, **changes
        )
        SparseCallback(compact=True).add_to(trainer)
        trainer.train(resume_from_checkpoint=str(saved))
        assert again.adapter().digest == sparse.adapter().digest
        assert again.compact_state_dict == bool(attached), "as it was attached"
        assert tiny.same_bits(tiny.bits(model), tiny.bits(sparse.model)) or attached


def test_entries_seen_before_an_interruption_stay_seen(tiny, rows, tmp_path):
    """Also where Trainer makes callbacks anew, and from a checkpoint that knows nothing."""
    _, sparse, trainer = masked_trainer(tiny, rows, tmp_path / "whole")
    SparseCallback().add_to(trainer)
    trainer.train()
    wanted = [row.no_gradient for row in sparse.report()]
    assert sum(wanted) > 0
    saved = str(tmp_path / "whole" / "checkpoint-4")

    heard = {}

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.update({key: value for key, value in logs.items() if key[:7] == "sparse/"})

    for restored in (False, True):
        _, again, trainer = masked_trainer(
            tiny, rows, tmp_path / f"again{restored}", save_strategy="no",
            restore_callback_states_from_checkpoint=restored, callbacks=[Reporter()],
        )  # fmt: skip
        given = SparseCallback(adapter="mine").add_to(trainer)
        heard.clear()
        trainer.train(resume_from_checkpoint=saved)
        assert [row.no_gradient for row in again.report()] == wanted
        assert heard["sparse/no_gradient_yet"] == sum(wanted), "the reporter got it"
        assert (given in trainer.callback_handler.callbacks) != restored
        assert again.adapter().digest == sparse.adapter().digest

    _, bare, trainer = masked_trainer(tiny, rows, tmp_path / "bare")
    trainer.train()
    _, again, trainer = masked_trainer(tiny, rows, tmp_path / "after")
    SparseCallback().add_to(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "bare" / "checkpoint-4"))
    assert [row.no_gradient for row in again.report()] == wanted, "entries that moved were seen"
    assert (tmp_path / "after" / "checkpoint-6" / "adapter").is_dir()


def test_after_an_interruption_the_model_saves_whole(tiny, rows, tmp_path):
    model, sparse, trainer = masked_trainer(tiny, rows, tmp_path)
    compact = []

    class Stop(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            compact.append("norm.weight" not in model.state_dict())

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    SparseCallback(compact=True).add_to(trainer)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert compact == [True]
    assert "norm.weight" in model.state_dict()
    assert not sparse.compact_state_dict


def test_two_callbacks_of_two_attachments(tiny, rows, tmp_path):
    """Each saves its own, also where Trainer makes them anew; trainer_state.json does not grow."""

    def build(folder, restored):
        model, first, trainer = masked_trainer(
            tiny, rows, folder, max_steps=8, restore_callback_states_from_checkpoint=restored
        )
        second = attach(model, {"norm.weight": torch.ones_like(model.norm.weight) > 0})
        for name, sparse in (("one", first), ("two", second)):
            SparseCallback(sparse, adapter=name).add_to(trainer)
        return trainer, {"one": first, "two": second}

    trainer, whole = build(tmp_path / "whole", False)
    trainer.train()
    for step in (2, 4, 8):
        text = (tmp_path / f"whole/checkpoint-{step}/trainer_state.json").read_text()
        assert len(json.loads(text)["stateful_callbacks"]["SparseCallback"]) == 2
    trainer, again = build(tmp_path / "again", True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    for name, sparse in again.items():
        found = Adapter.load(tmp_path / "again" / name)
        assert found.digest == sparse.adapter().digest == whole[name].adapter().digest


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(True, id="after-reselection"),
        pytest.param(False, id="before-reselection", marks=pytest.mark.slow),
    ],
)
def test_masks_that_move(first, tiny, rows, tmp_path):
    """Adapters have the masks of their moment, seen entries follow, and a resumed run agrees."""

    def build(folder):
        _, sparse, trainer = masked_trainer(tiny, rows, folder)
        moving = Reselection(sparse, every=3, accumulate=2, rate=0.4)
        if first:
            trainer.add_callback(moving)
        SparseCallback(sparse).add_to(trainer)
        if not first:
            trainer.add_callback(moving)
        return sparse, trainer, moving

    sparse, trainer, moving = build(tmp_path / "whole")
    before = {n: p.indices.clone() for n, p in sparse.patterns.items()}
    trainer.train()
    assert moving.rounds == 1
    assert moving.moved > 0
    start, end = (Adapter.load(tmp_path / f"whole/checkpoint-{n}/adapter") for n in (2, 4))
    assert all(torch.equal(start.diffs[n].indices, before[n]) for n in before)
    assert all(end.diffs[n].pattern.equals(p) for n, p in sparse.patterns.items())
    assert same_values(end, weights_in(tmp_path / "whole" / "checkpoint-4"))
    for at in (4,) if first else (2, 4):
        again, trainer, _ = build(tmp_path / f"again-{at}")
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
        assert again.adapter().digest == sparse.adapter().digest
        assert again.report() == sparse.report()


def test_in_a_lottery_ticket(tiny, rows, tmp_path):
    def make_trainer(model, phase):
        args = transformers.TrainingArguments(
            output_dir=str(phase.output_dir), max_steps=2, per_device_train_batch_size=4,
            save_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            seed=phase.seed,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
        if phase.attachment is not None:
            SparseCallback().add_to(trainer)
        return trainer

    result = lottery_ticket(
        make_trainer, tiny.plain_classifier(), nnz=300, output_dir=tmp_path,
        full_params=("classifier.*",), exclude=("norm.*",), l1=(0.0, 0.1),
    )  # fmt: skip
    (found,) = tmp_path.rglob("checkpoint-2/adapter/adapter.safetensors")
    assert (found.parent.parent / "sparseft_complete.json").is_file()
    assert Adapter.load(found).digest == result.adapter.digest
    logs = [entry for entry in result.history if "sparse/nnz" in entry]
    assert logs
    assert {entry["phase"] for entry in logs} == {"iteration-0/sparse-nnz-300"}


def test_a_diff_that_is_not_finite_costs_its_adapter_only(tiny, rows, tmp_path, caplog):
    _, sparse, trainer = masked_trainer(tiny, rows, tmp_path)
    SparseCallback().add_to(trainer)

    class Spoil(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    next(iter(sparse.leaves.values()))[0] = math.nan

    trainer.add_callback(Spoil())
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "adapter").is_dir()
    assert not (tmp_path / "checkpoint-4" / "adapter").exists()
    assert "no adapter in" in caplog.text
    assert "entry 0 is nan" in caplog.text


def test_what_it_refuses_and_what_it_leaves_alone(tiny, rows, tmp_path):
    model, sparse, trainer = masked_trainer(tiny, rows, tmp_path, max_steps=2)
    with pytest.raises(AttachError, match=r"got Linear, wanted what sparseft\.attach\(\) returned"):
        SparseCallback(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="is for transformers.Trainer, got LoopTrainer"):
        SparseCallback().add_to(LoopTrainer(model, rows, steps=1, output_dir=tmp_path))
    callback = SparseCallback(adapter=None).add_to(trainer)
    assert callback.add_to(trainer) is callback
    kinds = [type(c).__name__ for c in trainer.callback_handler.callbacks]
    assert (kinds.count("SparseCallback"), kinds.count("SparseForerunner")) == (1, 1)
    hooks = len(model._forward_pre_hooks)
    trainer.train()
    assert len(model._forward_pre_hooks) == hooks
    assert not (tmp_path / "adapter").exists()
    other = SparseCallback(sparse)
    there = SimpleNamespace(is_world_process_zero=False, global_step=2)
    other.on_save(trainer.args, there, None)
    other.on_train_end(trainer.args, there, None)
    assert not list(tmp_path.rglob("adapter*")), "only the first process writes"
    sparse.detach()
    with pytest.raises(AttachError, match="no masks are attached to this PlainClassifier"):
        trainer.train()
    _, sparse, trainer = masked_trainer(tiny, rows, tmp_path, model=model, max_steps=1)
    callback.add_to(trainer)
    trainer.train()
    assert callback.attachment is sparse, "the masks of the model that trains now"
    _, _, trainer = masked_trainer(tiny, rows, tmp_path, max_steps=1)
    SparseCallback(sparse).add_to(trainer)
    with pytest.raises(AttachError, match="none of whose masks is on the PlainClassifier"):
        trainer.train()  # would train what nobody meant, and save an adapter of zeros


def test_the_checkpoint_of_a_trial_is_the_newest(tmp_path):
    """A hyper-parameter search has a folder for each trial."""
    import os

    args = SimpleNamespace(output_dir=str(tmp_path))
    for age, name in enumerate(("run-1/checkpoint-4", "run-0/checkpoint-4", "checkpoint-4")):
        (tmp_path / name).mkdir(parents=True)
        os.utime(tmp_path / name, (100 - age, 100 - age))
    for search, step, wanted in (
        (True, 4, "run-1/checkpoint-4"), (False, 4, "checkpoint-4"), (True, 6, None),
        (False, 6, None),
    ):  # fmt: skip
        state = SimpleNamespace(global_step=step, is_hyper_param_search=search)
        assert checkpoint_of(args, state) == (wanted and tmp_path / wanted)


def test_a_trial_leaves_the_adapters_of_others_alone(tiny, rows, tmp_path, monkeypatch):
    class Search(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_hyper_param_search = True

    _, sparse, trainer = masked_trainer(tiny, rows, tmp_path, max_steps=2, callbacks=[Search()])
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(tmp_path / "run-1"))
    SparseCallback().add_to(trainer)
    trainer.train()
    assert not (tmp_path / "adapter").exists(), "it would be the last trial's, not the best one's"
    assert Adapter.load(tmp_path / "run-1" / "adapter").digest == sparse.adapter().digest


def test_a_copy_of_a_trainer_has_its_own_callbacks(tiny, rows, tmp_path):
    """As of a search with Ray, which pickles the trainer."""
    _, _, trainer = masked_trainer(tiny, rows, tmp_path, max_steps=2, save_strategy="no")
    SparseCallback().add_to(trainer)
    again = copy.deepcopy(trainer)
    first = again.callback_handler.callbacks[0]
    assert type(first).__name__ == "SparseForerunner"
    assert first.trainer() is again
    again.train()
    assert any("sparse/nnz" in entry for entry in again.state.log_history)
    assert trainer.state.log_history == []


def test_a_class_derived_from_it_is_a_callback_of_trainer():
    class Mine(SparseCallback):
        pass

    mine = Mine(log=False)
    assert isinstance(mine, SparseCallback)
    assert isinstance(mine, transformers.TrainerCallback)
    assert type(mine).__name__ == "Mine"
    assert not mine.log


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.WARNING)
