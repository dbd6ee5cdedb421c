"""RoSA (``peft_type: "ROSA"``): a low-rank and a sparse change, by a fork of PEFT.

Source: https://github.com/IST-DASLab/peft-rosa, ``src/peft/tuners/rosa/{layer,splinear}.py``,
https://arxiv.org/abs/2401.04679. The sparse part of a weight with m rows is a CSR matrix that is
added to it without any scale::

    {module}.rosa_spa.values      (nnz,) bf16 by default
    {module}.rosa_spa.row_offs    (m + 1,) int32, entries before each row
    {module}.rosa_spa.col_idx     (nnz,) int16
    {module}.rosa_spa.row_idx     (m,) int16, an order of rows for load balance: ignored
    {module}.rosa_spa.tr_*        the transposed layout, redundant: ignored
    {module}.rosa_A.weight (r, n), rosa_B.weight (m, r), rosa_embedding_A/B: the low-rank part

Columns above 32,767 have wrapped to negative numbers; as uint16 they are right up to 65,535. Wider
weights cannot be recovered and are refused. Without a mask (before RoSA's first batch) ``row_offs``
ends in 0. The number of columns is not stored: it is that of ``rosa_A``, or the base's.

The low-rank part cannot become part of a sparse adapter exactly: it is refused, or left out when
asked for. Not written: RoSA's masks and scales are part of a training run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.diff import SparseDiff
from sparseft.io.foreign.entries import diff_from, integers
from sparseft.io.foreign.found import Conversion, Found
from sparseft.io.foreign.peft import adapter_from, matrix_shape, split_tensors

__all__ = ["read"]

_SPARSE = ("rosa_spa.values", "rosa_spa.row_offs", "rosa_spa.col_idx")
_IGNORED = tuple(f"rosa_spa.{n}" for n in ("row_idx", "tr_perm", "tr_row_offs", "tr_row_idx",
                                           "tr_col_idx"))  # fmt: skip
_LOW_RANK = ("rosa_A.weight", "rosa_B.weight", "rosa_embedding_A", "rosa_embedding_B")


def read(found: Found, *, drop_low_rank: bool = False) -> Conversion:
    """Read the sparse part exactly.

    Args:
        found: the files.
        drop_low_rank: leave out the low-rank part instead of refusing it.

    Raises:
        OptionError: no base is known, and it is needed.
        AdapterFormatError: damaged or hostile, a low-rank part, a weight wider than 65,536 columns;
            names the tensor.
    """
    modules, dense, lost = split_tensors(found, _SPARSE + _IGNORED + _LOW_RANK)
    diffs: dict[str, SparseDiff] = {}
    dropped, unmasked = 0, 0
    for module, keys in modules.items():
        low_rank = [keys[part] for part in _LOW_RANK if part in keys]
        if low_rank and not drop_low_rank:
            found.fail(
                f"{low_rank[0]!r} is the low-rank part of RoSA; a sparse adapter cannot hold it "
                "exactly. --drop-low-rank (drop_low_rank=True) converts the sparse part alone, "
                "which is not what was trained."
            )
        dropped += bool(low_rank)
        have = [part for part in _SPARSE if part in keys]
        if not have:
            continue
        if len(have) < len(_SPARSE):
            found.fail(f"module {module!r} lacks {next(p for p in _SPARSE if p not in keys)}.")
        diff = _csr(found, module, keys)
        if diff is None:
            unmasked += 1
        else:
            diffs[f"{module}.weight"] = diff
    if dropped:
        lost.append(f"the low-rank part of {dropped} modules")
    if unmasked:
        lost.append(f"{unmasked} modules whose mask was never made")
    adapter = adapter_from(found, diffs, dense, method="rosa")
    return Conversion(adapter, found.format, found.nbytes, tuple(lost))


def _csr(found: Found, module: str, keys: dict[str, str]) -> SparseDiff | None:
    """Return the diff of one CSR matrix, None if its mask was never made."""
    values, offsets, columns = (found.tensors[keys[part]] for part in _SPARSE)
    key, name = keys["rosa_spa.row_offs"], f"{module}.weight"
    offsets = integers(offsets, found.what(key))
    if offsets.dim() != 1 or offsets.numel() < 2:
        found.fail(f"{key!r} has shape {tuple(offsets.shape)}, wanted (rows + 1,).")
    if int(offsets[-1]) == 0 and not bool(offsets.any()):
        return None
    counts = offsets.diff()
    if int(offsets[0]) != 0 or bool((counts < 0).any()) or int(offsets[-1]) != values.numel():
        found.fail(
            f"{key!r} runs from {int(offsets[0])} to {int(offsets[-1])}, wanted rising offsets "
            f"from 0 to the {values.numel()} values."
        )
    if values.dim() != 1 or columns.shape != values.shape:
        found.fail(
            f"{keys['rosa_spa.col_idx']!r} has shape {tuple(columns.shape)} for "
            f"{tuple(values.shape)} values."
        )
    rows = offsets.numel() - 1
    if "rosa_A.weight" in keys:
        shape = (rows, int(found.tensors[keys["rosa_A.weight"]].shape[-1]))
    else:
        shape = matrix_shape(found, name, key)
    if shape[0] != rows:
        found.fail(f"{key!r} has {rows} rows, but {name!r} of the base has {shape[0]}.")
    wide = _columns(found, keys["rosa_spa.col_idx"], columns, shape)
    first = torch.repeat_interleave(torch.arange(rows), counts)
    return diff_from(first * shape[1] + wide, values, shape, found.what(keys["rosa_spa.values"]))


def _columns(found: Found, key: str, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return column numbers as int64, with int16's wrap undone."""
    wide = integers(columns, found.what(key))
    if columns.dtype == torch.int16:
        if shape[1] > 65536:
            found.fail(
                f"{key!r} is int16, but the weight has {shape[1]:,} columns: numbers above 65,535 "
                "have wrapped around and cannot be recovered."
            )
        wide = wide.bitwise_and(0xFFFF)
    outside = (wide < 0) | (wide >= shape[1])
    if bool(outside.any()):
        at = int(outside.to(torch.uint8).argmax())
        found.fail(
            f"{key!r}: column {int(wide[at])} (entry {at}) is outside a weight of shape {shape}."
        )
    return wide
