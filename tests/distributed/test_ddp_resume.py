"""Checkpoints and adapters know of no ranks: another number of processes goes on from them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import sparseft

HERE = Path(__file__).resolve().parent
STEPS, HALF = 6, 3


def beside(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = beside(HERE / "_ddp.py")
accuracy = beside(HERE.parent / "_accuracy.py")


def train(rank, folder, first, last, optimizer="adamw", alone=False, dtype=torch.float32):
    """Steps first ... last of one run; rank 0 writes a checkpoint, which the next one begins with.

    Returns the diffs, and whether the adapter loads into other processes' model, too.
    """
    model = kit.make("classifier", dtype)
    sparse = kit.attached(model, group=False if alone else None)
    opt = kit.OPTIMIZERS[optimizer](sparse.parameters())
    path = Path(folder) / f"{first}.pt"
    if first:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
    wrapped = model if alone else DistributedDataParallel(model)
    for step in range(first, last):
        opt.zero_grad()
        wrapped(*(kit.batch(step) if alone else kit.part_of(rank, step))).backward()
        opt.step()
    if rank == 0:
        state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        torch.save(state, Path(folder) / f"{last}.pt")
        sparse.adapter().save(Path(folder) / f"adapter-{last}")
    return {name: p.detach().clone() for name, p in sparse.named_parameters()}


def loaded(rank, folder):
    """The adapter of other processes, attached and loaded here."""
    model = kit.make("classifier")
    adapter = sparseft.Adapter.load(Path(folder) / f"adapter-{STEPS}")
    sparse = sparseft.attach(model, adapter)
    sparse.load_adapter_(adapter)
    return sparse.adapter().digest, adapter.digest


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        (2, 1, "sparse_adamw"),
        (1, 2, "adamw"),
        pytest.param(2, 2, "adamw", marks=pytest.mark.slow),
        pytest.param(2, 4, "fused", marks=pytest.mark.slow),
    ],
)
def test_resumed_by_another_number_of_processes(before, after, optimizer, run_ranks, tmp_path):
    def some(count, *steps):
        if count == 1:
            return [train(0, str(tmp_path), *steps, optimizer, True)]
        return run_ranks(train, count, str(tmp_path), *steps, optimizer)

    some(before, 0, HALF)
    first, *others = some(after, HALF, STEPS)
    assert all(kit.same(first, other) for other in others)
    whole = {
        dtype: train(0, str(tmp_path / str(dtype)), 0, STEPS, optimizer, True, dtype)
        for dtype in (torch.float32, torch.float64)
        if (tmp_path / str(dtype)).mkdir() is None
    }
    accuracy.assert_as_accurate(flat(first), *map(flat, whole.values()))
    if before == after:  # then with the very same bits
        uninterrupted = run_ranks(train, before, str(tmp_path), 0, STEPS, optimizer)
        assert kit.same(first, uninterrupted[0])
    for got, saved in run_ranks(loaded, 2, str(tmp_path)) if after == 4 else []:
        assert got == saved, "an adapter of four processes, in two"
