"""Trained as PEFT's users train: Trainer, a plain loop, low precision, several processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.18,<0.22'")

import sparseft  # noqa: E402
from sparseft.peft import SparseFtConfig, SparseFtLayer, adapter_of  # noqa: E402


def steps(model, batch, count=4, **options):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        loss = model(**batch, **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def language_model(tools, **options):
    made = tools.tiny("llama")
    config = SparseFtConfig(target_modules=["q_proj", "down_proj"], density=0.2, **options)
    batch = {**made.batch, "labels": made.batch["input_ids"]}
    return peft.get_peft_model(made.model, config).train(), batch


def test_a_plain_loop_learns_and_leaves_the_base(tools):
    model, batch = language_model(tools)
    base = {n: p.clone() for n, p in model.named_parameters() if "sparseft" not in n}
    losses = steps(model, batch, 8)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.005
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


def test_steps_are_those_of_attach(tools):
    """The same masks, loss and optimizer give what sparseft's own training gives, to rounding."""
    model, batch = language_model(tools)
    masks = {n: d.pattern for n, d in adapter_of(model).items()}
    plain = tools.tiny("llama").model.train()
    sparse = sparseft.attach(plain, masks)
    torch.testing.assert_close(steps(model, batch), steps(plain, batch), rtol=1e-5, atol=1e-5)
    got, wanted = adapter_of(model), sparse.adapter("x")
    for name in wanted:
        torch.testing.assert_close(got[name].values, wanted[name].values, rtol=2e-3, atol=2e-5)


def test_values_stay_fp32_on_a_bf16_base(tools, tmp_path):
    made = tools.tiny("llama")
    config = SparseFtConfig(target_modules=["q_proj"], density=0.2)
    model = peft.get_peft_model(made.model.bfloat16(), config)
    tools.scramble(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(**made.batch, labels=made.batch["input_ids"])
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    wanted = adapter_of(model)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        base = tools.tiny("llama").model.bfloat16()
        loaded = peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
        assert adapter_of(loaded).equals(wanted), low


def test_autocast(tools):
    model, batch = language_model(tools)
    tools.scramble(model)
    plain = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**batch).loss
    low.backward()
    assert abs(plain.item() - low.item()) < 0.05
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tools, reentrant):
    model, batch = language_model(tools)
    tools.scramble(model)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    twin.enable_input_require_grads()
    for one in (model, twin):
        one(**batch).loss.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def _trainer(model, folder, steps=4, **options):
    from transformers import Trainer, TrainingArguments

    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(4, 60, (8, 6), generator=torch.Generator().manual_seed(3))
    ]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=2,
        report_to=[], use_cpu=True, learning_rate=1e-2, seed=1, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, **options)


@pytest.mark.slow
def test_trainer_checkpoints_and_resumes(tools, tmp_path):
    model, _ = language_model(tools)
    _trainer(model, tmp_path / "whole").train()
    wanted = adapter_of(model)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    assert sparseft.Adapter.load(checkpoint).names == wanted.names
    again, _ = language_model(tools)
    _trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert adapter_of(again).equals(wanted)


@pytest.mark.slow
def test_compiled(tools):
    model, batch = language_model(tools)
    tools.scramble(model)
    wanted = model(**batch).loss
    wanted.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled = torch.compile(model)
    got = compiled(**batch).loss
    got.backward()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-5)


def _two_linears():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4))


def _train_rank(rank, world):
    model = peft.get_peft_model(_two_linears(), SparseFtConfig(nnz=30))
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    trained = model if world == 1 else DistributedDataParallel(model)
    sent = []
    if world > 1:

        def count(state, bucket):
            sent.append(bucket.buffer().numel() * 4)
            future = torch.distributed.all_reduce(
                bucket.buffer().div_(world), async_op=True
            ).get_future()
            return future.then(lambda f: f.value()[0])

        trained.register_comm_hook(None, count)
        assert {n.rpartition(".")[2] for n in trained.parameters_to_ignore} == {"default"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    mine = x if world == 1 else x[rank * 4 : rank * 4 + 4]
    for _ in range(3):
        trained(mine).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    own = adapter_of(model)
    return {n: (d.indices, d.values) for n, d in own.items()}, sent


@pytest.mark.slow
def test_two_ranks_equal_one_and_send_four_bytes_an_entry(run_ranks):
    alone, _ = _train_rank(0, 1)
    results = run_ranks(_train_rank, 2, 2)
    for held, sent in results:
        assert sent == [4 * 30] * 3
        for name, (indices, values) in alone.items():
            assert torch.equal(held[name][0], indices)
            torch.testing.assert_close(held[name][1], values, rtol=1e-4, atol=1e-6)


def test_transformers_own_add_adapter_and_load_adapter(tools, tmp_path):
    made = tools.tiny("llama")
    model = made.model
    model.add_adapter(SparseFtConfig(target_modules=["q_proj"], density=0.2), "mine")
    assert any(isinstance(m, SparseFtLayer) for m in model.modules())
    tools.scramble(model)
    wanted = tools.logits(model, made.batch)
    model.disable_adapters()
    base = tools.logits(tools.tiny("llama").model, made.batch)
    assert torch.equal(tools.logits(model, made.batch), base)
    model.enable_adapters()
    assert torch.equal(tools.logits(model, made.batch), wanted)
    model.save_pretrained(tmp_path)
    assert sparseft.Adapter.load(tmp_path).equals(adapter_of(model, "mine"))
    other = tools.tiny("llama").model
    other.load_adapter(str(tmp_path), "theirs")
    assert torch.equal(tools.logits(other, made.batch), wanted)
    # And as a PeftModel.
    loaded = peft.PeftModel.from_pretrained(tools.tiny("llama").model, tmp_path)
    assert torch.equal(tools.logits(loaded, made.batch), wanted)


def test_auto_classes_and_task_heads(tools, tmp_path):
    made = tools.tiny("bert")
    made.model.save_pretrained(tmp_path / "base")
    made.model.name_or_path = str(tmp_path / "base")
    config = SparseFtConfig(target_modules=["query"], density=0.2, task_type="SEQ_CLS")
    model = peft.get_peft_model(made.model, config)
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    tools.scramble(model)
    wanted = tools.logits(model, made.batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=3
    )
    assert torch.equal(tools.logits(loaded.eval(), made.batch), wanted)


def _train_sharded(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = peft.get_peft_model(_two_linears(), SparseFtConfig(nnz=30))
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.modules():
        if isinstance(layer, SparseFtLayer):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    try:
        model.merge_adapter()
        said = ""
    except sparseft.SparseFtError as bad:
        said = str(bad)
    own = adapter_of(model)
    return {n: (d.indices, d.values) for n, d in own.items()}, said


@pytest.mark.slow
def test_two_ranks_of_fully_shard_equal_one(run_ranks):
    alone, _ = _train_rank(0, 1)
    for held, said in run_ranks(_train_sharded, 2, 2):
        assert "cut into shards by fully_shard" in said
        for name, (indices, values) in alone.items():
            assert torch.equal(held[name][0], indices)
            torch.testing.assert_close(held[name][1], values, rtol=1e-4, atol=1e-6)
