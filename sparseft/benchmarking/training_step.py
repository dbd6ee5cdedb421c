"""One optimizer step of an attached model against dense fine-tuning with a gradient mask.

The competitor is what composable-sft does: all of the model requires grad, each gradient is
multiplied by its 0/1 mask, and a dense ``torch.optim.AdamW`` steps. Its masks are kept as fp32
here, which is faster than its own bool masks, and are not
counted as its trained state: both choices favour the competitor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.attachment import Attachment, attach
from sparseft.benchmarking.paired import Comparison, alternate
from sparseft.diff import SparsePattern
from sparseft.optim import SparseAdamW

__all__ = ["StepCase", "build_encoder", "measure_step", "random_masks"]

# The encoder of the committed results: 12 layers of width 384, as multilingual-e5-small with a
# vocabulary of 25,000.
_SHAPE = {
    "vocab_size": 25_000,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
_HEAD = "classifier."
# The language-model head's own layers are trained like the rest; LayerNorms are frozen, as
# composable-sft does. So are the key biases: a softmax does not see them, so their gradient is all
# rounding noise, which Adam turns into full steps: two sides would never hold the same weights.
_FROZEN = ("LayerNorm", "layer_norm", "key.bias")


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """One row of the table.

    Args:
        task: ``"classification"`` (a head trained densely on both sides) or ``"mlm"`` (tied output
            embedding).
        batch: sequences per step.
        length: tokens per sequence.
        density: fraction of the masked tensors' entries that train.
        optimizer: ours: ``"torch"`` is ``torch.optim.AdamW`` over the leaves, ``"sparse"`` is
            ``SparseAdamW``.
        fused: both sides use ``torch.optim.AdamW(fused=True)``, the Trainer's default.
        seed: of weights, masks and data.
    """

    task: str = "classification"
    batch: int = 16
    length: int = 64
    density: float = 0.01
    optimizer: str = "torch"
    fused: bool = False
    seed: int = 0


def build_encoder(task: str, model: str | Path | None = None, seed: int = 0) -> nn.Module:
    """Return the encoder with the task's head, in fp32.

    Args:
        task: ``"classification"`` or ``"mlm"``.
        model: folder or name to load; None draws weights at random for the same shape (speed does
            not depend on them).
        seed: of whatever is drawn.
    """
    from transformers import (
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        XLMRobertaConfig,
    )

    factory = {
        "classification": AutoModelForSequenceClassification,
        "mlm": AutoModelForMaskedLM,
    }[task]
    torch.manual_seed(seed)
    extra: dict[str, Any] = {"num_labels": 3} if task == "classification" else {}
    if model is None:
        built = factory.from_config(XLMRobertaConfig(**_SHAPE, **extra))
    else:
        built = factory.from_pretrained(str(model), **extra)
    return built.float().train()


def random_masks(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    """Return a bool mask per base parameter, uniformly random: no block of rows is empty."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) < density
        for name, parameter in model.named_parameters()
        if not name.startswith(_HEAD) and not any(frozen in name for frozen in _FROZEN)
    }


class _Dense:
    """The competitor: dense gradients, multiplied by the mask, dense AdamW."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], fused: bool) -> None:
        self.model = model
        self.trained = []
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in masks or name.startswith(_HEAD))
            if parameter.requires_grad:
                mask = masks.get(name)
                self.trained.append((parameter, None if mask is None else mask.float()))
        self.optimizer = torch.optim.AdamW(
            [p for p, _ in self.trained], lr=1e-4, weight_decay=0.0, fused=fused or None
        )

    def step(self, batch: dict[str, Tensor]) -> float:
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        for parameter, mask in self.trained:
            if mask is not None and parameter.grad is not None:
                parameter.grad.mul_(mask)
        self.optimizer.step()
        return float(loss.detach())

    def state_bytes(self) -> int:
        return _tensor_bytes(p.grad for p, m in self.trained if m is not None) + _optimizer_bytes(
            self.optimizer, [p for p, m in self.trained if m is not None]
        )


class _Attached:
    """Ours: compact leaves, gradient at the mask, AdamW over the leaves."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], case: StepCase) -> None:
        self.model = model
        heads = [n for n, _ in model.named_parameters() if n.startswith(_HEAD)]
        patterns = {name: SparsePattern.from_mask(mask) for name, mask in masks.items()}
        self.attachment: Attachment = attach(model, patterns, full_params=heads)
        parameters = list(self.attachment.parameters())
        self.optimizer: torch.optim.Optimizer
        if case.optimizer == "sparse":
            self.optimizer = SparseAdamW(parameters, lr=1e-4, weight_decay=0.0)
        else:
            self.optimizer = torch.optim.AdamW(
                parameters, lr=1e-4, weight_decay=0.0, fused=case.fused or None
            )

    def step(self, batch: dict[str, Tensor]) -> float:
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def state_bytes(self) -> int:
        """Index, base, diff, gradient and optimizer state: everything kept per trained entry."""
        leaves = self.attachment.leaves
        kept: list[Tensor | None] = [p.indices for p in self.attachment.patterns.values()]
        kept += [diff for leaf in leaves.values() for diff in (leaf.detach(), leaf.grad)]
        base = sum(
            leaf.numel() * self.model.get_parameter(name).element_size()
            for name, leaf in leaves.items()
        )
        return _tensor_bytes(kept) + base + _optimizer_bytes(self.optimizer, list(leaves.values()))


