"""transformers.Trainer with SparseCallback in two processes: as in one, and one adapter a save."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from sparseft import Adapter, SparseCallback
from sparseft.errors import AttachError

HERE = Path(__file__).resolve().parent


def beside(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


accuracy = beside(HERE.parent / "_accuracy.py")
trainers = beside(HERE.parent / "training" / "_trainer.py")
tiny = beside(HERE.parent / "training" / "_tiny.py")


def as_torchrun():
    """Set what torchrun sets, too, and accelerate asks for; the group is there already."""
    os.environ.update(MASTER_ADDR="localhost", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])


def network(dtype=torch.float32):
    model = tiny.plain_classifier().to(dtype)
    model.body[2].p = 0.0  # dropout is each process' own
    return model


def train(rank, folder, rows=4, resume=False, dtype=torch.float32, **options):
    """6 steps of 8 rows over all processes; returns diffs, head and what this rank wrote."""
    if "RANK" in os.environ:
        as_torchrun()
    written, save = [], Adapter.save

    def counted(self, path, *rest, **more):
        written.append(Path(path).parent.name)
        return save(self, path, *rest, **more)

    Adapter.save = counted
    model, sparse, trainer = trainers.masked_trainer(
        tiny, tiny.Rows(48), folder, model=network(dtype),
        per_device_train_batch_size=rows, **options,
    )  # fmt: skip
    SparseCallback(sparse).add_to(trainer)
    try:
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4" if resume else None)
    finally:
        Adapter.save = save
    trained = {name: p.detach().clone() for name, p in sparse.named_parameters()}
    return {"trained": trained, "written": written, "tokens": trainer.state.num_input_tokens_seen}


def apart(rank):
    """Attached before there was a group: found when training begins."""
    as_torchrun()
    _, sparse, trainer = trainers.masked_trainer(
        tiny, tiny.Rows(48), "never", model=network(), attached={"group": False}
    )
    if rank == 1:
        mask = sparse.patterns["body.0.weight"].to_mask().flip(0)
        sparse.reselect_({"body.0.weight": mask}, optimizer=None)
    sparse._kept_group.group = None
    SparseCallback(sparse).add_to(trainer)
    try:
        trainer.train()
    except AttachError as error:
        return str(error)
    return ""


def flat(run):
    return torch.cat([tensor.flatten() for tensor in run["trained"].values()])


@pytest.mark.slow  # processes that import transformers
def test_two_processes_train_as_one_and_write_once(run_ranks, tmp_path):
    zero, one = run_ranks(train, 2, str(tmp_path / "whole"))
    assert torch.equal(flat(zero), flat(one))
    assert zero["written"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "whole"]
    assert one["written"] == []
    alone = train(0, str(tmp_path / "alone"), rows=8)
    exact = train(0, str(tmp_path / "exact"), rows=8, dtype=torch.float64)
    accuracy.assert_as_accurate(flat(zero), flat(alone), flat(exact))
    digest = Adapter.load(tmp_path / "whole" / "adapter").digest
    # Resumed by as many: the same bits. By one alone: to rounding.
    again, _ = run_ranks(train, 2, str(tmp_path / "whole"), 4, True)
    assert torch.equal(flat(again), flat(zero))
    assert Adapter.load(tmp_path / "whole" / "adapter").digest == digest
    fewer = train(0, str(tmp_path / "whole"), rows=8, resume=True)
    accuracy.assert_as_accurate(flat(fewer), flat(alone), flat(exact))


@pytest.mark.slow
def test_masks_attached_before_the_group_are_compared_when_training_begins(run_ranks):
    for said in run_ranks(apart, 2):
        assert "ranks disagree on the mask of" in said
        assert "rank 1 against rank 0" in said
