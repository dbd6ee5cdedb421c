"""What the examples train, none of it sparse: a classifier of sentences.

By default a random model of 45,000 parameters and sentences made here, without any network;
``--model NAME --data FILE`` (lines of text, a tab, a label) takes real ones.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

THINGS = ["book", "film", "meal", "song", "trip", "hotel"]
WORDS = {"good": ["fine", "great", "lovely", "superb"], "bad": ["awful", "dull", "poor", "sad"]}


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--model", help="a checkpoint's name or folder (default: a tiny random one)"
    )
    parser.add_argument("--data", type=Path, help="a file of text<TAB>label lines")
    parser.add_argument("--out", type=Path, default=Path("sparse-run"))
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=3e-2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--stop-after", type=int, help="end after so many steps, as a crash would")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser


def load(args: argparse.Namespace) -> tuple[nn.Module, list, list, Any]:
    """Return the base (the same bits at each call), rows to train and to test on, a collate."""
    pairs = read(args.data) if args.data else made_up()
    names = sorted({label for _, label in pairs})
    torch.manual_seed(0)  # the new head, and all of a random model
    if args.model:
        auto = transformers.AutoModelForSequenceClassification
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        model = auto.from_pretrained(args.model, num_labels=len(names))
    else:
        tokenizer = word_tokenizer(" ".join(text for text, _ in pairs).split())
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=64, num_labels=len(names),
            initializer_range=0.1,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    rows = [
        {**tokenizer(text, truncation=True, max_length=64), "labels": names.index(label)}
        for text, label in pairs
    ]
    cut = len(rows) * 3 // 4
    return model, rows[:cut], rows[cut:], transformers.DataCollatorWithPadding(tokenizer)


def read(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row[0], row[1]) for row in csv.reader(file, delimiter="\t")]


def made_up() -> list[tuple[str, str]]:
    starts = ["the", "that", "i think the", "they say the"]
    pairs = [
        (f"{start} {thing} was {word}", label)
        for start, thing in itertools.product(starts, THINGS)
        for label, words in WORDS.items()
        for word in words
    ]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    return [pairs[i] for i in order.tolist()]


def word_tokenizer(words: list[str]) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["[PAD]", "[UNK]", *dict.fromkeys(words)]
    model = models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )


class StopAfter(transformers.TrainerCallback):
    """Ends a Trainer's run where a crash could have."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise SystemExit(f"stopped after step {self.step}; --resume goes on")


@torch.no_grad()
def accuracy(model: nn.Module, rows: list, collate: Any) -> float:
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for batch in DataLoader(rows, batch_size=32, collate_fn=collate):
        logits = model(**batch.to(device)).logits
        right += int((logits.argmax(-1).cpu() == batch["labels"].cpu()).sum())
    return right / len(rows)
