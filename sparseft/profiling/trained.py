"""What of a model trains, whoever trains it: masked weights, the new head, masks, optimizer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.attachment import Attachment
from sparseft.diff import SparsePattern
from sparseft.modules.experts import is_stacked
from sparseft.modules.names import ParameterIndex
from sparseft.optim import SparseAdamW
from sparseft.profiling.masks import count_at, exact_pattern
from sparseft.profiling.models import faked
from sparseft.profiling.workload import Unavailable, Way, Workload

__all__ = [
    "added_by",
    "draw_patterns",
    "freeze",
    "head_names",
    "linear_layers",
    "make_optimizer",
    "masked_count",
    "masked_names",
    "numel_of",
    "state_of",
]

LR = 1e-4
# In the names of what PEFT and a mask beside a quantised weight add to a model.
_ADDED = (".lora_", ".shira_", ".modules_to_save.", ".diff_")


def masked_names(model: nn.Module) -> list[str]:
    """Return the weights that a mask is on: of linear layers, embeddings and stacked experts, not
    of a new head.
    """
    from transformers.pytorch_utils import Conv1D

    index = ParameterIndex(model)
    heads = set(head_names(model))
    return [
        name
        for name in index.names
        if name not in heads
        and any(
            (attr == "weight" and isinstance(module, nn.Linear | nn.Embedding | Conv1D))
            or is_stacked(module, index.get(name))
            for module, attr in index.owners(name)
        )
    ]


def head_names(model: nn.Module) -> list[str]:
    """Return what a pre-trained model does not have: of a classifier all outside its body.

    The output layer of a language model is pre-trained.
    """
    if "SequenceClassification" not in type(model).__name__:
        return []
    body = f"{model.base_model_prefix}."
    return [name for name in ParameterIndex(model).names if not name.startswith(body)]


def numel_of(model: nn.Module, names: list[str]) -> int:
    """Return the entries of these parameters together."""
    return sum(model.get_parameter(name).numel() for name in names)


def masked_count(model: nn.Module, way: Way) -> int:
    """Return how many entries masks of this density keep."""
    tensors = (model.get_parameter(name) for name in masked_names(model))
    return sum(count_at(way.share, weight.numel()) for weight in tensors)


def draw_patterns(model: nn.Module, workload: Workload, way: Way) -> dict[str, SparsePattern]:
    """Return a mask per weight: the same entries for every way, whatever was drawn before."""
    patterns = {}
    for number, name in enumerate(masked_names(model)):
        weight = model.get_parameter(name)
        patterns[name] = exact_pattern(
            tuple(weight.shape),
            way.share,
            device=weight.device,
            seed=workload.seed + number,
            packed=way.variant == "packed",
        )
    return patterns


def make_optimizer(
    workload: Workload, parameters: list[Any], *, ours: bool
) -> torch.optim.Optimizer:
    """Return the workload's optimizer; ``ours``: over the leaves of attached masks.

    Raises:
        Unavailable: bitsandbytes is needed and absent.
    """
    kind = workload.optimizer
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=LR)
    if kind == "adamw_8bit":
        # On fake tensors ours stands for bitsandbytes': the same bytes per entry and block.
        if ours or faked():
            return SparseAdamW(parameters, lr=LR, weight_decay=0.0, moment_bits=8)
        if importlib.util.find_spec("bitsandbytes") is None:
            raise Unavailable("bitsandbytes is not installed (pip install bitsandbytes)")
        theirs: Any = importlib.import_module("bitsandbytes.optim")
        return theirs.AdamW8bit(parameters, lr=LR, weight_decay=0.0)
    if kind == "sparse_adamw" and ours:
        return SparseAdamW(parameters, lr=LR, weight_decay=0.0)
    fused = None if kind == "adamw_torch" else True
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=fused)


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that adapters sit on, by name: masked ones, no embedding or output."""
    names = set(masked_names(model))
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in names and not isinstance(module, nn.Embedding):
            if module is not output:
                found[name] = module
    return found


def freeze(model: Any) -> None:
    """Let nothing train, and let the backward pass reach the embeddings' output all the same."""
    model.requires_grad_(False)

    def require_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_()

    shared = model.get_input_embeddings().weight
    for module in model.modules():  # encoder and decoder may each have a module of the same weight
        if isinstance(module, nn.Embedding) and module.weight is shared:
            module.register_forward_hook(require_grad)


def added_by(model: nn.Module, attachment: Attachment | None) -> Iterator[Tensor]:
    """Yield the parameters that the way of training gave to the model: leaves, adapters."""
    if attachment is not None:
        yield from attachment.leaves.values()
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in _ADDED):
            yield parameter


def state_of(optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """Yield the tensors of an optimizer's state; none where there is no optimizer."""
    if optimizer is not None:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
