"""A two-layer BERT of width 32, data for it, comparisons of bits; also for subprocesses."""

from __future__ import annotations

import torch
from torch import nn

VOCAB, LABELS = 64, 3


class Rows(torch.utils.data.Dataset):
    """Sentences of random ids whose label is a function of their first token."""

    def __init__(self, n: int = 48, length: int = 8, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(5, VOCAB, (n, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = self.ids[i]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids[0] % LABELS,
        }


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def tiny_config(**options):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=LABELS,
        **options,
    )


def tiny_classifier(seed: int = 0, **options) -> nn.Module:
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(tiny_config(**options))


def tiny_masked_lm(seed: int = 0) -> nn.Module:
    from transformers import BertForMaskedLM

    torch.manual_seed(seed)
    return BertForMaskedLM(tiny_config())


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class PlainClassifier(nn.Module):
    """A classifier without transformers, whose import takes seconds that subprocesses can save."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.body = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 16))
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, LABELS)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.norm(self.body(self.embed(input_ids)).mean(dim=1))
        return {"loss": nn.functional.cross_entropy(self.classifier(hidden), labels)}


def plain_classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return PlainClassifier()
