"""What one of several ranks holds and exchanges, by prediction: against sums taken by hand."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from sparseft.errors import OptionError
from sparseft.profiling.communication import Communication
from sparseft.profiling.predict import predict
from sparseft.profiling.sharding import fake_ranks
from sparseft.profiling.workload import Unavailable, Way, Workload

WORK = Workload(model="decoder:3x32x100", batch=2, length=8)
LAYER = 4 * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32)
ROOT = 4 * (2 * 100 * 32 + 32)
ROTARY = 2 * 4 * 16  # the decoder's two buffers
ALL = 3 * LAYER + ROOT
DENSE, FROZEN = Way("dense"), Way("frozen")
ATTACHED = Way("attached", 0.1)


def sent(way, ranks, sharding, work=WORK):
    return predict(work, way, world_size=ranks, sharding=sharding).communication


@pytest.mark.parametrize("ranks", [2, 16])
def test_ddp_sums_up_the_gradients_of_what_trains(ranks):
    nnz = predict(WORK, ATTACHED).trainable
    assert sent(ATTACHED, ranks, "ddp") == Communication(all_reduced=4 * nnz, broadcast=ROTARY)
    assert sent(DENSE, ranks, "ddp") == Communication(all_reduced=ALL, broadcast=ROTARY)
    assert sent(FROZEN, ranks, "ddp") == Communication(), "DDP refuses it: nothing to reduce"
    half = Workload(**{**vars(WORK), "dtype": "bf16"})
    assert sent(DENSE, ranks, "ddp", half).all_reduced == ALL // 2
    assert sent(ATTACHED, ranks, "ddp", half).all_reduced == 4 * nnz, "leaves are fp32"


def test_ddp_holds_everything_and_the_gradients_twice():
    for way in (DENSE, ATTACHED):
        alone, found = predict(WORK, way), predict(WORK, way, world_size=4, sharding="ddp")
        more = {k: n - alone.use.parts()[k] for k, n in found.use.parts().items()}
        assert more.pop("gradients") == found.communication.all_reduced
        assert not any(more.values())
    assert predict(WORK, DENSE, world_size=1, sharding="ddp") == predict(WORK, DENSE)


def test_fsdp_gathers_layers_twice_and_the_root_once():
    """A layer is freed after its forward pass; the root, first on the way back, is not."""
    assert sent(FROZEN, 2, "fsdp") == Communication(all_gathered=2 * 3 * LAYER + ROOT)
    assert sent(DENSE, 2, "fsdp") == Communication(
        all_gathered=2 * 3 * LAYER + ROOT, reduce_scattered=ALL
    )


@pytest.mark.parametrize("ranks", [2, 8])
def test_fsdp_cuts_weights_and_what_dense_training_keeps(ranks):
    alone, found = predict(WORK, DENSE), predict(WORK, DENSE, world_size=ranks)
    # Rows are dealt out whole, so nothing is left over here.
    assert found.use.weights == pytest.approx(alone.use.weights / ranks, rel=0.01, abs=256)
    assert found.use.optimizer == pytest.approx(alone.use.optimizer / ranks, rel=0.01, abs=1024)
    assert "cut by rows" in found.assumed[-1]


def test_fsdp_leaves_what_masks_hold_on_every_rank():
    alone, found = predict(WORK, ATTACHED), predict(WORK, ATTACHED, world_size=4)
    tensors = 3 * 7 + 2
    nnz = alone.trainable
    # One number a tensor says whether any rank had a gradient.
    assert found.communication == Communication(
        all_reduced=4 * nnz + 4 * tensors, all_gathered=2 * 3 * LAYER + ROOT
    )
    assert found.use.weights == pytest.approx(alone.use.weights / 4, rel=0.01, abs=256)
    assert found.use.optimizer == alone.use.optimizer
    # Positions in the own rows, a quarter of the entries each.
    assert found.use.diff - alone.use.diff == pytest.approx(nnz, abs=8 * tensors)
    assert "on every rank" in found.assumed[-1]


def test_low_rank_adapters_are_cut_as_any_weight():
    way = Way("lora", 0.1)
    found = predict(WORK, way, world_size=2)
    assert found.communication.all_reduced == 0
    # Their few rows do not divide evenly: the last ranks send zeros along.
    nothing_odd = found.communication.reduce_scattered - 4 * found.trainable
    assert 0 <= nothing_odd < 0.1 * 4 * found.trainable
    both = predict(WORK, way, world_size=2, sharding="ddp")
    assert both.communication.all_reduced == 4 * both.trainable


@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
def test_a_quantised_base_is_gathered_in_its_codes(sharding):
    work = Workload(model="decoder:2x128x500", batch=2, length=32, dtype="bf16", base="4bit")
    found = predict(work, ATTACHED, world_size=2, sharding=sharding)
    nnz, codes = found.trainable, 2 * (4 * 128 * 128 + 3 * 128 * 352) // 2
    norms, root = 2 * 2 * 128 * 2, 2 * (2 * 500 * 128 + 128)
    gathered = 2 * (codes + norms) + root if sharding == "fsdp" else 0
    assert found.communication.all_gathered == gathered
    flags = 4 * (2 * 7 + 2) if sharding == "fsdp" else 0
    assert found.communication.all_reduced == 4 * nnz + flags
    with pytest.raises(Unavailable, match="attached, lora and frozen"):
        predict(work, DENSE, world_size=2, sharding=sharding)


def test_processes_that_are_not_there_leave_nothing_behind():
    with fake_ranks(4) as mesh:
        assert mesh.size() == dist.get_world_size() == 4
        with pytest.raises(OptionError, match="torch.distributed is initialised in this process"):
            predict(WORK, Way("frozen"), world_size=3)
    assert not dist.is_initialized()
    assert torch.UntypedStorage.resize_.__name__ == "resize_"


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
@pytest.mark.parametrize("base", ["", "4bit"])
@pytest.mark.parametrize(("model", "billions"), [("7b", 6.74), ("13b", 13.02), ("30b", 32.53)])
def test_large_models_in_seconds(model, billions, base, sharding):
    work = Workload(model=model, dtype="bf16", base=base, batch=1, length=512, checkpointing=True)
    begun = time.process_time()
    alone, found = (predict(work, Way("attached", 0.01), "cuda", n, sharding) for n in (1, 8))
    assert time.process_time() - begun < 60
    whole = 2e9 * billions
    if not base:
        assert alone.use.weights == pytest.approx(whole, rel=0.01)
    sharded = sharding == "fsdp"
    assert found.use.weights < alone.use.weights / (4 if base else 7.9) or not sharded
    assert found.communication.all_reduced == pytest.approx(4 * found.trainable, rel=1e-4)
    assert found.communication.all_reduced < 0.03 * whole
    assert found.use.optimizer == alone.use.optimizer
