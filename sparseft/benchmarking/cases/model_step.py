"""A full training step of XLM-R base (random weights) against LoRA, dense fine-tuning, and the
forward and backward pass of a frozen model.

Masks and LoRA sit on the weights of the encoder's linear layers; the classifier is trained densely
by everyone. bf16 weights, no dropout, the same attention. Ours steps with SparseAdamW, the others
with ``torch.optim.AdamW(fused=True)``.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.attachment import attach
from sparseft.benchmarking.checks import Check, as_accurate, equal_bits, worst
from sparseft.benchmarking.masks import packed_pattern, random_pattern
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared, Target, at_most, attempt
from sparseft.diff import SparsePattern
from sparseft.ops import gather_entries, resolve_backend, sum_entries
from sparseft.optim import SparseAdamW

__all__ = ["BASE", "TINY", "model_step_case"]

BASE = {
    "vocab_size": 250_002,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
}
TINY = {
    "vocab_size": 120,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 40,
}
_DENSITY = 0.01
_RANK = 16
_LR = 1e-4
_HEAD = "classifier"
_LABELS = 3

ATTACHED = "attached, random mask"
PACKED = "attached, a tenth of the tiles"
LORA = f"LoRA r={_RANK}, bf16 adapters"
LORA_DEFAULT = f"LoRA r={_RANK}, fp32 adapters (PEFT's default)"
DENSE = "dense fine-tuning"
DENSE_SAME = "dense, the masked modules only"
FROZEN = "frozen, forward and backward"

Batch = dict[str, Tensor]
Patterns = dict[str, SparsePattern]
Run = Callable[[], Any]


def model_step_case(batch: int, length: int, *, shape: dict[str, int]) -> Case:
    """Compare at ``batch`` sequences of ``length`` tokens, 1 % trained."""

    def build(device: torch.device) -> Prepared:
        base = _model(shape, device)
        data = _data(batch, length, shape["vocab_size"], device)
        names = _masked_names(base)
        masks = {ATTACHED: _patterns(base, names, False), PACKED: _patterns(base, names, True)}
        gradients = {
            dtype: _gradients_at(base, data, names, masks, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        }

        def attached(which: str) -> Callable[[], tuple[Run, list[Check], Facts]]:
            theirs, exact = (gradients[d][which] for d in (torch.bfloat16, torch.float32))
            return lambda: _attached(base, data, masks[which], theirs, exact)

        makers: dict[str, Callable[[], tuple[Run, list[Check], Facts]]] = {
            LORA: lambda: _lora(base, data, names, autocast=False),
            LORA_DEFAULT: lambda: _lora(base, data, names, autocast=True),
            ATTACHED: attached(ATTACHED),
            PACKED: attached(PACKED),
            DENSE: lambda: _dense(base, data, None),
            DENSE_SAME: lambda: _dense(base, data, names),
            FROZEN: lambda: _frozen(base, data),
        }
        absent = importlib.util.find_spec("peft") is None
        contenders = {}
        for name, make in makers.items():
            if absent and name in (LORA, LORA_DEFAULT):
                reason = "the package peft is not installed (pip install 'sparseft[bench]')"
                contenders[name] = Contender(skipped=reason)
            else:
                contenders[name] = attempt(partial(_with_peak, make, device))
        facts = {"masked modules": len(names), "candidates": _numel(base, names)}
        return Prepared(
            contenders,
            DENSE if absent else LORA,
            clocks=("wall",),
            targets=_TARGETS + (_memory_target(),),
            facts=facts,
        )

    return Case(f"model_step/{batch}x{length}", build)


_TARGETS = (
    at_most(1.15, ATTACHED, LORA),
    at_most(0.7, ATTACHED, DENSE),
    at_most(1.0, PACKED, LORA),
)


def _memory_target() -> Target:
    def measure(timing: Timing, contenders: Any) -> float | None:
        ours, theirs = (contenders[n].facts for n in (ATTACHED, LORA))
        if "peak MB" not in ours or "peak MB" not in theirs:
            return None
        return 1e6 * (ours["peak MB"] - theirs["peak MB"]) / ours["nnz"]

    what = f"{ATTACHED}: peak memory above LoRA's, bytes per trained entry"
    return Target(what, measure, 30.0, False)


def _model(shape: dict[str, int], device: torch.device) -> nn.Module:
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    config = XLMRobertaConfig(
        **shape,
        num_labels=_LABELS,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with device:
        model = XLMRobertaForSequenceClassification(config)
    return model.to(device=device, dtype=torch.bfloat16).train()


def _data(batch: int, length: int, vocab: int, device: torch.device) -> Batch:
    generator = torch.Generator(device).manual_seed(1)

    def drawn(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, device=device, generator=generator)

    ids = drawn(5, vocab, batch, length)
    labels = drawn(0, _LABELS, batch)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _masked_names(model: nn.Module) -> list[str]:
    """The weights of the encoder's linear layers."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(_HEAD)
    ]


def _numel(model: nn.Module, names: list[str]) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


