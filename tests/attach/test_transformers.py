"""Stock transformers: tied models, Trainer with its defaults, checkpointing, saving."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseft import attach
from sparseft.modules import ParameterIndex

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def bert(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return transformers.BertForMaskedLM(transformers.BertConfig(**{**sizes, **changes}))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"bert": bert, "gpt2": gpt2, "t5": t5}


def ids(rows=3, length=9, seed=1):
    return torch.randint(4, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    return model(input_ids=x, labels=x).loss


def layers_only(model, kit):
    """Masks on the layers' matrices: nothing trainable precedes the first block."""
    return {n: m for n, m in kit.masks(model).items() if ".layer." in n and m.ndim == 2}


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_the_dense_ones_at_the_mask(kind, kit):
    stock, model = MODELS[kind](), MODELS[kind]()
    masks = kit.masks(stock)
    loss_of(stock, ids()).backward()
    sparse = attach(model, masks)
    loss_of(model, ids()).backward()
    index = ParameterIndex(stock)
    for name, leaf in sparse.leaves.items():
        dense = index.get(name).grad
        assert (leaf.grad is None) == (dense is None), name
        if dense is None:
            continue
        expected = dense[masks[name]] if name in masks else None
        assert expected is not None, f"{name} is not the name masks use"
        # Keys' biases have a gradient of rounding noise only, hence the floor.
        error = (leaf.grad - expected).norm()
        assert error <= 2e-5 * expected.norm() + 1e-8, name


@pytest.mark.parametrize("kind", MODELS)
def test_save_pretrained_of_an_attached_tied_model(kind, kit, tmp_path):
    model = MODELS[kind]()
    sparse = attach(model, kit.masks(model))
    with torch.no_grad():
        for leaf in sparse.leaves.values():
            leaf.normal_(std=0.1)
    sparse.sync_()
    model.eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loss_of(model, ids()), loss_of(again, ids()))
    names = ParameterIndex(model).names
    assert ParameterIndex(again).names == names
    index, other = ParameterIndex(model), ParameterIndex(again)
    assert all(torch.equal(index.get(n), other.get(n)) for n in names)
    model.tie_weights()
    assert kit.agrees(sparse)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing(reentrant, kit):
    plain, model = bert(), bert()
    masks = layers_only(model, kit)
    expected = attach(plain, masks)
    loss_of(plain.train(), ids()).backward()
    sparse = attach(model, masks)
    # Turned on after attach, as Trainer does.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    loss_of(model.train(), ids()).backward()
    for name, leaf in sparse.leaves.items():
        assert leaf.grad is not None, name
        assert torch.equal(leaf.grad, expected.leaves[name].grad), name
    hooks = model.get_input_embeddings()._forward_hooks
    before = len(hooks)
    sparse.detach()
    assert len(hooks) == before - 1


class Blocks(nn.Module):
    """A hand-written model with reentrant checkpointing around its blocks."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        h = self.emb(x)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=True)
        return h


def test_reentrant_checkpointing_in_any_model(kit):
    torch.manual_seed(0)
    model = Blocks()
    masks = {n: m for n, m in kit.masks(model).items() if n.startswith("blocks")}
    sparse = attach(model, masks, input_grads=True)
    model(ids()).pow(2).sum().backward()
    got = {n: leaf.grad for n, leaf in sparse.leaves.items()}
    plain = attach(reference := copy.deepcopy(sparse.detach()), masks)
    h = reference.emb(ids())
    for block in reference.blocks:
        h = block(h)
    h.pow(2).sum().backward()
    assert all(torch.allclose(got[n], leaf.grad) for n, leaf in plain.leaves.items())


def trainer(model, folder, steps=4, **changes):
    rows = [{"input_ids": x, "labels": x} for x in ids(rows=24)]
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **changes,
    )
    return transformers.Trainer(model=model, args=args, train_dataset=rows)


def test_stock_trainer_with_its_defaults(kit, tmp_path):
    model = bert()
    base = kit.snapshot(model)
    masks = kit.masks(model)
    sparse = attach(model, masks)
    run = trainer(model, tmp_path, weight_decay=0.1, gradient_accumulation_steps=2)
    assert run.args.optim in ("adamw_torch", "adamw_torch_fused")
    run.train()
    assert kit.agrees(sparse)
    index = ParameterIndex(model)
    for name, mask in masks.items():
        now = index.get(name)
        assert torch.equal(now[~mask], base[name][~mask]), name
        if "position" not in name and "token_type" not in name:
            assert not torch.equal(now[mask], base[name][mask]), name
    sparse.detach()
    assert all(torch.equal(t, base[n]) for n, t in kit.snapshot(model).items())


@pytest.mark.parametrize("compact", [False, True], ids=["complete", "compact"])
def test_trainer_resumes_bit_for_bit(compact, kit, tmp_path):
    straight = bert()
    options = {"full_params": ["cls.predictions.bias"], "compact_state_dict": compact}
    masks = {n: m for n, m in kit.masks(straight).items() if n != "cls.predictions.bias"}
    one = attach(straight, masks, **options)
    trainer(straight, tmp_path / "one").train()

    resumed = bert()
    two = attach(resumed, masks, **options)
    trainer(resumed, tmp_path / "two").train(
        resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2")
    )
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.adapter().digest == two.adapter().digest
    size = (tmp_path / "one" / "checkpoint-4" / "model.safetensors").stat().st_size
    whole = sum(p.numel() * 4 for p in bert().parameters())
    assert (size < whole) == compact


def test_trainer_with_checkpointing_clipping_and_bf16(kit, tmp_path):
    model = bert()
    base = kit.snapshot(model)
    masks = layers_only(model, kit)
    sparse = attach(model, masks)
    trainer(model, tmp_path, gradient_checkpointing=True, max_grad_norm=0.1, bf16=True).train()
    assert kit.agrees(sparse)
    for name, mask in masks.items():
        now = ParameterIndex(model).get(name)
        assert torch.equal(now[~mask], base[name][~mask]), name
        assert not torch.equal(now[mask], base[name][mask]), name


def test_accelerate_loop(kit):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = bert()
    sparse = attach(model, kit.masks(model))
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = {n: p.detach().clone() for n, p in sparse.leaves.items()}
    for step in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, ids(seed=step)))
            optimizer.step()
            optimizer.zero_grad()
    assert kit.agrees(sparse)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(sparse.leaves[name], before[name])
