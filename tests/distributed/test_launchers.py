"""The launchers themselves: torchrun and accelerate launch start real processes of real scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseft import Adapter

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "docs" / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# `--cpu --num_processes 2` starts one process where there is no mpirun.
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--main_process_port", "0",
]  # fmt: skip

SMALL = """
import sys
import torch
from torch import nn
import sparseft

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
masks = {"0.weight": torch.rand(16, 8) < 0.1}
try:
    sparseft.attach(model, {"0.weight": masks["0.weight"] if rank else masks["0.weight"].flip(0)})
except sparseft.errors.AttachError as error:
    refused = str(error)
sparse = sparseft.attach(model, masks)
optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=1e-2)
ddp = nn.parallel.DistributedDataParallel(model)
torch.manual_seed(rank)
for _ in range(3):
    ddp(torch.randn(5, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
sparse.adapter().save(f"{sys.argv[1]}/{rank}")
open(f"{sys.argv[1]}/{rank}.txt", "w").write(refused)
torch.distributed.destroy_process_group()
"""


def launch(launcher, script, *arguments, folder, code=0):
    """Run a script as a user would; returns what all its processes print."""
    done = subprocess.run(
        [*launcher, str(script), *map(str, arguments)],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def accuracies(printed):
    return [float(line.split("accuracy ")[1]) for line in printed.splitlines() if "acy " in line]


def test_torchrun(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    launch(TORCHRUN, script, tmp_path, folder=tmp_path)
    for rank in range(2):
        text = "attach: ranks disagree on the mask of '0.weight': rank 1 against rank 0."
        assert text in (tmp_path / f"{rank}.txt").read_text()
    zero, one = (Adapter.load(tmp_path / str(rank)) for rank in range(2))
    assert zero.digest == one.digest
    assert zero.diffs["0.weight"].values.any()


@pytest.mark.slow
def test_torchrun_stopped_and_resumed_by_as_many_or_fewer(tmp_path):
    script = EXAMPLES / "ddp_loop.py"
    whole = launch(TORCHRUN, script, "--out", "whole", folder=tmp_path)
    assert len(accuracies(whole)) == 2, "printed once"
    assert min(accuracies(whole)) >= 0.9
    for out in ("again", "alone"):
        stop = ("--out", out, "--stop-after", 25)
        assert "step 25" in launch(TORCHRUN, script, *stop, folder=tmp_path, code=1)
        assert not (tmp_path / out / "adapter").exists()
    launch(TORCHRUN, script, "--out", "again", "--resume", folder=tmp_path)
    digest = Adapter.load(tmp_path / "whole" / "adapter").digest
    assert Adapter.load(tmp_path / "again" / "adapter").digest == digest, "bit for bit"
    alone = launch([sys.executable], script, "--out", "alone", "--resume", folder=tmp_path)
    assert min(accuracies(alone)) >= 0.9
    odd = launch(TORCHRUN, script, "--batch-size", 7, folder=tmp_path, code=1)
    assert "--batch-size 7 cannot be cut into 2 equal parts" in odd


@pytest.mark.slow
def test_trainer_under_torchrun(tmp_path):
    """Also: each checkpoint's adapter is written by one process, and resumed bit for bit."""
    script, options = EXAMPLES / "trainer.py", ("--epochs", 2, "--save-every", 8)
    whole = launch(TORCHRUN, script, "--out", "whole", *options, folder=tmp_path)
    attached, fresh = accuracies(whole)
    assert attached == fresh
    stop = launch(
        TORCHRUN, script, "--out", "again", "--stop-after", 11, *options, folder=tmp_path, code=1
    )
    assert "step 11" in stop
    assert (tmp_path / "again" / "checkpoint-8" / "adapter").is_dir()
    assert (tmp_path / "again" / "checkpoint-8" / "rng_state_1.pth").is_file(), "two processes"
    launch(TORCHRUN, script, "--out", "again", "--resume", *options, folder=tmp_path)
    digest = Adapter.load(tmp_path / "whole" / "adapter").digest
    assert Adapter.load(tmp_path / "again" / "adapter").digest == digest


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    script = EXAMPLES / "accelerate_loop.py"
    whole = launch(ACCELERATE, script, "--out", "whole", folder=tmp_path)
    attached, fresh = accuracies(whole)
    assert attached == fresh
    launch(ACCELERATE, script, "--stop-after", 15, folder=tmp_path, code=1)
    checkpoint = tmp_path / "sparse-run" / "checkpoint-10"
    assert (checkpoint / "random_states_1.pkl").is_file(), "two processes"
    launch(ACCELERATE, script, "--resume", folder=tmp_path)
    digest = Adapter.load(tmp_path / "whole" / "adapter").digest
    assert Adapter.load(tmp_path / "sparse-run" / "adapter").digest == digest
