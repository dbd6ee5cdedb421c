"""The two kinds of diff the demo learns, each by one call of `sparseft.lottery_ticket`.

Batches are made before training, as a function of (recipe, language, seed, phase), and the loop
takes them in order.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparseft.adapter import Adapter
from sparseft.demo.corpus import MaskedBatch, mask_batch
from sparseft.demo.encoder import set_dropout
from sparseft.demo.names import CATEGORIES, SOURCE, names
from sparseft.demo.recipe import LanguageRecipe, TaskRecipe
from sparseft.demo.text import raw_text
from sparseft.denoise import Denoise
from sparseft.training import LoopTrainer, LotteryTicketResult, Phase, lottery_ticket

__all__ = ["PhaseState", "language_batches", "task_batches", "train_language", "train_task"]

DENOISED = "-denoised"  # at the end of an adapter's name
BACKBONE = "roberta.*"
HEAD = "classifier.*"
_SORTED_BATCHES = 8  # batches drawn together and sorted by length
Report = Callable[[str, int], None]


@dataclass(frozen=True)
class PhaseState:
    """Bytes of tensors alive at an optimizer step, beyond the model's own weights."""

    name: str
    gradients: int
    optimizer: int
    diff: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.gradients + self.optimizer + self.diff


class _Watch:
    """Loop callback: reports progress, and counts the trained state at the second step."""

    def __init__(self, phase: Phase, report: Report | None) -> None:
        self.phase, self.report = phase, report
        self.state: PhaseState | None = None

    def on_pre_optimizer_step(
        self, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.report is not None:
            self.report(self.phase.name, step + 1)
        if self.state is None and optimizer.state:
            gradients = sum(_bytes(p.grad) for p in model.parameters() if p.grad is not None)
            moments = sum(
                _bytes(v)
                for s in optimizer.state.values()
                for v in s.values()
                if torch.is_tensor(v)
            )
            diff = 0
            attachment = self.phase.attachment
            if attachment is not None:
                leaves, patterns = attachment.leaves, attachment.patterns
                # values, indices, and the base value under each
                diff = sum(
                    _bytes(leaves[n]) + _bytes(patterns[n].indices) + 4 * patterns[n].nnz
                    for n in leaves
                )
            self.state = PhaseState(self.phase.name, gradients, moments, diff)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _take_first(rows: list[Any]) -> Any:
    return rows[0]


@functools.cache
def _lines(language: str, phrases: int) -> tuple[str, ...]:
    """Return a language's raw text, made once: looking for held-out names in it takes longest."""
    return tuple(raw_text(language, phrase_count=phrases))


def language_batches(
    language: str, tokenizer: Any, recipe: LanguageRecipe, *, seed: int
) -> list[MaskedBatch]:
    """Return the masked batches of one phase on a language's raw text.

    Args:
        language: CLDR locale.
        tokenizer: the demo's.
        recipe: steps, batch size, mask rate.
        seed: order and masks.
    """
    lines = _lines(language, recipe.phrases)
    ids = tokenizer(list(lines), truncation=True)["input_ids"]
    vocab_size = len(tokenizer)
    rng = np.random.default_rng((seed, 11))
    queue: list[int] = []
    batches: list[MaskedBatch] = []
    while len(batches) < recipe.steps:
        rows = []
        for _ in range(_SORTED_BATCHES * recipe.batch_size):
            queue = queue or rng.permutation(len(ids)).tolist()
            rows.append(ids[queue.pop()])
        rows.sort(key=len)
        for i in rng.permutation(_SORTED_BATCHES):
            chosen = rows[i * recipe.batch_size : (i + 1) * recipe.batch_size]
            batches.append(
                mask_batch(chosen, rate=recipe.mask_rate, vocab_size=vocab_size, rng=rng)
            )
    return batches[: recipe.steps]


def task_batches(tokenizer: Any, recipe: TaskRecipe, *, seed: int) -> list[dict[str, Tensor]]:
    """Return the labelled English batches of one phase: every training name once an epoch."""
    own = names(SOURCE, "train")
    labels = [CATEGORIES.index(key.category) for key in own]
    ids = tokenizer(list(own.values()), truncation=True)["input_ids"]
    rng = random.Random(f"task/{seed}")
    batches = []
    for _ in range(recipe.epochs):
        order = list(range(len(ids)))
        rng.shuffle(order)
        for start in range(0, len(order), recipe.batch_size):
            chosen = order[start : start + recipe.batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            batches.append({**batch, "labels": torch.tensor([labels[i] for i in chosen])})
    return batches


def language_loss(model: Any, batch: MaskedBatch) -> Tensor:
    """Return the masked-LM loss with the output projection held constant.

    The projection is tied to the embedding, and every row of it gets a small gradient of steady
    sign from the softmax's normaliser. Adam turns that into full steps, so after 200 of them the
    rows of words that the language does *not* have had moved most and filled 99.9 % of a 10 % mask,
    and the sparse phase learned nothing (loss 5.4 to 5.3; dense 4.3 to 2.7, Welsh).
    """
    hidden = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    at_masked = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    head = model.lm_head
    features = head.layer_norm(functional.gelu(head.dense(at_masked)))
    logits = functional.linear(features, head.decoder.weight.detach(), head.decoder.bias)
    return functional.cross_entropy(logits, batch.targets)


def task_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of a labelled batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits, batch["labels"])


def _trainer(
    model: nn.Module,
    phase: Phase,
    batches: Sequence[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    lr: float,
    watches: list[_Watch],
    report: Report | None,
) -> LoopTrainer:
    """Return the trainer of one phase, which takes the batches in order and is watched."""
    watches.append(_Watch(phase, report))
    trainer = LoopTrainer(
        model,
        batches,
        steps=len(batches),
        output_dir=phase.output_dir,
        collate=_take_first,
        loss_fn=loss_fn,
        batch_size=1,
        shuffle=False,
        lr=lr,
        warmup_steps=max(1, len(batches) // 10),
        save_every=200,
        seed=phase.seed,
    )
    trainer.add_callback(watches[-1])
    return trainer


def train_language(
    model: nn.Module,
    language: str,
    tokenizer: Any,
    recipe: LanguageRecipe,
    *,
    densities: Sequence[float],
    seed: int,
    output_dir: Path,
    base_name: str,
    denoise: Denoise | None = None,
    phase1: Path | None = None,
    report: Report | None = None,
) -> tuple[list[LotteryTicketResult], list[PhaseState]]:
    """Learn the diffs of a language from its raw text, one a density (phase 1 is shared).

    Args:
        model: the encoder with its masked-LM head, which stays frozen.
        language: CLDR locale.
        tokenizer: the demo's.
        recipe: the language part of the recipe.
        densities: of the encoder's entries.
        seed: of both phases.
        output_dir: state of the run; an interrupted one goes on.
        base_name: recorded in the adapter.
        denoise: how differences are denoised before the masks are chosen; None for plain masks.
        phase1: folder of a run whose dense phase is taken.
        report: called with (phase, step).
    """
    watches: list[_Watch] = []

    def make_trainer(model: nn.Module, phase: Phase) -> LoopTrainer:
        batches = language_batches(language, tokenizer, recipe, seed=phase.seed)
        return _trainer(model, phase, batches, language_loss, recipe.lr, watches, report)

    set_dropout(model, 0.0)
    results = lottery_ticket(
        make_trainer,
        model,
        density=list(densities),
        output_dir=output_dir,
        include=[BACKBONE],
        scope=recipe.scope,
        denoise=denoise,
        phase1=phase1,
        l1=recipe.l1,
        seed=seed,
        adapter_name=language + (DENOISED if denoise else ""),
        base_name=base_name,
        metadata={"language": language, "text": "CLDR raw text, training keys"},
    )
    return results, [w.state for w in watches if w.state is not None]


def train_task(
    model: nn.Module,
    tokenizer: Any,
    recipe: TaskRecipe,
    *,
    densities: Sequence[float],
    seed: int,
    output_dir: Path,
    base_name: str,
    source: Adapter | None = None,
    denoise: Denoise | None = None,
    phase1: Path | None = None,
    report: Report | None = None,
) -> tuple[list[LotteryTicketResult], list[PhaseState]]:
    """Learn the task diffs from labelled English names, one a density; the head is trained fully.

    Args:
        model: the encoder with a new classification head.
        source: the English language diff, applied beneath while the task diff is learned: what
            every language diff changes is then there already, and swapping it for a target's
            changes only what the languages differ in (LT-SFT, section 3.2).
        tokenizer, recipe, densities, seed, output_dir, base_name, denoise, phase1, report: as in
            `train_language`.
    """
    watches: list[_Watch] = []

    def make_trainer(model: nn.Module, phase: Phase) -> LoopTrainer:
        batches = task_batches(tokenizer, recipe, seed=phase.seed)
        return _trainer(model, phase, batches, task_loss, recipe.lr, watches, report)

    set_dropout(model, recipe.dropout)
    name = "task" if source is None else f"task-on-{source.name.removesuffix(DENOISED)}"
    results = lottery_ticket(
        make_trainer,
        model,
        density=list(densities),
        output_dir=output_dir,
        include=[BACKBONE],
        full_params=[HEAD],
        scope=recipe.scope,
        denoise=denoise,
        phase1=phase1,
        l1=recipe.l1,
        source_adapters=[] if source is None else [source],
        seed=seed,
        adapter_name=name + (DENOISED if denoise else ""),
        base_name=base_name,
        metadata={"task": "category of a CLDR name", "labels": list(CATEGORIES)},
    )
    return results, [w.state for w in watches if w.state is not None]
