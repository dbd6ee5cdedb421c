"""Every way to train a model that figures here compare, built in one place.

`build` works on a CPU, on a GPU, and inside a FakeTensorMode, where the same code runs without
memory. Masks lie on the weight of every linear layer and embedding of the pre-trained model, its
output layer included, tied weights once. A new head (the classifier) is no part of it: everyone
but ``"frozen"`` trains it in full. Biases and norms are trained by ``"dense"`` alone. Weight decay
is 0: on a diff and on a weight it means different things.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sparseft.attachment import Attachment, attach
from sparseft.modules.names import ParameterIndex
from sparseft.modules.weight_storage import is_sharded, own_rows
from sparseft.profiling.equal_count import equal_ranks
from sparseft.profiling.masks import exact_pattern
from sparseft.profiling.models import TORCH_DTYPES, build_inputs, build_model, faked, load_config
from sparseft.profiling.trained import (
    draw_patterns,
    freeze,
    head_names,
    linear_layers,
    make_optimizer,
    masked_count,
    masked_names,
    numel_of,
)
from sparseft.profiling.workload import Unavailable, Way, Workload

__all__ = ["Built", "build", "load_config"]

Facts = dict[str, Any]


@dataclass
class Built:
    """A model, ready to train one way.

    Attributes:
        workload, way: what it was built from.
        model: with leaves, adapters or hooks on it, in training mode.
        optimizer: over what is trained; None for ``"frozen"``.
        attachment: None unless attached.
        inputs: the batch, labels included; the same for every way.
        trainable: entries in training, the head's included.
        head: of them, the new head's.
        masks: ``"gradient_mask"``: by parameter name, of the weight's shape and dtype (a bool mask
            would multiply five times slower on a CPU).
        facts: for reports: ranks, by how much a count is off.
        wrapped: what is called in the model's place: DDP around it.
    """

    workload: Workload
    way: Way
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    attachment: Attachment | None
    inputs: dict[str, Tensor]
    trainable: int
    head: int
    masks: dict[str, Tensor] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)
    wrapped: nn.Module | None = None

    def forward(self) -> Tensor:
        """Return the loss."""
        with _no_padding_asked(self.model):
            return (self.wrapped or self.model)(**self.inputs).loss

    def backward(self, loss: Tensor) -> None:
        """Leave in ``.grad`` what the optimizer should step on."""
        loss.backward()
        for name, mask in self.masks.items():
            grad = self.model.get_parameter(name).grad
            if grad is not None:
                grad.mul_(mask)

    def step(self) -> Tensor:
        """Take one step and return the loss, detached."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        loss = self.forward()
        self.backward(loss)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()


