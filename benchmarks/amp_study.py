"""What the curves of mixed precision train: a model, masks and batches, the same for every way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseft
from sparseft.data import load_classification
from sparseft.errors import DataError

__all__ = ["Study", "real_study"]

Batch = dict[str, Tensor]


@dataclass
class Study:
    """What every way trains.

    Args:
        model: makes the same fp32 model at each call: weights that bf16 holds, no dropout.
        masks: bool masks by parameter name.
        batches: one a step, ``labels`` included.
        another_order: of the same data.
        lr: peak rate; it rises over a tenth of the steps and falls linearly to 0.
        weight_decay: decoupled, to the start.
        clip: largest norm of the gradient.
        facts: for the results.
    """

    model: Callable[[], nn.Module]
    masks: Mapping[str, Tensor]
    batches: Sequence[Batch]
    another_order: Sequence[Batch]
    lr: float = 5e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        steps = len(self.batches)
        warm = max(1, steps // 10)
        return self.lr * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


_LABELS = ("positive", "neutral", "negative")


def real_study(
    data: Path,
    *,
    steps: int = 300,
    batch: int = 4,
    length: int = 48,
    density: float = 0.05,
    lr: float = 5e-4,
    seed: int = 0,
    shape: Mapping[str, Any] | None = None,
) -> Study:
    """Return sentiment (SmSA) on the real encoder, or on a random one that reads the same pieces.

    Args:
        data: folder with ``smsa/`` and ``multilingual-e5-small-trimmed/``.
        steps: batches.
        batch: sentences of each.
        length: tokens each is cut or padded to.
        density: of random masks on every matrix of the encoder; the head is masked as a whole.
        lr: peak rate.
        seed: of head, masks and order.
        shape: overrides of the encoder's configuration; its weights are random then, and its
            vocabulary is the pieces that the sentences have (25,000 are most of a small model).

    Raises:
        DataError: a file that is not there.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = data / "multilingual-e5-small-trimmed"
    table = data / "smsa" / "trainvalid_minus_nusax_test.tsv"
    for path in (folder / "tokenizer.json", table):
        if not path.is_file():
            raise DataError(f"{path} is not there; --data names the folder with the real data.")
    examples = load_classification(table, _LABELS, columns=("text", "label"))
    drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = [examples[i] for i in drawn[: steps * batch]]
    rows = dict(
        AutoTokenizer.from_pretrained(folder)(
            [e.text for e in wanted],
            truncation=True,
            padding="max_length",
            max_length=length,
            return_tensors="pt",
        )
    )
    rows["labels"] = torch.tensor([e.label for e in wanted])
    if shape is not None:
        used = torch.cat([torch.arange(5), rows["input_ids"].flatten()]).unique()  # 5: special
        rows["input_ids"] = torch.searchsorted(used, rows["input_ids"])
        shape = {**shape, "vocab_size": used.numel()}
    config = AutoConfig.from_pretrained(
        folder,
        num_labels=len(_LABELS),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **(shape or {}),
    )

    torch.manual_seed(seed)
    kind: Any = AutoModelForSequenceClassification
    eager = {"attn_implementation": "eager"}  # of matrix products, which HalfProducts knows
    if shape is None:
        model = kind.from_pretrained(folder, config=config, dtype=torch.float32, **eager)
    else:
        model = kind.from_config(config, **eager)
    model = model.bfloat16().float().train()
    head = [name for name, _ in model.named_parameters() if name.startswith("classifier")]
    matrices = [n for n, p in model.named_parameters() if p.dim() == 2 and n not in head]
    chosen = sparseft.select(model, "random", density=density, include=matrices, seed=seed)
    masks = {name: pattern.to_mask() for name, pattern in chosen.items() if pattern.nnz}
    masks |= {n: torch.ones(model.get_parameter(n).shape, dtype=torch.bool) for n in head}
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(seed + 1))
    facts = {
        "model": "random weights" if shape else folder.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(int(mask.sum()) for mask in masks.values()),
        "density": density,
        "steps": steps,
        "batch": batch,
        "length": length,
        "lr": lr,
        "seed": seed,
    }
    cut = [{k: t[part] for k, t in rows.items()} for part in torch.arange(len(wanted)).split(batch)]
    other = [{k: t[part] for k, t in rows.items()} for part in order.split(batch)]
    return Study(lambda: copy.deepcopy(model), masks, cut, other, lr=lr, facts=facts)
