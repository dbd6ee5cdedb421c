"""Training beside a base of 4 or 8 bits, for prediction: layers of the right bytes on fake tensors.

Linear layers of the body are quantised; embeddings, the output layer, norms and new heads stay in
the workload's dtype, as bitsandbytes leaves them. A mask on a quantised weight is trained in
separate mode, ``y = W4(x) + x @ S.T``; one on an unquantised weight is attached in place.

Bytes follow bitsandbytes: 4 bits are NF4 with an fp32 absolute maximum per block of 64, 0.5 + 4/64
bytes a weight and a table of 16 values a layer (double quantisation, off by default there, would
bring the second term from 0.5 to 8/64 + 32/(64 * 256) = 0.127 bits: Dettmers et al. 2023, arXiv
2305.14314, section 3); 8 bits are LLM.int8 with an fp32 scale per row (Dettmers et al. 2022, arXiv
2208.07339). A 4-bit weight is decoded whole for the product, in the forward pass and again in the
backward pass; an 8-bit one is multiplied as it is, with its input in int8 and its sums in int32,
and decoded in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseft.attachment import attach
from sparseft.modules.leaf_reduction import LeafReduction
from sparseft.modules.weight_storage import is_sharded
from sparseft.ops.spmm import segment_spmm
from sparseft.profiling.equal_count import equal_ranks
from sparseft.profiling.models import build_inputs, build_model
from sparseft.profiling.sides import Built
from sparseft.profiling.trained import (
    draw_patterns,
    freeze,
    head_names,
    linear_layers,
    make_optimizer,
    masked_count,
    numel_of,
)
from sparseft.profiling.workload import Unavailable, Way, Workload

__all__ = ["build_quantised"]

Layers = dict[str, nn.Linear]
Shard = Callable[[nn.Module], None]

_BLOCK = 64


class _QuantisedProduct(torch.autograd.Function):
    """``x @ W.T`` with W decoded when needed and never saved; the sizes are right, values are not.

    For fake tensors only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, shape: Any, bits: int):
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        if bits == 4:
            return F.linear(x, _decoded(codes, scales, shape, x.dtype))
        inputs = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        sums = torch.empty(*x.shape[:-1], shape[0], dtype=torch.int32, device=x.device)
        result = torch.empty(sums.shape, dtype=x.dtype, device=x.device)
        del inputs, sums  # alive until here, as in the product
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        codes, scales = ctx.saved_tensors
        dx = grad @ _decoded(codes, scales, ctx.shape, grad.dtype)
        return dx, None, None, None, None


def _decoded(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=codes.device)


class QuantisedLinear(nn.Module):
    """A linear layer's bytes with its weight in 4 or 8 bits, and what trains beside it."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        self.shape = (layer.out_features, layer.in_features)
        self.bits = bits
        numel = math.prod(self.shape)
        size, blocks = (
            (-(-numel // 2), -(-numel // _BLOCK)) if bits == 4 else (numel, self.shape[0])
        )
        device = layer.weight.device
        codes = torch.empty(size, dtype=torch.uint8, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", torch.empty(blocks, device=device))
        if bits == 4:  # the sixteen values that codes stand for, each layer's own
            self.register_buffer("table", torch.empty(16, device=device))
        self.bias = layer.bias
        self.indices: Tensor | None = None

    def mask(self, indices: Tensor) -> None:
        """Train these entries of the weight, beside it."""
        self.indices = indices
        self.diff_weight = nn.Parameter(torch.empty(indices.numel(), device=indices.device))

    def adapt(self, rank: int, dtype: torch.dtype) -> None:
        """Train a low-rank adapter beside the weight."""
        rows, columns = self.shape
        self.lora_A = nn.Linear(columns, rank, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(rank, rows, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer gives, in shape."""
        y = _QuantisedProduct.apply(x, self.codes, self.scales, self.shape, self.bits)
        if self.bias is not None:
            y = y + self.bias
        if self.indices is not None:
            y = segment_spmm(
                x, y, [self.diff_weight], [self.indices], [], None, [x.shape[0]], *self.shape,
                False, "",
            )  # fmt: skip
        elif hasattr(self, "lora_A"):
            low = self.lora_A(x.to(self.lora_A.weight.dtype))
            y = y + self.lora_B(low) * 2.0
        return y


