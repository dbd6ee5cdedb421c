"""PEFT SHiRA (``peft_type: "SHIRA"``).

Source: ``peft/tuners/shira/{layer,model,config}.py`` (PEFT 0.21), https://arxiv.org/abs/2406.13175.
Per module a weight of ``nn.Linear`` with m rows and n columns:

``shira_weight``
    (nnz,) fp32, added to the weight; nnz is ``r * (m + n)`` with one ``r`` for all modules.
``shira_indices``
    (2, nnz) int32, rows then columns, in any order; float32 if saved on Windows.

``scaling`` is not stored and 1 when loaded. ``fan_in_fan_out``: rows and columns are the other way
round in the weight. Shapes are not stored: they come from the base.

Writing: nnz must be ``r * (m + n)`` everywhere, so zeros are added, as entries of their own, up to
the smallest ``r`` that holds every module.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError
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

_PARTS = ("shira_weight", "shira_indices")


def read(found: Found) -> Conversion:
    """Read SHiRA exactly; shapes are the base's.

    Raises:
        OptionError: no base is known.
        AdapterFormatError: damaged or hostile; names the tensor.
    """
    modules, dense, lost = split_tensors(found, _PARTS)
    swapped = bool(found.config.get("fan_in_fan_out", False))
    diffs: dict[str, SparseDiff] = {}
    for module, keys in modules.items():
        for part in _PARTS:
            if part not in keys:
                found.fail(f"module {module!r} lacks {part}.")
        what = found.what(keys["shira_weight"])
        values = found.tensors[keys["shira_weight"]]
        pairs = integers(found.tensors[keys["shira_indices"]], found.what(keys["shira_indices"]))
        if values.dim() != 1 or tuple(pairs.shape) != (2, values.numel()):
            found.fail(
                f"{keys['shira_indices']!r} has shape {tuple(pairs.shape)} for "
                f"{tuple(values.shape)} values, wanted (2, {values.numel()})."
            )
        name = f"{module}.weight"
        shape = matrix_shape(found, name, keys["shira_weight"])
        rows, columns = pairs[1 if swapped else 0], pairs[0 if swapped else 1]
        for which, positions, size in (("row", rows, shape[0]), ("column", columns, shape[1])):
            outside = (positions < 0) | (positions >= size)
            if bool(outside.any()):
                at = int(outside.to(torch.uint8).argmax())
                found.fail(
                    f"{keys['shira_indices']!r}: {which} {int(positions[at])} (entry {at}) is "
                    f"outside {name!r} of shape {shape}. Is it the right base?"
                )
        diffs[name] = diff_from(rows * shape[1] + columns, values, shape, what)
    adapter = adapter_from(found, diffs, dense, method="shira")
    return Conversion(adapter, found.format, found.nbytes, tuple(lost))


def write(adapter: Adapter, path: Path, *, base: Base | None, overwrite: bool) -> Written:
    """Write a folder that ``PeftModel.from_pretrained`` loads as SHiRA.

    Raises:
        AdapterFormatError: a diff of something else than a matrix of ``nn.Linear``, or so dense
            that no ``r`` holds it.
        FileExistsError: files are there, and ``overwrite`` is False.
    """
    check_writable(adapter, "PEFT SHiRA", base)
    heads = {name: adapter.header(name) for name in adapter.names if adapter.header(name).nnz}
    rank = max(-(-h.nnz // sum(h.shape)) for h in heads.values())
    for name, head in heads.items():
        if rank * sum(head.shape) > head.numel:
            raise AdapterFormatError(
                f"{name!r} of shape {tuple(head.shape)} cannot hold the {rank} * "
                f"{sum(head.shape)} entries that SHiRA then gives every module (r={rank} is what "
                "the fullest one needs). Write --to peft-supertuning, or --exclude the fullest."
            )
    tensors: dict[str, Tensor] = {}
    added = 0
    for name, head in heads.items():
        diff = adapter[name].to("cpu")
        count = rank * sum(head.shape)
        positions, values = fillers(diff, count)
        added += count - diff.nnz
        pairs = torch.stack([positions // head.shape[1], positions % head.shape[1]])
        tensors[f"{module_of(name)}\0shira_weight"] = storable(values, repr(name))
        tensors[f"{module_of(name)}\0shira_indices"] = pairs.to(torch.int32)
    config = {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",  # drawn when loading, then replaced by the indices of the file
        "random_seed": 0,
        "fan_in_fan_out": False,
        "init_weights": True,
    }
    zeros = [f"{added:,} zeros, to reach r={rank} in every module"] if added else []
    return write_folder(adapter, path, tensors, config, base=base, overwrite=overwrite, added=zeros)
