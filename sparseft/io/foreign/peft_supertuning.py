"""PEFT Super-Tuning (``peft_type: "SUPERTUNING"``).

Source: ``peft/tuners/supertuning/{layer,model,config}.py`` (PEFT 0.21),
https://arxiv.org/abs/2607.09287. Per module a weight of ``nn.Linear`` with ``numel`` entries:

``supertuning_values``
    (k,) fp32, added to the weight; k is ``int(numel * (1 - sparsity))``, one sparsity for all.
``supertuning_indices``
    (k,) int32, flat row-major, in the order of a top-k, so unsorted. Absent if the configuration
    says ``save_precomputed_indices: false``: they are ``torch.topk(abs(W).flatten(), k)`` of the
    base's weight (or its smallest, ``select_top: false``), which needs the identical base.
``supertuning_lora_A.weight``, ``supertuning_lora_B.weight``
    of its hybrid Supra: a low-rank change on top, which is not sparse.

Shapes are not stored: they come from the base. Writing adds zeros, as entries of their own, up to
the smallest sparsity that holds every module.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError, OptionError
from sparseft.io.foreign.base import Base
from sparseft.io.foreign.entries import diff_from, integers
from sparseft.io.foreign.found import Conversion, Found, Written
from sparseft.io.foreign.names import module_of
from sparseft.io.foreign.peft import (
    adapter_from,
    check_writable,
    fillers,
    matrix_shape,
    split_tensors,
    storable,
    write_folder,
)

__all__ = ["read", "write"]

_SPARSE = ("supertuning_values", "supertuning_indices")
_LOW_RANK = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


def read(found: Found, *, drop_low_rank: bool = False) -> Conversion:
    """Read the sparse part exactly; shapes are the base's.

    Args:
        found: the files.
        drop_low_rank: leave out the low-rank part of Supra instead of refusing it.

    Raises:
        OptionError: no base is known, or its weights are needed and not there.
        AdapterFormatError: damaged or hostile, a low-rank part; names the tensor.
    """
    modules, dense, lost = split_tensors(found, _SPARSE + _LOW_RANK)
    diffs: dict[str, SparseDiff] = {}
    dropped = 0
    for module, keys in modules.items():
        low_rank = [keys[part] for part in _LOW_RANK if part in keys]
        if low_rank and not drop_low_rank:
            found.fail(
                f"{low_rank[0]!r} is the low-rank part of a Supra hybrid; a sparse adapter cannot "
                "hold it. --drop-low-rank (drop_low_rank=True) converts the sparse part alone."
            )
        dropped += bool(low_rank)
        if "supertuning_values" not in keys:
            found.fail(f"module {module!r} lacks supertuning_values.")
        key = keys["supertuning_values"]
        values, name = found.tensors[key], f"{module}.weight"
        shape = matrix_shape(found, name, key)
        if "supertuning_indices" in keys:
            index = keys["supertuning_indices"]
            positions = integers(found.tensors[index], found.what(index))
        else:
            positions = _recomputed(found, name, values)
        diffs[name] = diff_from(positions, values, shape, found.what(key))
    if dropped:
        lost.append(f"the low-rank part of {dropped} modules")
    adapter = adapter_from(found, diffs, dense, method="supertuning")
    return Conversion(adapter, found.format, found.nbytes, tuple(lost))


def _recomputed(found: Found, name: str, values: Tensor) -> Tensor:
    """Return the indices that PEFT did not store: its own top-k of the base's magnitudes."""
    weight = found.base.tensor(name)
    if weight is None:
        raise OptionError(
            f"{found.file}: saved without indices (save_precomputed_indices=False); finding them "
            f"again needs the weights of the identical base, and {found.base.label} has only "
            "shapes here. Give --base FOLDER with model.safetensors."
        )
    if values.dim() != 1 or values.numel() > weight.numel():
        found.fail(f"{tuple(values.shape)} values for {name!r} of shape {tuple(weight.shape)}.")
    largest = bool(found.config.get("select_top", True))
    return torch.topk(weight.abs().flatten(), k=values.numel(), largest=largest).indices


def _count(numel: int, sparsity: float) -> int:
    """Entries PEFT gives a weight: the expression of its ``_num_trainable``."""
    return int(numel * (1 - sparsity))


def _sparsity(heads: list[tuple[int, int]]) -> float:
    """Return the largest sparsity that gives each (nnz, numel) at least nnz entries."""
    sparsity = 1 - max(nnz / numel for nnz, numel in heads)
    step = math.ulp(1.0)
    while any(_count(numel, sparsity) < nnz for nnz, numel in heads):  # the product rounds down
        sparsity = max(0.0, sparsity - step)
        step *= 2
    return sparsity


def write(adapter: Adapter, path: Path, *, base: Base | None, overwrite: bool) -> Written:
    """Write a folder that ``PeftModel.from_pretrained`` loads as Super-Tuning.

    Raises:
        AdapterFormatError: a diff of something else than a matrix of ``nn.Linear``, or of one with
            2**31 entries or more.
        FileExistsError: files are there, and ``overwrite`` is False.
    """
    check_writable(adapter, "PEFT Super-Tuning", base)
    heads = {name: adapter.header(name) for name in adapter.names if adapter.header(name).nnz}
    for name, head in heads.items():
        if head.numel >= 2**31:
            raise AdapterFormatError(
                f"{name!r} has {head.numel:,} entries; Super-Tuning stores positions in 32 bits."
            )
    sparsity = _sparsity([(h.nnz, h.numel) for h in heads.values()])
    tensors: dict[str, Tensor] = {}
    added = 0
    for name, head in heads.items():
        diff = adapter[name].to("cpu")
        # PEFT refuses a module that would get none.
        count = _count(head.numel, sparsity)
        if count < 1:
            raise AdapterFormatError(
                f"{name!r} of shape {tuple(head.shape)} gets no entry at sparsity {sparsity}."
            )
        positions, values = fillers(diff, count)
        added += count - diff.nnz
        tensors[f"{module_of(name)}\0supertuning_values"] = storable(values, repr(name))
        tensors[f"{module_of(name)}\0supertuning_indices"] = positions.to(torch.int32)
    config = {
        "peft_type": "SUPERTUNING",
        "sparsity": sparsity,
        "select_top": True,
        "r": None,
        "lora_alpha": None,
        "lora_dropout": 0.0,
        "init_weights": True,
        "save_precomputed_indices": True,
    }
    zeros = [f"{added:,} zeros, to reach one sparsity in all modules"] if added else []
    return write_folder(adapter, path, tensors, config, base=base, overwrite=overwrite, added=zeros)
