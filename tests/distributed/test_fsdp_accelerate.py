"""accelerate's FSDP2 and transformers' Trainer with masks: which order of calls trains, and which
is refused.

accelerate starts FSDP on accelerators alone, so here its state is told that it has: from there on
its code runs as it does on GPUs.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import sparseft
from sparseft.errors import AttachError


def beside(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = beside(Path(__file__).parent / "_fsdp.py")
tiny = beside(Path(__file__).parent.parent / "_tiny.py")


def as_fsdp(accelerator, plugin):
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # only looked for: there is a group already
os.environ.setdefault("MASTER_PORT", "29500")


def plugin():
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="NO_WRAP"
    )


def accelerated():
    from accelerate import Accelerator

    return as_fsdp(Accelerator(cpu=True), plugin())


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def prepared_first(accelerator, masks):
    """`prepare` wants an optimizer with the model; attach then gives that one the leaves."""
    model = kit.net()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    sparse = sparseft.attach(model, masks, full_params=["head.*"], optimizer=optimizer)
    return model, sparse, optimizer


def sharded_first(accelerator, masks):
    """Sharded and attached by hand; `prepare` leaves what is sharded as it is."""
    model = kit.shard(kit.net())
    sparse = sparseft.attach(model, masks, full_params=["head.*"])
    model, optimizer = accelerator.prepare(model, adamw(sparse.parameters()))
    return model, sparse, optimizer


def trains(rank, folder):
    masks, found = kit.masks(kit.net(), 0.1), []
    plain = kit.shard(kit.net())
    by_hand = sparseft.attach(plain, masks, full_params=["head.*"])
    optimizer = adamw(by_hand.parameters())
    data = [kit.own_part(batch, rank, 2) for batch in kit.batches(3)]

    def run(model, sparse, optimizer, backward, clip, data=data):
        for batch in data:
            backward(kit.loss_of(model, batch))
            clip(sparse.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        adapter = sparse.adapter("x")
        return adapter.digest, torch.cat([diff.values for diff in adapter.diffs.values()])

    def clip(parameters, norm):
        by_hand.clip_grad_norm_(norm)

    found.append(run(plain, by_hand, optimizer, torch.Tensor.backward, clip))
    for order in (prepared_first, sharded_first):
        accelerator = accelerated()
        model, sparse, optimizer = order(accelerator, masks)
        steps = (accelerator.backward, accelerator.clip_grad_norm_)
        run(model, sparse, optimizer, *steps, data=data[:2])
        accelerator.save_state(f"{folder}/{order.__name__}")
        found.append(run(model, sparse, optimizer, *steps, data=data[2:]))
        accelerator.load_state(f"{folder}/{order.__name__}")
        found.append(run(model, sparse, optimizer, *steps, data=data[2:]))
        accelerator.free_memory()
    model = kit.net()
    sparse = sparseft.attach(model, masks, full_params=["head.*"], group=False)
    with pytest.raises(AttachError, match="accelerator.prepare") as error:
        accelerated().prepare(model, adamw(sparse.parameters()))
    return found, str(error.value)


@pytest.mark.slow
def test_prepare_then_attach_trains_as_a_loop_by_hand(run_ranks, tmp_path):
    (first, said), (second, _) = run_ranks(trains, 2, str(tmp_path))
    (_, by_hand), *accelerated = first
    assert len(accelerated) == 4
    assert len({digest for digest, _ in (*accelerated, *second[1:])}) == 1
    for _, values in accelerated:  # accelerate sums the norm to clip by in another order
        torch.testing.assert_close(values, by_hand)
    assert "cannot shard" in said


def trainer(rank, folder):
    """transformers' Trainer on a model that was sharded and attached before it."""
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = transformers.XLMRobertaForSequenceClassification(tiny.tiny_config(num_labels=2))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.roberta.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    masks = sparseft.select(model, "random", density=0.1, exclude=["classifier.*"])
    sparse = sparseft.attach(model, masks, full_params=["classifier.*"])
    before = [leaf.detach().clone() for leaf in sparse.leaves.values()]
    rows = [{"input_ids": [0, 7 + i % 40, 2], "labels": i % 2} for i in range(16)]
    args = transformers.TrainingArguments(
        output_dir=folder, use_cpu=True, max_steps=3, per_device_train_batch_size=4,
        report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2, seed=1,
    )  # fmt: skip
    one = transformers.Trainer(model, args, train_dataset=rows)
    as_fsdp(one.accelerator, plugin())
    one.is_fsdp_enabled = True
    one.train()
    moved = [not torch.equal(a, b) for a, b in zip(before, sparse.leaves.values(), strict=True)]
    adapter = sparse.adapter("trained")
    sparse.detach()
    return adapter.digest, all(moved), sorted({type(p).__name__ for p in model.parameters()})


@pytest.mark.slow
def test_the_trainer_takes_a_model_that_is_sharded_and_attached(run_ranks, tmp_path):
    (one, moved, kinds), (two, *_) = run_ranks(trainer, 2, str(tmp_path))
    assert one == two
    assert moved
    assert kinds == ["DTensor"], "nothing wrapped it again"