def _tensor_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _optimizer_bytes(optimizer: torch.optim.Optimizer, parameters: list[Any]) -> int:
    return _tensor_bytes(
        value
        for parameter in parameters
        for value in optimizer.state[parameter].values()
        if isinstance(value, Tensor) and value.ndim > 0
    )


def _data(case: StepCase, vocab: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.batch, case.length)
    ids = torch.randint(5, vocab, shape, generator=generator)
    if case.task == "classification":
        labels = torch.randint(0, 3, (case.batch,), generator=generator)
    else:
        labels = torch.where(torch.rand(shape, generator=generator) < 0.15, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _agree(dense: nn.Module, ours: nn.Module) -> float:
    """Return the largest difference of any weight between the two models."""
    theirs = dict(dense.named_parameters())
    return max(
        float((parameter.detach() - theirs[name].detach()).abs().max())
        for name, parameter in ours.named_parameters()
        if name in theirs
    )


def measure_step(
    case: StepCase,
    *,
    model: str | Path | None = None,
    rounds: int = 10,
    warmup: int = 2,
    clock: str = "wall",
    tolerance: float = 5e-5,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Check that both sides train the same weights, then time them in turns.

    Args:
        case: what to run.
        model: as in :func:`build_encoder`.
        rounds: timed rounds.
        warmup: untimed rounds first.
        clock: as in :func:`alternate`.
        tolerance: largest allowed difference of any weight after three steps without dropout, at lr
            1e-4.
        progress: called after each timed round.

    Returns:
        The case, the check, times, ratios, trained bytes and their ratio, ready for JSON.
    """
    dense_model = build_encoder(case.task, model, case.seed)
    masks = random_masks(dense_model, case.density, case.seed)
    sparse_model = copy.deepcopy(dense_model)
    dense = _Dense(dense_model, masks, case.fused)
    ours = _Attached(sparse_model, masks, case)
    # The vocabulary is the longest first dimension of any parameter.
    batch = _data(case, max(mask.shape[0] for mask in masks.values()))
    for side in (dense_model, sparse_model):
        side.eval()  # no dropout: both sides must see the same network
    for _ in range(3):
        dense.step(batch)
        ours.step(batch)
    difference = _agree(dense_model, sparse_model)
    for side in (dense_model, sparse_model):
        side.train()
    times: Comparison = alternate(
        lambda: dense.step(batch),
        lambda: ours.step(batch),
        rounds=rounds,
        warmup=warmup,
        clock=clock,
        progress=progress,
    )
    candidates = sum(mask.numel() for mask in masks.values())
    return {
        "case": {**case.__dict__, "model": "random weights" if model is None else Path(model).name},
        "clock": clock,
        "passed": difference <= tolerance,
        "largest_weight_difference": difference,
        "trained_entries": ours.attachment.nnz,
        "candidate_entries": candidates,
        "baseline_state_bytes": dense.state_bytes(),
        "ours_state_bytes": ours.state_bytes(),
        "state_ratio": ours.state_bytes() / dense.state_bytes(),
        "bytes_per_trained_entry": ours.state_bytes() / ours.attachment.nnz,
        **times.summary(),
    }
