"""A lottery ticket over Trainers in two processes: as in one, one writes, killed and continued."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch

import sparseft
from sparseft.errors import SparseFtError
from sparseft.training import LoopTrainer

HERE = Path(__file__).resolve().parent


def beside(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


accuracy = beside(HERE.parent / "_accuracy.py")
tiny = beside(HERE.parent / "training" / "_tiny.py")


def ticket(rank, folder, rows=4, selector="magnitude", dtype=torch.float32, stop_at=None):
    """Two phases of 6 steps of 8 rows over all processes."""
    import transformers

    if "RANK" in os.environ:  # what torchrun sets, too
        os.environ.update(MASTER_ADDR="localhost", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if stop_at == (self.phase, state.global_step):
                raise KeyboardInterrupt

    def make_trainer(model, phase):
        args = transformers.TrainingArguments(
            output_dir=str(phase.output_dir), max_steps=6, per_device_train_batch_size=rows,
            learning_rate=1e-2, save_steps=2, logging_steps=2, report_to=[], use_cpu=True,
            disable_tqdm=True, label_names=["labels"], seed=phase.seed % 1000,
        )  # fmt: skip
        stop = Stop()
        stop.phase = phase.name
        return transformers.Trainer(
            model=model, args=args, train_dataset=tiny.Rows(48), callbacks=[stop]
        )

    model = tiny.plain_classifier().to(dtype)
    model.body[2].p = 0.0  # dropout is each process' own
    base = tiny.bits(model)
    try:
        result = sparseft.lottery_ticket(
            make_trainer, model, nnz=300, output_dir=folder, full_params=["classifier.*"],
            selector=selector,
        )  # fmt: skip
    except KeyboardInterrupt:
        return None
    adapter = result.adapter
    return {
        "indices": torch.cat([d.indices.long() for d in adapter.diffs.values()]),
        "values": torch.cat([d.values for d in adapter.diffs.values()]),
        "digest": adapter.digest,
        "restored": tiny.same_bits(base, tiny.bits(model)),
        "steps": len(result.history),
    }


def digest_of(folder):
    found = sorted(Path(folder).glob("**/adapter.safetensors"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in found]


@pytest.mark.slow  # processes that import transformers
def test_two_processes_make_one_ticket(run_ranks, tmp_path):
    zero, one = run_ranks(ticket, 2, str(tmp_path / "two"))
    assert zero["digest"] == one["digest"]
    assert zero["restored"] and one["restored"]  # noqa: PT018  (of both)
    alone = ticket(0, str(tmp_path / "one"), 8)
    exact = ticket(0, str(tmp_path / "exact"), 8, dtype=torch.float64)
    assert torch.equal(zero["indices"], alone["indices"])
    assert torch.equal(alone["indices"], exact["indices"])
    accuracy.assert_as_accurate(zero["values"], alone["values"], exact["values"])
    assert zero["steps"] == alone["steps"]

    # Stopped in each phase, and gone on with: the same bytes.
    again = str(tmp_path / "again")
    for stop_at in (("dense", 3), ("sparse", 3)):
        assert run_ranks(ticket, 2, again, 4, "magnitude", torch.float32, stop_at) == [None, None]
    run_ranks(ticket, 2, again)
    assert digest_of(again) == digest_of(tmp_path / "two")
    assert len(digest_of(again)) == 1
    # Done: nothing is trained, in one process either.
    assert ticket(0, again, 4)["digest"] == zero["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["random", "fisher"])
def test_masks_without_a_dense_phase(selector, run_ranks, tmp_path):
    zero, one = run_ranks(ticket, 2, str(tmp_path), 4, selector)
    assert zero["digest"] == one["digest"]
    assert zero["values"].any()


def over_loops(rank, folder):
    model = tiny.plain_classifier()

    def make_trainer(model, phase):
        return LoopTrainer(
            model, tiny.Rows(8), steps=1, output_dir=phase.output_dir, collate=tiny.collate
        )

    try:
        sparseft.lottery_ticket(make_trainer, model, nnz=30, output_dir=folder)
    except SparseFtError as error:
        return str(error)
    return ""


def test_loop_trainers_are_refused_by_all(run_ranks, tmp_path):
    for said in run_ranks(over_loops, 2, str(tmp_path)):
        assert "LoopTrainer runs in one process, but 2 were started" in said
        assert "transformers.Trainer" in said
