"""Which base an adapter was made on: samples of its targets, in adapter_config.json.

The samples of `sparseft.fingerprint`, 16 values a tensor and no digest, so that neither making nor
loading an adapter reads whole weights. What is quantised, sharded or on meta is not sampled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from sparseft.errors import AdapterFormatError, BaseMismatchError
from sparseft.fingerprint import SAMPLES, same_samples, sample_positions
from sparseft.modules.dequantise import is_opaque
from sparseft.peft.layer import SparseFtLayer

__all__ = ["check_base", "check_samples", "samples_of"]


def samples_of(layers: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return name -> ``{"dtype": ..., "samples": [...]}`` of parameters that can be read.

    Args:
        layers: modules of the bare model by name, ours among them.
        names: of parameters.
    """
    found = {}
    for name in sorted(names):
        key, _, attr = name.rpartition(".")
        layer = layers[key]
        ours = isinstance(layer, SparseFtLayer)
        weight: Any = getattr(layer.stock if ours else layer, attr)
        merged = ours and layer.merged
        if merged or weight.is_meta or is_opaque(weight) or isinstance(weight, DTensor):
            continue
        positions = sample_positions(name, weight.numel()).to(weight.device)
        values = weight.detach().reshape(-1)[positions].float().tolist()
        if all(map(math.isfinite, values)):  # JSON has no others
            found[name] = {"dtype": str(weight.dtype).removeprefix("torch."), "samples": values}
    return found


def check_samples(given: object) -> None:
    """Refuse a table of samples that a file may have got wrong.

    Raises:
        AdapterFormatError: names the parameter.
    """
    if not isinstance(given, Mapping):
        raise AdapterFormatError(
            f"base_samples is {type(given).__name__}, wanted parameter name -> dtype and samples."
        )
    for name, fact in given.items():
        values: Any = fact.get("samples") if isinstance(fact, Mapping) else None
        fine = isinstance(values, list | tuple) and len(values) in (0, SAMPLES)
        if not fine or not all(_is_finite(v) for v in values):
            raise AdapterFormatError(
                f"base_samples of {str(name)[:200]!r} are {str(fact)[:80]}, wanted a dtype and "
                f"{SAMPLES} finite numbers."
            )


def _is_finite(value: object) -> bool:
    if type(value) is int:  # as some writers give whole numbers; a long one is no float
        return abs(value) < 1 << 128
    return isinstance(value, float) and math.isfinite(value)


def check_base(
    wanted: Mapping[str, Mapping[str, Any]], layers: Mapping[str, nn.Module], names: Iterable[str]
) -> None:
    """Compare a model's weights with the samples of those that an adapter was made on.

    Casts of the same values are accepted.

    Raises:
        BaseMismatchError: another base; names the tensor, with samples of both.
    """
    if _waits_for_weights():
        return
    here = samples_of(layers, set(names) & set(wanted))
    for name, got in here.items():
        fact = wanted[name]
        if not same_samples(fact["samples"], str(fact.get("dtype")), got["samples"], got["dtype"]):
            head, own = (
                ", ".join(f"{v:.6g}" for v in f["samples"][:3]) + ", ..." for f in (fact, got)
            )
            raise BaseMismatchError(
                f"{name!r} is not the base tensor the adapter was made on: there its samples are "
                f"[{head}], in the model [{own}]. Load the base model that it names; or, to take "
                "this one all the same, pass config=SparseFtConfig.from_pretrained(folder) with "
                "config.base_samples = None."
            )


def _waits_for_weights() -> bool:
    """Whether transformers made this process's model of nothing, to be filled from the first one's.

    It does under accelerate's FSDP with ``cpu_ram_efficient_loading``.
    """
    yes = ("1", "true", "yes", "y", "on", "t")
    flags = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    fills = all(os.environ.get(flag, "").lower() in yes for flag in flags)
    return fills and os.environ.get("LOCAL_RANK", "0") != "0"
