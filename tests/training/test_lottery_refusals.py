"""What a lottery ticket refuses, and how it says so."""

from __future__ import annotations

import math

import pytest
import torch

from sparseft.errors import (
    DataError,
    MaskError,
    NonFiniteLossError,
    SparseFtError,
    UnknownNameError,
)
from sparseft.modules.ranks import started
from sparseft.training import LoopTrainer


def test_bad_input_is_named(run, tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    with pytest.raises(DataError, match="empty"):
        run(make(dataset=[]), model, tmp_path / "e")
    with pytest.raises(MaskError, match="one of the two; got both"):
        run(make(), model, tmp_path, density=0.1)
    with pytest.raises(MaskError, match=r"nnz=100,000,000 entries were asked for but"):
        run(make(), model, tmp_path, nnz=100_000_000)
    with pytest.raises(MaskError, match=r"density is 1\.5, wanted a fraction in \(0, 1\]"):
        run(make(), model, tmp_path, nnz=None, density=1.5)
    for nnz in (True, "50", 50.7, 0):
        with pytest.raises(MaskError, match="nnz"):
            run(make(), model, tmp_path, nnz=nnz)
    with pytest.raises(MaskError, match="density is '0.1'"):
        run(make(), model, tmp_path, nnz=None, density="0.1")
    with pytest.raises(UnknownNameError, match=r"'\*LayrNorm\*'"):
        run(make(), model, tmp_path, exclude=("*LayrNorm*",))
    with pytest.raises(MaskError, match="no parameter is left"):
        run(make(), model, tmp_path, include=("*LayerNorm*",))
    with pytest.raises(ValueError, match="l1 must be"):
        run(make(), model, tmp_path, l1=-1.0)
    with pytest.raises(ValueError, match="list of nnz"):
        run(make(), model, tmp_path, nnz=[1, 2], iterations=2)
    with pytest.raises(TypeError, match="make_trainer returned NoneType"):
        run(lambda m, p: None, model, tmp_path / "n")


def test_a_nan_loss_says_the_phase_step_and_checkpoint(run, tiny, make, tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(None)
        return model(**batch).loss * (math.nan if len(calls) == 10 else 1.0)

    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    with pytest.raises(NonFiniteLossError, match="step 3 of 6") as caught:
        run(make(loss_fn=loss, save_every=2), model, tmp_path)
    assert "sparse-nnz-500/checkpoint-00000002.pt" in str(caught.value)
    assert tiny.same_bits(before, tiny.bits(model))
    resumed = run(make(save_every=2), model, tmp_path)
    whole = run(make(save_every=2), tiny.tiny_classifier(), tmp_path / "whole")
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_several_processes_are_refused(run, tiny, make, tmp_path, monkeypatch, capsys):
    """As torchrun starts them: a second one would wait for the first one's folder, or share it."""
    from sparseft.cli.main import main
    from sparseft.demo.study import run_demo

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert started() == 1, "a scheduler's variable that no launcher set"
    monkeypatch.setenv("RANK", "1")
    assert started() == 2
    with pytest.raises(SparseFtError, match=r"2 processes .* lottery_ticket .*init_process_group"):
        run(make(), tiny.tiny_classifier(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    trainer = LoopTrainer(torch.nn.Linear(2, 2), [0], steps=1, output_dir="never")
    with pytest.raises(SparseFtError, match=r"LoopTrainer .* 2 were started .*ddp_loop.py"):
        trainer.train()
    with pytest.raises(SparseFtError, match="the demo runs in one process, but 2"):
        run_demo(quiet=True)
    assert main(["train", "nusax_senti", "--only", "*"]) != 0
    assert "a study (sparseft train, sweep) runs in one process" in capsys.readouterr().err
