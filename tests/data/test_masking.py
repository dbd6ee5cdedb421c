"""The mask of a batch is a function of the batch and the seed: what exact resumption rests on."""

from __future__ import annotations

import pickle

import pytest
import torch

from sparseft.data import MaskedLMCollator, load_mlm_texts
from sparseft.errors import DataError


@pytest.fixture
def examples(tokenizer):
    lines = ["ba be bi bo bu ca ce ci", "da de", "fa fe fi fo fu ga"]
    return [dict(tokenizer(line)) for line in lines]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_same_batch_same_masks_whatever_came_before(tokenizer, examples):
    one, other = MaskedLMCollator(tokenizer, seed=3), MaskedLMCollator(tokenizer, seed=3)
    torch.manual_seed(0)
    first = one(examples)
    other(examples[::-1])  # another history, another global state
    torch.rand(7)
    assert same(first, other(examples))
    assert same(first, pickle.loads(pickle.dumps(one))(examples)), "workers get a pickled copy"
    assert not same(first, MaskedLMCollator(tokenizer, seed=4)(examples))


def test_global_generator_is_left_alone(tokenizer, examples):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    MaskedLMCollator(tokenizer)(examples)
    assert torch.equal(before, torch.get_rng_state())


def test_order_of_the_batch_changes_the_masks(tokenizer, examples):
    collate = MaskedLMCollator(tokenizer, seed=0, mask_rate=0.5)
    a, b = collate(examples), collate(examples[::-1])
    assert not torch.equal(a["labels"], b["labels"].flip(0))


def test_columns_a_trainer_strips_do_not_matter(tokenizer, examples):
    collate = MaskedLMCollator(tokenizer, seed=0)
    extra = [{**e, "special_tokens_mask": [0] * len(e["input_ids"]), "labels": 1} for e in examples]
    assert same(collate(examples), collate(extra))


def test_special_tokens_and_padding_are_never_predicted(tokenizer, examples):
    batch = MaskedLMCollator(tokenizer, mask_rate=1.0)(examples)
    ordinary = torch.tensor([[8, 2, 6]]).T
    assert torch.equal((batch["labels"] != -100).sum(1, keepdim=True), ordinary)
    assert batch["input_ids"].shape == (3, 10)
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([10, 4, 8]))


def test_unknown_words_are_text(tokenizer):
    batch = MaskedLMCollator(tokenizer, mask_rate=1.0)([dict(tokenizer("unheard of"))])
    assert (batch["labels"] == tokenizer.unk_token_id).sum() == 2


def test_rates_are_those_asked_for(tokenizer):
    ids = tokenizer(" ".join(["ba be bi bo bu"] * 10))["input_ids"]
    collate = MaskedLMCollator(tokenizer, mask_rate=0.3)
    masked = replaced = total = 0
    for i in range(200):
        batch = collate([{"input_ids": [*ids[:-2], 5 + i % 100, ids[-1]]}] * 8)
        chosen = batch["labels"] != -100
        masked += int(chosen.sum())
        replaced += int((batch["input_ids"][chosen] == tokenizer.mask_token_id).sum())
        total += 8 * (len(ids) - 2)
    # 78,400 tokens: three standard deviations are 0.005 and 0.008
    assert abs(masked / total - 0.3) < 0.005
    assert abs(replaced / masked - 0.8) < 0.008


def test_a_batch_always_predicts_something(tokenizer):
    collate = MaskedLMCollator(tokenizer, mask_rate=0.02)
    for word in ("ba", "be", "bi", "bo", "bu"):
        assert (collate([dict(tokenizer(word))])["labels"] != -100).any()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5])
def test_rate_outside_its_range(tokenizer, rate):
    with pytest.raises(DataError, match=r"mask_rate must be in \(0, 1\]"):
        MaskedLMCollator(tokenizer, mask_rate=rate)


def test_tokenizer_without_a_mask_token(tiny):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(DataError, match="no mask token"):
        MaskedLMCollator(tokenizer)


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_resumed_in_the_second_epoch_sees_the_same_batches(
    tiny, tokenizer, tmp_path, workers
):
    """Steps 6 and 7 of an uninterrupted run, against a run resumed from its checkpoint at 5."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import set_seed

    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(tiny.WORDS[i : i + 6]) for i in range(16)))
    dataset, collate = load_mlm_texts(text, tokenizer, 16, mode="lines", mask_rate=0.3)

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen = []

        def forward(self, input_ids=None, attention_mask=None, labels=None):
            self.seen.append((input_ids.clone(), labels.clone()))
            return {
                "loss": self.weight.square().sum() + torch.dropout(self.weight, 0.5, True).sum()
            }

    def run(resume):
        set_seed(0)
        model = Recorder()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / f"run{workers}"),
            max_steps=7,
            per_device_train_batch_size=4,
            save_steps=5,
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=workers,
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=dataset)
        trainer.train(resume_from_checkpoint=resume)
        return model.seen

    whole = run(None)
    assert len(whole) == 7
    resumed = run(str(tmp_path / f"run{workers}" / "checkpoint-5"))
    assert len(resumed) == 2
    for (ids, labels), (ids2, labels2) in zip(whole[5:], resumed, strict=True):
        assert torch.equal(ids, ids2)
        assert torch.equal(labels, labels2)
    # 16 lines in batches of 4: step 5 starts the second epoch, with masks of its own
    first = {tuple(row.tolist()) for _, labels in whole[:4] for row in labels}
    second = {tuple(row.tolist()) for _, labels in whole[4:] for row in labels}
    assert len(second - first) > len(second) // 2