@contextlib.contextmanager
def _no_padding_asked(model: Any) -> Iterator[None]:
    """On fake tensors: keep transformers 4 from reading whether there is padding.

    Its encoders make a mask of ones, find that it is all ones and drop it, and read the first and
    the last token to warn. There is no padding here: the answers are known.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    asked = [
        (sys.modules[type(base).__module__], "_prepare_4d_attention_mask_for_sdpa"),
        (type(base), "warn_if_padding_and_no_attention_mask"),
    ]
    with contextlib.ExitStack() as patches:
        for owner, name in asked:
            if faked() and hasattr(owner, name):
                owner = next((c for c in getattr(owner, "__mro__", ()) if name in vars(c)), owner)
                patches.enter_context(mock.patch.object(owner, name, return_value=None))
        yield


def build(
    workload: Workload,
    way: Way,
    device: torch.device | str,
    *,
    shard: Callable[[nn.Module], None] | None = None,
) -> Built:
    """Build one way to train.

    Args:
        workload: the model and its step.
        way: how to train it.
        device: where; inside a FakeTensorMode any kind, at hand or not.
        shard: cuts the model's weights over ranks (`sharding.sharder`): before masks are attached,
            after PEFT has added its adapters; None: they stay whole.

    Raises:
        Unavailable: the way cannot run here: an absent package, a kind of layer that PEFT lacks, a
            quantised base on real tensors.
        DataError, OptionError: the model is not found; task or length do not fit it.
    """
    where = torch.device(device)
    if workload.base and not faked():
        raise Unavailable(
            f"base={workload.base!r} is predicted only: its kernels are another package's."
        )
    if way.kind in ("lora", "shira") and importlib.util.find_spec("peft") is None:
        raise Unavailable("peft is not installed (pip install 'sparseft[bench]')")
    model, task = build_model(workload, where)
    inputs = build_inputs(workload, model, task, where)
    cut = shard or (lambda model: None)
    if way.kind in ("lora", "shira"):
        built = {"lora": _lora, "shira": _shira}[way.kind](model, workload, way, cut)
    else:
        cut(model)
        built = _MAKERS[way.kind](model, workload, way)
    built.inputs = inputs
    return built


def _attached(model: nn.Module, workload: Workload, way: Way) -> Built:
    heads = head_names(model)
    attachment = attach(model, draw_patterns(model, workload, way), full_params=heads)
    optimizer = make_optimizer(workload, attachment.param_groups(), ours=True)
    head = numel_of(model, heads)
    return Built(workload, way, model, optimizer, attachment, {}, attachment.nnz + head, head)


def _trained(model: nn.Module, workload: Workload, way: Way, names: list[str]) -> Built:
    """Train these parameters in full, by the competitor's optimizer."""
    chosen = set(names)
    for name, parameter in ParameterIndex(model).items():
        parameter.requires_grad_(name in chosen)
    parameters = [model.get_parameter(name) for name in names]
    optimizer = make_optimizer(workload, parameters, ours=False)
    head = numel_of(model, [name for name in head_names(model) if name in chosen])
    return Built(workload, way, model, optimizer, None, {}, numel_of(model, names), head)


def _dense(model: nn.Module, workload: Workload, way: Way) -> Built:
    if way.variant == "matrices":
        return _trained(model, workload, way, masked_names(model) + head_names(model))
    return _trained(model, workload, way, ParameterIndex(model).names)


def _gradient_mask(model: nn.Module, workload: Workload, way: Way) -> Built:
    built = _trained(model, workload, way, masked_names(model) + head_names(model))
    for name, pattern in draw_patterns(model, workload, way).items():
        weight = model.get_parameter(name)
        mask = torch.zeros_like(weight, requires_grad=False)
        _mark(mask, pattern.indices)
        built.masks[name] = mask
    built.trainable = masked_count(model, way) + built.head
    return built


def _mark(mask: Tensor, indices: Tensor) -> None:
    """Write ones at these places of a mask, of which a rank may have some rows only."""
    if is_sharded(mask):
        rows = own_rows(mask)
        if faked():
            return
        indices = indices[(indices >= rows.first) & (indices < rows.last)] - rows.first
        mask = rows.local
    mask.view(-1)[indices.long()] = 1