def _patterns(model: nn.Module, names: list[str], packed: bool) -> Patterns:
    draw = packed_pattern if packed else random_pattern
    patterns = {}
    for seed, name in enumerate(names):
        weight = model.get_parameter(name)
        shape = (weight.shape[0], weight.shape[1])
        patterns[name] = draw(shape, _DENSITY, device=weight.device, seed=seed)
    return patterns


def _backward(model: nn.Module, data: Batch) -> Tensor:
    loss = model(**data).loss
    loss.backward()
    return loss.detach()


def _gradients_at(
    base: nn.Module, data: Batch, names: list[str], masks: dict[str, Patterns], dtype: torch.dtype
) -> dict[str, dict[str, Tensor]]:
    """Return torch's dense gradients at each mask, from the same weights widened to ``dtype``."""
    model = copy.deepcopy(base).to(dtype)
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_()
    _backward(model, data)
    found: dict[str, dict[str, Tensor]] = {which: {} for which in masks}
    for name in names:
        grad = model.get_parameter(name).grad
        if grad is None:
            raise RuntimeError(f"the dense model has no gradient for {name}")
        for which, patterns in masks.items():
            found[which][name] = gather_entries(grad, patterns[name].indices)
    return found


def _stepper(model: nn.Module, optimizer: torch.optim.Optimizer, data: Batch) -> Run:
    def step() -> Tensor:
        optimizer.zero_grad()
        loss = _backward(model, data)
        optimizer.step()
        return loss

    return step


def _attached(
    base: nn.Module,
    data: Batch,
    patterns: Patterns,
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
) -> tuple[Run, list[Check], Facts]:
    """The first gradients by the accuracy rule; after steps, what is written and what is frozen."""
    model = copy.deepcopy(base)
    attachment = attach(model, patterns, full_params=[f"{_HEAD}.*"])
    optimizer = SparseAdamW(attachment.parameters(), lr=_LR)
    _backward(model, data)
    gradients = [
        _gradient_check(name, leaf.grad, theirs[name], exact[name])
        for name, leaf in attachment.leaves.items()
    ]
    step = _stepper(model, optimizer, data)
    for _ in range(2):
        step()
    weights = []
    for name, leaf in attachment.leaves.items():
        before = base.get_parameter(name).detach().clone()
        at = patterns[name].indices
        values = sum_entries(gather_entries(before, at), leaf.detach(), before.dtype)
        before.view(-1)[at.long()] = values
        weights.append(equal_bits(name, model.get_parameter(name).detach(), before))
    moved = sum(float(leaf.detach().abs().sum()) for leaf in attachment.leaves.values())
    checks = [
        worst(gradients),
        worst(weights),
        Check("trained nothing", float(moved == 0), 0.0),
    ]
    backend = resolve_backend("sampled_weight_grad", next(iter(attachment.leaves.values())))
    return step, checks, {"backend": backend, "nnz": attachment.nnz}


def _gradient_check(name: str, got: Tensor | None, theirs: Tensor, exact: Tensor) -> Check:
    if got is None:
        return Check(f"{name}: no gradient", 1.0, 0.0)
    return as_accurate(f"gradient of {name}", got, theirs, exact)


def _dense(
    base: nn.Module, data: Batch, names: list[str] | None
) -> tuple[Run, list[Check], Facts]:  # fmt: skip
    model = copy.deepcopy(base)
    if names is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names or name.startswith(_HEAD))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LR, fused=True)
    return _stepper(model, optimizer, data), [], {"trained": sum(p.numel() for p in trained)}


def _lora(
    base: nn.Module, data: Batch, names: list[str], *, autocast: bool
) -> tuple[Run, list[Check], Facts]:
    """LoRA on the modules that ours masks; ``autocast``: PEFT's widening of its adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=_RANK,
        lora_alpha=2 * _RANK,
        lora_dropout=0.0,
        target_modules=[name.removesuffix(".weight") for name in names],
        modules_to_save=[_HEAD],
    )
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    pairs = sum("lora_A" in name for name, _ in trained)
    with torch.no_grad():
        apart = float((model(**data).loss - base(**data).loss).abs())
    checks = [
        Check("masked modules without LoRA, or others with it", abs(pairs - len(names)), 0.0),
        # B starts at zero: the same loss, as the same model is being trained.
        Check("loss at the start: distance from the base's", apart, 1e-3),
    ]
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=_LR, fused=True)
    facts: Facts = {"trained": sum(p.numel() for _, p in trained)}
    return _stepper(model, optimizer, data), checks, facts


def _frozen(base: nn.Module, data: Batch) -> tuple[Run, list[Check], Facts]:
    """Gradients of activations only: the least any of the others could cost."""
    model = copy.deepcopy(base)
    model.requires_grad_(False)
    embeddings = model.get_submodule("roberta.embeddings")
    embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return (lambda: _backward(model, data)), [], {}


def _with_peak(
    make: Callable[[], tuple[Run, list[Check], Facts]], device: torch.device
) -> Contender:
    """Build one side; on GPUs its facts get the peak memory of a step, its model included.

    The other sides' models, and ours' before the step, are not counted.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    run, checks, facts = make()
    for _ in range(2):
        run()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        facts["peak MB"] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return Contender(run, checks, facts)
