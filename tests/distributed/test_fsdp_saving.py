"""Adapters of a sharded model: the bytes of one process's, for any number of processes."""

from __future__ import annotations

import importlib.util
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparseft
from sparseft import Adapter
from sparseft.errors import BaseMismatchError, MaskError
from sparseft.modules.fingerprint import fingerprint_model

_spec = importlib.util.spec_from_file_location("_fsdp", Path(__file__).parent / "_fsdp.py")
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)


def attached(*, sharded, dtype=torch.float32):
    model = kit.net(dtype)
    if sharded:
        kit.shard(model)
    return sparseft.attach(model, kit.masks(kit.net()), full_params=["head.*"])


def set_values(sparse):
    """The same values for whoever calls: no training, so no rounding of sums."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for leaf in sparse.leaves.values():
            leaf.copy_(torch.randn(leaf.shape, generator=generator) / 10)
        for name, parameter in sparse.full_params.items():
            shape = tuple(parameter.shape)
            from sparseft.modules.adapter_values import copy_whole_

            copy_whole_(parameter, torch.randn(shape, generator=generator))
            assert name.startswith("head.")
    sparse.sync_()


def entries(model):
    return {n: t for n, t in kit.whole(model).items() if "diff_" not in n}


def saves(rank, folder, dtype):
    """Train-free values, an evaluation that leaves whole weights about, and the adapter of it."""
    sparse = attached(sharded=True, dtype=dtype)
    set_values(sparse)
    gathered = []
    plain = torch.distributed.tensor.DTensor.full_tensor

    def counted(tensor, **options):
        gathered.append(tensor.numel())
        return plain(tensor, **options)

    with torch.no_grad():
        sparse.model(kit.batches(1)[0][0])
    torch.distributed.tensor.DTensor.full_tensor = counted
    try:
        adapter = sparse.adapter("one", base_name="net")
    finally:
        torch.distributed.tensor.DTensor.full_tensor = plain
    if rank == 0:
        adapter.save(folder)
    fingerprint = fingerprint_model(sparse.model, sparse.names)
    sparse.detach(restore=True)
    restored = entries(sparse.model)
    return adapter.digest, len(gathered), fingerprint == adapter.metadata.fingerprint, restored


def loads(rank, folder, dtype):
    """Into a sharded model: attached from it, loaded into other values, and put back after."""
    adapter = Adapter.load(folder)
    model = kit.shard(kit.net(dtype))
    started = sparseft.attach(model, adapter)
    digests = [started.adapter("one", base_name="net").digest]
    weights = entries(model)
    started.detach(restore=True)
    later = sparseft.attach(model, kit.masks(kit.net()), full_params=["head.*"])
    later.load_adapter_(adapter)
    digests.append(later.adapter("one", base_name="net").digest)
    return digests, weights, entries(model)


def one_process(folder, dtype):
    sparse = attached(sharded=False, dtype=dtype)
    set_values(sparse)
    return sparse.adapter("one", base_name="net"), entries(sparse.model)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=["fp32", "bf16"],
)
def test_adapters_cross_numbers_of_processes(run_ranks, tmp_path, dtype):
    single, weights = one_process(tmp_path, dtype)
    base = entries(kit.net(dtype))
    for digest, gathered, same, restored in run_ranks(saves, 2, str(tmp_path / "two"), dtype):
        assert digest == single.digest
        assert same, "the fingerprint is of the base, not of what was trained"
        # Masked tensors for the fingerprint, heads for their values: each once.
        assert gathered == len(single.diffs) + len(single.dense)
        assert restored.keys() == base.keys()
        assert all(torch.equal(restored[name], base[name]) for name in base)
    assert Adapter.load(tmp_path / "two").metadata.fingerprint == single.metadata.fingerprint

    worlds = [1, 4] if dtype == torch.float32 else [2]
    for world in worlds:
        for digests, started, loaded in run_ranks(loads, world, str(tmp_path / "two"), dtype):
            assert digests == [single.digest] * 2
            for found in (started, loaded):
                assert all(torch.equal(found[name], weights[name]) for name in weights)
    whole = sparseft.attach(kit.net(dtype), Adapter.load(tmp_path / "two"))
    assert whole.adapter("one", base_name="net").digest == single.digest
    assert all(torch.equal(t, weights[n]) for n, t in entries(whole.model).items())


def refuses(rank, folder):
    adapter = Adapter.load(folder)
    said = []
    other = kit.net()
    with torch.no_grad():
        other.layers[1].up.weight[-1, -1] += 1  # in the last rank's rows
    kit.shard(other)
    with pytest.raises(BaseMismatchError) as error:
        sparseft.attach(other, adapter)
    said.append(str(error.value))
    sparse = sparseft.attach(other, kit.masks(kit.net()), full_params=["head.*"])
    with pytest.raises(BaseMismatchError) as error:
        sparse.load_adapter_(adapter)
    said.append(str(error.value))
    sparse.detach()
    narrow = {name: mask for name, mask in kit.masks(kit.net(), seed=2).items() if "up" in name}
    sparse = sparseft.attach(kit.shard(kit.net()), narrow, full_params=["head.*"])
    only = {name: diff for name, diff in adapter.diffs.items() if "up.weight" in name}
    with pytest.raises(MaskError) as error:
        sparse.load_adapter_(Adapter(only, name="other masks"))
    said.append(str(error.value))
    leaves = [float(leaf.detach().abs().sum()) for leaf in sparse.leaves.values()]
    dist.barrier()
    return said, leaves


def test_another_base_and_other_masks_are_refused_on_every_process(run_ranks, tmp_path):
    single, _ = one_process(tmp_path, torch.float32)
    single.save(tmp_path / "one")
    (first, leaves), (second, _) = run_ranks(refuses, 2, str(tmp_path / "one"))
    assert first == second
    assert "'layers.1.up.weight' is not the base tensor" in first[0]
    assert first[0] == first[1]
    assert "lie outside the mask" in first[2]
    assert leaves == [0.0] * len(leaves), "nothing was loaded"


class Savable(torch.nn.Module):
    """What `save_merged` asks of a model of transformers; a slow disk."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.config, self.layer = config, torch.nn.Linear(6, 4)

    def save_pretrained(self, folder, state_dict):
        time.sleep(0.1)
        folder.mkdir()  # once
        torch.save(state_dict, folder / "model.pt")


def merges(rank, folder):
    model = Savable(types.SimpleNamespace())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    sparse = sparseft.attach(model, {"layer.weight": torch.eye(4, 6).bool()})
    sparse.leaves["layer.weight"].data.fill_(1)
    sparse.sync_()
    sparse.save_merged(folder / "merged", dtype=torch.float32)
    return torch.load(folder / "merged" / "model.pt")


def test_one_process_writes_the_merged_model_and_all_find_it(run_ranks, tmp_path):
    base = Savable(None).layer.weight.detach()
    for state in run_ranks(merges, 2, tmp_path):
        assert torch.equal(state["layer.weight"], base + torch.eye(4, 6))
