"""Leave a quantised base for good: the trained values as plain tensors, or as a stock checkpoint.

Nothing is merged into quantised storage: what comes out is a dense copy, tensor by tensor, and the
attached model stays as it is.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import AttachError
from sparseft.modules._collective import KeptGroup, Ranks
from sparseft.modules.dequantise import dequantise, is_opaque, is_quantised
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.names import STATE_KEY
from sparseft.modules.weight_storage import full_value, is_sharded

__all__ = ["MergedExport"]


class MergedExport:
    """The part of `Attachment` that exports.

    Attributes:
        model: with masks, quantised or not.
    """

    model: nn.Module
    _masked: dict[str, MaskedParameter]
    _kept_group: KeptGroup

    @torch.no_grad()
    def merged_state_dict(self, dtype: torch.dtype | None = torch.bfloat16) -> dict[str, Tensor]:
        """Return the trained model's plain tensors, by the names of the stock model, on the CPU.

        Quantised weights come dense, with their diff in: ``rn(dequantised + leaf)``. Others are
        what the model holds. Leaves, scales and codes are left out; tied names share one tensor. A
        weight that transformers turned from a Conv1D into a linear layer is turned back.

        Args:
            dtype: of floating tensors; None: each one's own, fp32 for bitsandbytes' weights.

        Raises:
            AttachError: a weight quantised in a way that is not known here.

        Numerics: the sum in fp32, rounded once.
        """
        merged: dict[str, Tensor] = {}
        made: dict[int, Tensor] = {}
        for name, module, attr, value in _entries(self.model):
            if id(value) not in made:
                made[id(value)] = _plain(name, module, attr, value, dtype)
            merged[name] = made[id(value)]
        return merged

    def save_merged(
        self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16
    ) -> Path:
        """Write a checkpoint that ``from_pretrained`` loads without a quantisation library.

        For models of transformers: config (without its quantisation), generation config and the
        weights of `merged_state_dict`, as ``save_pretrained`` writes them. Tokenizers are yours to
        save. Of a sharded model all processes call; one writes, and all go on once it has.

        Args:
            folder: made if need be.
            dtype: of the weights.

        Raises:
            AttachError: no model of transformers; as `merged_state_dict`.
        """
        model: Any = self.model
        if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
            raise AttachError(
                f"save_merged: a {type(model).__qualname__} has no save_pretrained and config, as "
                "models of transformers have. Attach to that model itself, or save the tensors of "
                "attachment.merged_state_dict() in your own format."
            )
        config = copy.deepcopy(model.config)
        config.__dict__.pop("quantization_config", None)
        config.dtype = dtype
        with torch.device("meta"):
            stock = type(model)(config).to(dtype)  # save_pretrained writes its dtype down
        stock.generation_config = getattr(model, "generation_config", None)
        sharded = any(is_sharded(p) for p in model.parameters())
        ranks = Ranks(self._kept_group.group if sharded else False)
        state = self.merged_state_dict(dtype)  # gathers what is sharded
        with ranks.lead_first("the merged model is written"):
            if ranks.leads:
                stock.save_pretrained(folder, state_dict=state)
        return Path(folder)


def _entries(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (name, module, attribute, tensor) of a stock state dict, ties under each name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        masks: Mapping[str, MaskedParameter] = module.__dict__.get(STATE_KEY, {})
        leaves = {id(masked.leaf) for masked in masks.values()}
        kept = {
            n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set
        }
        for attr, value in (*module._parameters.items(), *kept.items()):
            if value is not None and id(value) not in leaves:
                yield f"{prefix}.{attr}" if prefix else attr, module, attr, value


def _plain(
    name: str, module: nn.Module, attr: str, value: Tensor, dtype: torch.dtype | None
) -> Tensor:
    if not is_quantised(module, attr):
        if is_opaque(value) and not is_sharded(value) and isinstance(value, nn.Parameter):
            dequantise(module, attr, name=name)  # says what it is
        value = full_value(value.detach())
        wanted = dtype if value.is_floating_point() else None
        return value.to("cpu", wanted or value.dtype, copy=True)
    masked: MaskedParameter | None = module.__dict__.get(STATE_KEY, {}).get(attr)
    dense = dequantise(module, attr, torch.float32, name=name)
    if masked is not None:
        masked.follow_weight_()
        dense.view(-1).index_add_(0, masked.indices.long(), masked.leaf.detach().float())
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if conv1d is not None and getattr(module, "source_cls", None) is conv1d:
        dense = dense.t()
    own = value.dtype if value.is_floating_point() and value.dtype.itemsize > 1 else torch.float32
    return dense.to("cpu", dtype or own).contiguous()