def _peft_base(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return (modules of the new head, names of its parameters)."""
    heads = head_names(model)
    return sorted({name.split(".")[0] for name in heads}), heads


def _lora(model: nn.Module, workload: Workload, way: Way, shard: Callable[[Any], None]) -> Built:
    from peft import LoraConfig, get_peft_model

    wanted = masked_count(model, way)
    layers = linear_layers(model)
    costs = {name: _features(module) for name, module in layers.items()}
    ranks = {name: rank for name, rank in equal_ranks(costs, wanted).items() if rank}
    low = min(ranks.values())
    modules, heads = _peft_base(model)
    head = numel_of(model, heads)
    config = LoraConfig(
        r=low,
        lora_alpha=2 * low,
        lora_dropout=0.0,
        target_modules=list(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != low},
        modules_to_save=modules or None,
        # Where weights are stored turned, as in GPT-2.
        fan_in_fan_out=any(not isinstance(m, nn.Linear) for m in layers.values()),
    )
    wide = way.variant == "fp32"
    with _adapters_in_place(torch.float32 if wide else TORCH_DTYPES[workload.dtype], model):
        tuned = get_peft_model(model, config, autocast_adapter_dtype=wide)
    shard(tuned)
    built = _peft_built(tuned, workload, way, head, wanted)
    built.facts |= {"ranks": sorted(set(ranks.values())), "adapted modules": len(ranks)}
    return built


@contextlib.contextmanager
def _adapters_in_place(dtype: torch.dtype, model: Any) -> Iterator[None]:
    """On fake tensors: make PEFT's adapters where and as they belong, for it cannot move them.

    ``Module.to`` of a fake module fails (torch 2.13: "Couldn't swap"), and a deep copy of a fake
    tensor copies the storage that it has not: the process crashes, some steps later.
    """
    if not faked():
        yield
        return

    def stay(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return module

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        copy = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copy = nn.Parameter(copy, tensor.requires_grad)
        return memo.setdefault(id(tensor), copy)

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    to, deepcopy = (nn.Module, "to", stay), (Tensor, "__deepcopy__", copied)
    try:
        with model.device, mock.patch.object(*to), mock.patch.object(*deepcopy):
            yield
    finally:
        torch.set_default_dtype(default)


def _features(module: Any) -> int:
    rows, columns = module.weight.shape
    return int(rows) + int(columns)


def _shira(model: nn.Module, workload: Workload, way: Way, shard: Callable[[Any], None]) -> Built:
    from peft import ShiraConfig, get_peft_model
    from peft.tuners.shira.layer import ShiraLayer

    if faked():
        raise Unavailable("SHiRA's torch.sparse_coo_tensor has no backward on fake tensors")
    layers = linear_layers(model)
    if not all(isinstance(module, nn.Linear) for module in layers.values()):
        raise Unavailable("PEFT's SHiRA is for nn.Linear, and this model has other linear layers")
    wanted = masked_count(model, way)
    modules, heads = _peft_base(model)
    head = numel_of(model, heads)
    config = ShiraConfig(r=1, target_modules=list(layers), modules_to_save=modules or None)
    config.mask_fn = None  # its own draw makes a mask and a permutation of the weight's size
    tuned = get_peft_model(model, config)
    adapted: list[Any] = [m for m in tuned.modules() if isinstance(m, ShiraLayer)]
    entries = sum(module.get_base_layer().weight.numel() for module in adapted)
    done = seen = 0
    for number, module in enumerate(adapted):
        weight = module.get_base_layer().weight
        seen += weight.numel()
        until = min(wanted, entries) * seen // entries
        share = max(1, until - done) / weight.numel()
        done = until
        seed = workload.seed + number
        indices = exact_pattern(tuple(weight.shape), share, device=weight.device, seed=seed).indices
        columns = weight.shape[1]
        module.shira_indices["default"] = torch.stack([indices // columns, indices % columns])
        values = torch.zeros(indices.numel(), dtype=weight.dtype, device=weight.device)
        module.shira_weight["default"] = nn.Parameter(values)
    shard(tuned)
    return _peft_built(tuned, workload, way, head, wanted)


def _peft_built(tuned: Any, workload: Workload, way: Way, head: int, wanted: int) -> Built:
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in parameters)
    off = (trainable - head) / wanted - 1
    facts: Facts = {}
    if abs(off) > 0.01:
        facts["count"] = f"{off:+.1%} of the attached mask's"
    optimizer = make_optimizer(workload, parameters, ours=False)
    return Built(workload, way, tuned, optimizer, None, {}, trainable, head, facts=facts)


def _frozen(model: nn.Module, workload: Workload, way: Way) -> Built:
    freeze(model)
    return Built(workload, way, model, None, None, {}, 0, 0)


_MAKERS: dict[str, Callable[[nn.Module, Workload, Way], Built]] = {
    "attached": _attached,
    "dense": _dense,
    "gradient_mask": _gradient_mask,
    "frozen": _frozen,
}