def build_quantised(
    workload: Workload,
    way: Way,
    device: torch.device | str,
    *,
    shard: Callable[[nn.Module], None] | None = None,
) -> Built:
    """Build one way to train beside a quantised base; arguments as `sides.build`.

    Codes are cut as any weight; scales, part of bitsandbytes' state beside it, are on every rank.

    Raises:
        Unavailable: a way that trains the weights themselves; a model without `nn.Linear`.
    """
    if way.kind not in ("attached", "lora", "frozen"):
        raise Unavailable(
            f"{way.kind} trains the weights themselves, which a base of {workload.base} does not "
            "allow; attached, lora and frozen do."
        )
    where = torch.device(device)
    model, task = build_model(workload, where)
    inputs = build_inputs(workload, model, task, where)
    found = linear_layers(model).items()
    layers = {name: module for name, module in found if isinstance(module, nn.Linear)}
    if not layers:
        raise Unavailable(f"model {workload.model!r} has no nn.Linear in its body to quantise.")
    maker = {"attached": _attached, "lora": _lora, "frozen": _frozen}[way.kind]
    built = maker(model, workload, way, layers, shard or (lambda model: None))
    built.inputs = inputs
    return built


def _quantise(model: nn.Module, layers: Layers, bits: int) -> dict[str, QuantisedLinear]:
    made = {}
    for name, layer in layers.items():
        parent, _, attr = name.rpartition(".")
        made[name] = QuantisedLinear(layer, bits)
        setattr(model.get_submodule(parent), attr, made[name])
    return made


def _bits(workload: Workload) -> int:
    return 4 if workload.base == "4bit" else 8


def _attached(
    model: nn.Module, workload: Workload, way: Way, layers: Layers, shard: Shard
) -> Built:
    patterns = draw_patterns(model, workload, way)
    heads = head_names(model)
    beside = {name: patterns.pop(f"{name}.weight") for name in layers}
    made = _quantise(model, layers, _bits(workload))
    shard(model)
    model.requires_grad_(False)
    attachment = attach(model, patterns, full_params=heads) if patterns else None
    for name, layer in made.items():
        layer.mask(beside[name].indices)
    leaves = [layer.diff_weight for layer in made.values()]
    trained = [*leaves, *(() if attachment is None else attachment.parameters())]
    optimizer = make_optimizer(workload, trained, ours=True)
    head = numel_of(model, heads)
    count = sum(p.numel() for p in trained)
    built = Built(workload, way, model, optimizer, attachment, {}, count, head)
    if any(map(is_sharded, model.parameters())):  # as `attach` makes one for its own leaves
        built.facts["reduction"] = LeafReduction(leaves, None, model=model)
    return built


def _lora(model: nn.Module, workload: Workload, way: Way, layers: Layers, shard: Shard) -> Built:
    wanted = masked_count(model, way)
    heads = head_names(model)
    model.requires_grad_(False)
    for name in heads:
        model.get_parameter(name).requires_grad_(True)
    dtype = torch.float32 if way.variant == "fp32" else next(model.parameters()).dtype
    ranks = equal_ranks({n: m.in_features + m.out_features for n, m in layers.items()}, wanted)
    for name, layer in _quantise(model, layers, _bits(workload)).items():
        if ranks[name]:
            layer.adapt(ranks[name], dtype)
    shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(workload, trained, ours=False)
    head = numel_of(model, heads)
    return Built(workload, way, model, optimizer, None, {}, sum(p.numel() for p in trained), head)


def _frozen(model: nn.Module, workload: Workload, way: Way, layers: Layers, shard: Shard) -> Built:
    _quantise(model, layers, _bits(workload))
    shard(model)
    freeze(model)
    return Built(workload, way, model, None, None, {}, 0, 0)
