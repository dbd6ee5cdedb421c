"""Four accumulated micro-batches give the gradient of one batch of all their rows, to rounding.

Losses are means over tokens, of which rows have different numbers, so a mean of means (or a sum)
is another gradient; each loop averages in its own way. Steps are SGD's: AdamW would hide a scale.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sparseft import SparseSGD, attach, select
from sparseft.modules import ParameterIndex

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ROWS, SPLIT, STEPS, VOCAB, IGNORED = 24, 4, 3, 40, -100
WHOLE = ROWS // STEPS
# Relative to a tensor's norm. fp32 sums in another order are some 1e-7 apart; a mean of means is
# 1e-2 and more away (`test_what_the_tolerance_notices`).
TOLERANCE = 1e-5


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCAB, (ROWS, 12), generator=generator)
    labels = ids.clone()
    for i in range(ROWS):
        labels[i, : (5 * i) % 11] = IGNORED  # from 11 labelled tokens to one
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def collate(batch):
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


def build(kind="causal"):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 16,
    }  # fmt: skip
    if kind == "causal":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=1)
        model, full = transformers.LlamaForCausalLM(config), ["*norm*"]
    else:
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**sizes, **off, num_labels=3)
        model, full = transformers.BertForSequenceClassification(config), ["classifier.*"]
    # Keys' biases have no gradient but rounding noise.
    away = full if kind == "causal" else [*full, "*key.bias"]
    masks = select(model, "random", density=0.2, exclude=away)
    sparse = attach(model, masks, full_params=full)
    optimizer = SparseSGD(sparse.parameters(), lr=0.3, momentum=0.9)
    return SimpleNamespace(model=model, sparse=sparse, optimizer=optimizer, first=None)


def look(run):
    """Keep the gradients of the first step."""
    if run.first is None:
        run.first = {n: p.grad.clone() for n, p in run.sparse.named_parameters()}


def left_by(run):
    diffs = {n: p.detach() for n, p in run.sparse.leaves.items()}
    return run.first | {f"diff of {n}": diff for n, diff in diffs.items()}


def summed(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def tokens(batches):
    return sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)


def plain(split, *, mean_of_means=False):
    run = build()
    batches = list(DataLoader(rows(), WHOLE // split, collate_fn=collate))
    for start in range(0, len(batches), split):
        group = batches[start : start + split]
        for batch in group:
            count = split * tokens([batch]) if mean_of_means else tokens(group)
            (summed(run.model, batch) / count).backward()
        look(run)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return left_by(run)


def accelerated(split):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    run = build()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=split)
    loader = DataLoader(rows(), WHOLE // split, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(run.model, run.optimizer, loader)
    batches = list(loader)
    for start in range(0, len(batches), split):
        group = batches[start : start + split]
        for batch in group:
            with accelerator.accumulate(model):
                # accelerate divides by the number of micro-batches, which the tokens have been by.
                accelerator.backward(summed(model, batch) / tokens(group) * split)
                if accelerator.sync_gradients:
                    look(run)
                optimizer.step()
                optimizer.zero_grad()
    return left_by(run)


def trained(split, tmp_path, run, data, **changes):
    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            look(run)

    constant = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, save_strategy="no", report_to=[],
        per_device_train_batch_size=WHOLE // split, gradient_accumulation_steps=split,
        max_grad_norm=0.0, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **changes,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=run.model, args=args, train_dataset=data, data_collator=collate,
        optimizers=(run.optimizer, constant), callbacks=[Look()],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == STEPS
    return left_by(run)


def apart(found, wanted):
    """Return the largest distance, relative to the norm of what is wanted."""
    assert found.keys() == wanted.keys()
    assert all(bool(w.norm() > 0) for w in wanted.values())
    return max(float((found[n] - w).norm() / w.norm()) for n, w in wanted.items())


def test_what_the_tolerance_notices():
    wanted = plain(1)
    assert apart(plain(SPLIT, mean_of_means=True), wanted) > 1000 * TOLERANCE
    doubled = {n: g * 2 for n, g in wanted.items()}
    assert apart(doubled, wanted) > 1000 * TOLERANCE


@pytest.mark.parametrize("loop", [plain, accelerated])
def test_four_micro_batches_are_one_batch(loop):
    assert apart(loop(SPLIT), plain(1)) < TOLERANCE


def test_four_micro_batches_of_a_trainer_are_one_batch(tmp_path):
    """Of a causal model, whose loss takes the Trainer's num_items_in_batch."""
    whole = trained(1, tmp_path, build(), rows())
    assert apart(trained(SPLIT, tmp_path, build(), rows()), whole) < TOLERANCE


def classes():
    return [{**row, "labels": row["input_ids"][0] % 3} for row in rows()]


def test_a_classifier_whose_loss_is_a_mean(tmp_path):
    """transformers 5 hands it num_items_in_batch, which it ignores, unless the model says so."""

    def with_split(split):
        run = build("classifier")
        run.model.accepts_loss_kwargs = False
        return trained(split, tmp_path, run, classes())

    assert apart(with_split(SPLIT), with_split(1)) < TOLERANCE


@pytest.mark.parametrize("kind", [pytest.param("causal", marks=pytest.mark.slow), "classifier"])
def test_a_trainer_scales_as_for_the_stock_model(kind, tmp_path):
    """Whatever it makes of a model's loss: gradients are the dense ones at the mask."""
    run = build(kind)
    data = rows() if kind == "causal" else classes()
    trained(SPLIT, tmp_path, run, data)
    stock = build(kind).sparse.detach()
    dense = SimpleNamespace(model=stock, first=None)
    dense.sparse = SimpleNamespace(named_parameters=stock.named_parameters, leaves={})
    dense.optimizer = torch.optim.SGD(stock.parameters(), lr=0.1)
    trained(SPLIT, tmp_path, dense, data)
    index = ParameterIndex(run.model)
    assert len(index.names) > len(run.sparse.leaves) > 5
    for name, pattern in run.sparse.patterns.items():
        head, _, attr = name.rpartition(".")
        wanted = dense.first[name].flatten()[pattern.indices.long()]
        error = run.first[f"{head}.diff_{attr}"] - wanted
        assert error.norm() <= TOLERANCE * wanted.norm(), name
