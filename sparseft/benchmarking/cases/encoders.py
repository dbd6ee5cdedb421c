"""The encoders that whole-model cases run on: named ones, and any of ``LAYERSxHIDDENxVOCAB``.

All are XLM-R's architecture, an MLP four times as wide as the layer and 514 positions where a
shape was asked for; 12x768x250002 is XLM-R base. Weights are random: only sizes matter here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparseft.benchmarking.catalogue import Shape

__all__ = [
    "DIMS",
    "MODELS",
    "Model",
    "build_model",
    "config_of",
    "label_of",
    "matrix_shapes",
    "parameter_shapes",
    "random_differences",
]

# A name of MODELS, or layers, width and, where embeddings matter, words.
Model = str | Shape

DIMS = "LAYERSxHIDDENxVOCAB"

MODELS = {
    "xlmr_base": {
        "vocab_size": 250_002,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 514,
    },
    "small": {
        "vocab_size": 25_000,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "max_position_embeddings": 514,
    },
    "tiny": {
        "vocab_size": 120,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 40,
    },
}

# Of the singular values of the differences: i ** -0.5, as flat as those of fine-tuning.
_DECAY = 0.5
_SIZE = 1e-3


def config_of(model: Model) -> dict[str, int]:
    """Return the config's sizes; of a shape without a vocabulary, one of a single word."""
    if isinstance(model, str):
        return MODELS[model]
    layers, hidden, vocab = (*model[:2], model[2] if len(model) > 2 else 1)
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64 if hidden % 64 == 0 else 1,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 514,
    }


def label_of(model: Model) -> str:
    """Return how the model is called in names of cases."""
    return model if isinstance(model, str) else "x".join(map(str, model))


def build_model(model: Model, device: torch.device) -> nn.Module:
    """Return the encoder with random weights, the same ones every time."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(**config_of(model), type_vocab_size=1, pad_token_id=0)
    with torch.device("meta"):
        made = XLMRobertaModel(config)
    if device.type == "meta":
        return made
    made = made.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return made.requires_grad_(False)


def parameter_shapes(model: Model) -> dict[str, torch.Size]:
    """Return the shapes of all its parameters by name; nothing is allocated."""
    made = build_model(model, torch.device("meta"))
    return {name: parameter.shape for name, parameter in made.named_parameters()}


def matrix_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Return the weight matrices of its layers: four square ones, one tall, one wide."""
    sizes = config_of(model)
    h, inner = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = {}
    for i in range(sizes["num_hidden_layers"]):
        for part in ("key", "output", "query", "value"):
            shapes[f"layer.{i:02}.attention.{part}"] = (h, h)
        shapes[f"layer.{i:02}.intermediate"] = (inner, h)
        shapes[f"layer.{i:02}.output"] = (h, inner)
    return shapes


def random_differences(
    shapes: Iterable[tuple[str, tuple[int, int]]], device: torch.device
) -> dict[str, Tensor]:
    """Return fp32 matrices whose singular values fall about as those of differences do."""
    generator = torch.Generator(device).manual_seed(0)
    made = {}
    for name, (m, n) in shapes:
        short = min(m, n)
        left = torch.randn(m, short, device=device, generator=generator)
        right = torch.randn(short, n, device=device, generator=generator)
        sizes = torch.arange(1, short + 1, device=device) ** -_DECAY
        made[name] = (left * sizes) @ right * (_SIZE / short**0.5)
    return made
