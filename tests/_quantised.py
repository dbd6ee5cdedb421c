"""Small models with quantised linear layers, and the dense model that each of them stands for."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from torch import Tensor, nn

from sparseft.modules.dequantise import dequantise, is_quantised, logical_shape

__all__ = ["SCHEMES", "dense_twin", "draw_masks", "needs", "net"]

# bitsandbytes says on CPUs that an optional kernel package is absent, torchao that its CUDA
# libraries do not load.
for noisy in ("bitsandbytes", "torchao"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where a library is absent; says what to install."""
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"pip install {package}")


_BNB, _AO = needs("bitsandbytes"), needs("torchao")
SCHEMES = [
    pytest.param("bnb.nf4", marks=_BNB),
    pytest.param("bnb.nf4.double", marks=_BNB),
    pytest.param("bnb.fp4", marks=_BNB),
    pytest.param("bnb.int8", marks=_BNB),
    pytest.param("torchao.int8", marks=_AO),
    pytest.param("torchao.int4", marks=_AO),
]


def stock_net(width: int = 64) -> nn.Sequential:
    """Return the same model at each call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width, bias=False), nn.LayerNorm(width)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def quantise(layer: nn.Linear, scheme: str) -> nn.Module:
    """Return a layer with the same weight, quantised."""
    if scheme.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        holder = nn.Sequential(layer)
        quantize_(holder, Int8WeightOnlyConfig() if scheme.endswith("int8") else four)
        return holder[0]
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if scheme == "bnb.int8":
        made = Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
    else:
        _, kind, *double = scheme.split(".")
        made = Linear4bit(
            *sizes, bias=bias, compute_dtype=layer.weight.dtype, quant_type=kind,
            compress_statistics=bool(double),
        )  # fmt: skip
    made.weight.data = layer.weight.data.clone()
    made.bias = layer.bias
    return made.to("cpu")


def net(scheme: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return the small model with its two linear layers quantised."""
    model = stock_net().to(dtype)
    for i in (0, 2):
        model[i] = quantise(model[i], scheme)
    return model


def dense_twin(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return the plain model whose weights are the dequantised ones."""
    twin = stock_net().to(dtype)
    with torch.no_grad():
        for ours, theirs in zip(twin, model, strict=True):
            for attr in ours._parameters:
                if ours._parameters[attr] is not None:
                    ours._parameters[attr].copy_(dequantise(theirs, attr, dtype))
    return twin


def draw_masks(model: nn.Module, density: float = 0.1, seed: int = 1) -> dict[str, Tensor]:
    """Return bool masks of the weights, by name: both quantised ones and the norm's."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{i}.weight": torch.rand(logical_shape(model[i]), generator=generator) < density
        for i in (0, 2, 3)
    }


def quantised_names(model: nn.Module) -> list[str]:
    """Return the names of the modules whose weight is quantised."""
    return [
        name
        for name, module in model.named_modules()
        if module._parameters.get("weight") is not None and is_quantised(module)
    ]
