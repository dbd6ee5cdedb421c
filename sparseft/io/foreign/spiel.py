"""SpIEL (``peft_type: "SFT"``): sparse fine-tuning of large language models by a fork of PEFT 0.6.

Source: https://github.com/AlanAnsell/peft, ``src/peft/tuners/sft/{layer,config}.py``,
https://arxiv.org/abs/2401.16405. ``num_deltas`` in the configuration is module -> k; per module::

    {module}.sft_delta.values     (k,) float, added to the weight of a linear layer
    {module}.sft_delta.indices    (k,) int32 (int64 from 2**31 entries on), flat row-major,
                                  unsorted after the first reselection

Shapes are not stored: they come from the base. Tensors may lie in ``adapter_model.bin``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.io.foreign.base import Base
from sparseft.io.foreign.entries import diff_from, integers
from sparseft.io.foreign.found import Conversion, Found, Written
from sparseft.io.foreign.names import module_of
from sparseft.io.foreign.peft import (
    adapter_from,
    check_writable,
    matrix_shape,
    split_tensors,
    storable,
    write_folder,
)

__all__ = ["read", "write"]

_PARTS = ("sft_delta.values", "sft_delta.indices")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def read(found: Found) -> Conversion:
    """Read SpIEL exactly; shapes are the base's.

    Raises:
        OptionError: no base is known.
        AdapterFormatError: damaged or hostile; names the tensor.
    """
    modules, dense, lost = split_tensors(found, _PARTS)
    counts = found.config.get("num_deltas") or {}
    if not isinstance(counts, dict):
        found.fail("num_deltas in adapter_config.json is no mapping from modules to counts.")
    wanted = {found.parameter(str(module)): k for module, k in counts.items()}
    diffs: dict[str, SparseDiff] = {}
    for module, keys in modules.items():
        for part in _PARTS:
            if part not in keys:
                found.fail(f"module {module!r} lacks {part}.")
        values = found.tensors[keys["sft_delta.values"]]
        index = keys["sft_delta.indices"]
        if wanted.get(module, values.numel()) != values.numel():
            found.fail(
                f"module {module!r} has {values.numel():,} values, but num_deltas says "
                f"{wanted[module]}."
            )
        positions = integers(found.tensors[index], found.what(index))
        shape = matrix_shape(found, f"{module}.weight", index)
        diffs[f"{module}.weight"] = diff_from(positions, values, shape, found.what(index))
    absent = sorted(set(wanted) - set(modules))
    if absent:
        found.fail(f"num_deltas names module {absent[0]!r}, which has no tensors in the file.")
    adapter = adapter_from(found, diffs, dense, method="spiel")
    return Conversion(adapter, found.format, found.nbytes, tuple(lost))


def write(adapter: Adapter, path: Path, *, base: Base | None, overwrite: bool) -> Written:
    """Write a folder in SpIEL's layout, indices sorted.

    Raises:
        AdapterFormatError: a diff of something else than a matrix of ``nn.Linear``.
        FileExistsError: files are there, and ``overwrite`` is False.
    """
    check_writable(adapter, "SpIEL", base)
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name in adapter.names:
        diff = adapter[name].to("cpu")
        if not diff.nnz:
            continue
        module = module_of(name)
        tensors[f"{module}\0sft_delta.values"] = storable(diff.values, repr(name))
        tensors[f"{module}\0sft_delta.indices"] = diff.indices
        counts[module] = diff.nnz
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) > 1:  # one dtype for all, and fp32 holds any of them
        tensors = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
        dtypes = {torch.float32}
    config = {"peft_type": "SFT", "num_deltas": counts, "dtype": _DTYPES[dtypes.pop()]}
    return write_folder(adapter, path, tensors, config, base=base, overwrite=overwrite)
