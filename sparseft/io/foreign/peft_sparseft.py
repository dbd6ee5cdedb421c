"""sparseft's own method in PEFT (``peft_type: "SPARSEFT"``): see `sparseft.peft`.

No peft is needed to read or write it. Per module (Linear, Conv1D, Embedding or LayerNorm):

``sparseft_values``
    (nnz,) fp32, added to the weight.
``sparseft_indices``
    (nnz,) int32 (int64 from 2**31 entries on), flat row-major in the weight as it is stored,
    ascending.
``sparseft_bias_values``, ``sparseft_bias_indices``
    likewise, of the bias.

``entries`` in the configuration is parameter -> ``{"nnz": ..., "shape": [...]}``: what PEFT lays
the layers out from before it reads the tensors, and why no base is needed to read a folder.
``base_samples``, if there, is parameter -> ``{"dtype": ..., "samples": [...]}``: 16 base values
(`sparseft.fingerprint.sample_positions`), which PEFT's loading compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError
from sparseft.io.foreign.base import Base
from sparseft.io.foreign.entries import diff_from, integers
from sparseft.io.foreign.found import Conversion, Found, Written
from sparseft.io.foreign.names import checked_shape, module_of
from sparseft.io.foreign.peft import (
    adapter_from,
    check_writable,
    split_tensors,
    storable,
    write_folder,
)

__all__ = ["read", "write"]

# Attribute -> (values, indices).
_PARTS = {
    "weight": ("sparseft_values", "sparseft_indices"),
    "bias": ("sparseft_bias_values", "sparseft_bias_indices"),
}


def read(found: Found) -> Conversion:
    """Read the entries exactly.

    Raises:
        AdapterFormatError: damaged or hostile; names the tensor.
    """
    every = [part for pair in _PARTS.values() for part in pair]
    modules, dense, lost = split_tensors(found, every)
    entries = found.config.get("entries") or {}
    if not isinstance(entries, dict):
        found.fail("entries in adapter_config.json is no mapping from parameters to counts.")
    shapes = {found.parameter(str(name)): fact for name, fact in entries.items()}
    diffs: dict[str, SparseDiff] = {}
    for module, keys in modules.items():
        for attr, pair in _PARTS.items():
            have = [part for part in pair if part in keys]
            if not have:
                continue
            if len(have) < len(pair):
                missing = next(part for part in pair if part not in keys)
                found.fail(f"module {module!r} lacks {missing}.")
            values, index = (found.tensors[keys[part]] for part in pair)
            name, what = f"{module}.{attr}", found.what(keys[pair[1]])
            shape = _shape(found, name, shapes, values, what)
            diffs[name] = diff_from(integers(index, what), values, shape, what)
    absent = sorted(set(shapes) - set(diffs))
    if absent:
        found.fail(f"entries names {absent[0]!r}, which has no tensors in the file.")
    method, density = found.config.get("selection"), found.config.get("density")
    adapter = adapter_from(
        found,
        diffs,
        dense,
        method=method if isinstance(method, str) else "",
        density=float(density) if isinstance(density, int | float) else None,
    )
    return Conversion(adapter, found.format, found.nbytes, tuple(lost))


def _shape(
    found: Found, name: str, entries: dict[str, Any], values: Tensor, what: str
) -> tuple[int, ...]:
    """Return a parameter's shape: the configuration's, the base's where that has none."""
    fact = entries.get(name)
    if fact is None:
        return found.base.shape(name, what)
    if not isinstance(fact, dict) or fact.get("nnz") != values.numel():
        found.fail(
            f"{name!r} has {values.numel():,} values, but entries in adapter_config.json says "
            f"{str(fact)[:80]}."
        )
    return checked_shape(fact.get("shape"), f"{found.file}: entries of {name!r}")


def _samples(adapter: Adapter, names: Iterable[str]) -> dict[str, Any] | None:
    """Return what PEFT's loading recognises the base by, None where the adapter does not know."""
    known = adapter.metadata.fingerprint
    prints = {} if known is None else {n: known.tensors[n] for n in names if n in known.tensors}
    return {
        name: {"dtype": one.dtype, "samples": list(one.samples)}
        for name, one in prints.items()
        if not one.step and all(map(math.isfinite, one.samples))
    } or None


def write(adapter: Adapter, path: Path, *, base: Base | None, overwrite: bool) -> Written:
    """Write a folder that ``PeftModel.from_pretrained`` loads once `sparseft.peft` is imported.

    Raises:
        AdapterFormatError: "set" diffs, or parameters that are neither weight nor bias.
        FileExistsError: files are there, and ``overwrite`` is False.
    """
    check_writable(adapter, "the sparseft method of PEFT", base, matrices=False)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name in adapter.names:
        if not adapter.header(name).nnz:
            continue
        module, attr = module_of(name), name.rpartition(".")[2]
        if not module or attr not in _PARTS:
            raise AdapterFormatError(
                f"{name!r} is neither the weight nor the bias of a module, which is what PEFT puts "
                "a layer around. Leave it out: --exclude (exclude=[...])."
            )
        kind = base.kind(name) if base is not None else ""
        diff = adapter[name].to("cpu")
        values, indices = _PARTS[attr]
        tensors[f"{module}\0{values}"] = storable(diff.values, repr(name))
        tensors[f"{module}\0{indices}"] = diff.indices
        entries[name] = {"nnz": diff.nnz, "shape": list(diff.shape)}
        if kind.endswith("RMSNorm"):
            raise AdapterFormatError(
                f"{name!r} belongs to a {kind}, and PEFT's layers know Linear, Conv1D, Embedding "
                "and LayerNorm. Leave it out: --exclude (exclude=[...])."
            )
    if not entries:
        raise AdapterFormatError(
            f"adapter {adapter.name!r} has no entries to write, and PEFT makes none of heads alone."
        )
    config = {
        "peft_type": "SPARSEFT",
        "selection": adapter.metadata.method,
        "density": adapter.metadata.density,
        "seed": adapter.metadata.seed or 0,
        "entries": entries,
        "base_samples": _samples(adapter, entries),
    }
    return write_folder(adapter, path, tensors, config, base=base, overwrite=overwrite)
