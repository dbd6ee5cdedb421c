"""composable-sft: ``pytorch_diff.bin``, the language and task SFTs of LT-SFT.

Source: https://github.com/cambridgeltl/composable-sft, ``src/sft/sft.py``. By ``torch.save``::

    {"diffs": {NAME: {"size": torch.Size, "index_steps": list, "values": tensor}},
     "abs":   {NAME: tensor}}

Entry i of ``values`` (1-D, the parameter's dtype) is added at flat position
``index_steps[0] + ... + index_steps[i]``, counted **column-major** (``sum(i_d * prod(size[:d]))``).
The first step is a numpy int64, the others Python integers; no entries is ``[]``. ``abs`` holds
whole tensors (a task's head), which replace the base's: our ``dense``. An earlier version called
the two ``body`` and ``head``.

Written here with plain Python integers throughout: its own loader sums those as well, and they pass
``weights_only``, which its own files do not. Its loader sums in 32 bits, so parameters of 2**31
entries and more are refused (it would read wrong positions, silently).

Loading is bound by torch's restricted unpickler, which reads the lists of steps in Python: 4.6 of
5.6 s for 7.7 million entries on one CPU core, where the same adapter in our format takes 0.06 s.
Convert what is loaded often.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError
from sparseft.io.atomic import atomic_write
from sparseft.io.foreign.base import Base
from sparseft.io.foreign.entries import check_dense, diff_from
from sparseft.io.foreign.found import Conversion, Found, Written
from sparseft.io.foreign.names import checked_shape
from sparseft.io.foreign.peft import adapter_from, check_writable
from sparseft.io.pickles import check_tensors

__all__ = ["DIFF_FILE", "is_composable_sft", "read", "write"]

DIFF_FILE = "pytorch_diff.bin"
_PARTS = {"diffs": ("diffs", "body"), "abs": ("abs", "head")}


def is_composable_sft(state: object) -> bool:
    """Whether the contents of a pickle look like this format."""
    return isinstance(state, dict) and isinstance(state.get("diffs", state.get("body")), dict)


def _part(found: Found, which: str) -> dict[Any, Any]:
    part = next((found.pickle[k] for k in _PARTS[which] if k in found.pickle), None)
    if part is None:
        return {}
    if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
        found.fail(f"{which!r} is {type(part).__name__}, wanted a mapping from parameter names.")
    return part


def _row_major(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Turn column-major flat positions into row-major ones.

    Args:
        flat: (nnz,) int64.
        shape: of the tensor.
    """
    result = torch.zeros_like(flat)
    stride = 1
    for size in shape:
        stride *= size
    for size in shape:  # the first dimension varies fastest on file, slowest here
        stride //= max(size, 1)
        result.add_(flat.remainder(max(size, 1)).mul_(stride))
        flat = flat.div(max(size, 1), rounding_mode="floor")
    return result


def _column_major(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Turn row-major flat positions into column-major ones: the same with the sizes reversed."""
    return _row_major(flat, shape[::-1])


def _positions(steps: object, shape: tuple[int, ...], what: str) -> Tensor:
    if not isinstance(steps, list):
        raise AdapterFormatError(f"{what}: index_steps is {type(steps).__name__}, wanted a list.")
    try:
        # Not torch.tensor: it would round 1.5 down and take minutes for millions of objects.
        packed = array("q", steps)
    except (TypeError, OverflowError) as bad:
        raise AdapterFormatError(
            f"{what}: index_steps holds something else than 64-bit integers ({bad})."
        ) from None
    if not packed:
        return torch.empty(0, dtype=torch.int64)
    stepped = torch.frombuffer(packed, dtype=torch.int64).clone()
    if bool((stepped < 0).any()):
        at = int((stepped < 0).to(torch.uint8).argmax())
        raise AdapterFormatError(
            f"{what}: index_steps[{at}] is {int(stepped[at])}, wanted steps of 0 or more."
        )
    flat = stepped.cumsum(0)
    numel = 1
    for size in shape:
        numel *= size
    # A sum past 2**63 comes out negative.
    outside = (flat < 0) | (flat >= numel)
    if bool(outside.any()):
        at = int(outside.to(torch.uint8).argmax())
        raise AdapterFormatError(
            f"{what}: index_steps reach past the end at entry {at}: the tensor has {numel} entries."
        )
    return _row_major(flat, shape)


def read(found: Found) -> Conversion:
    """Read ``pytorch_diff.bin``: diffs exactly, ``abs`` as dense tensors.

    Raises:
        AdapterFormatError: damaged or hostile; names the tensor.
    """
    if not is_composable_sft(found.pickle):
        found.fail("holds no 'diffs', the table of sparse changes.")
    diffs: dict[str, SparseDiff] = {}
    dense: dict[str, Tensor] = {}
    listed, whole = _part(found, "diffs"), _part(found, "abs")
    values = {f"{n} (values)": e.get("values") for n, e in listed.items() if isinstance(e, dict)}
    check_tensors(found.file, values | whole)
    for key, entry in listed.items():
        what = found.what(key)
        if not isinstance(entry, dict):
            found.fail(
                f"{key[:200]!r} is {type(entry).__name__}, wanted size, index_steps and values. "
                "Very old files hold sparse tensors; load and save them with composable-sft."
            )
        missing = [k for k in ("size", "index_steps", "values") if k not in entry]
        if missing:
            found.fail(f"{key[:200]!r} lacks {missing[0]!r}.")
        shape = checked_shape(entry["size"], what)
        name = found.parameter(key)
        if name in diffs:
            found.fail(f"two diffs of parameter {name!r}.")
        positions = _positions(entry["index_steps"], shape, what)
        diffs[name] = diff_from(positions, entry["values"], shape, what)
    for key, tensor in whole.items():
        name = found.parameter(key)
        if name in dense:
            found.fail(f"two whole tensors of parameter {name!r}.")
        dense[name] = check_dense(tensor, found.what(key))
    adapter = adapter_from(found, diffs, dense, method="lt-sft")
    return Conversion(adapter, found.format, found.nbytes)


def write(adapter: Adapter, path: Path, *, base: Base | None, overwrite: bool) -> Written:
    """Write ``path/pytorch_diff.bin`` so that composable-sft loads it.

    Raises:
        AdapterFormatError: "set" diffs, parameters of 2**31 entries and more.
        FileExistsError: it is there, and ``overwrite`` is False.
    """
    check_writable(adapter, "composable-sft", base, matrices=False)
    for name in adapter.names:
        if adapter.header(name).numel >= 2**31:
            raise AdapterFormatError(
                f"{name!r} has {adapter.header(name).numel:,} entries, but composable-sft reads "
                "positions in 32 bits and would put the change elsewhere."
            )
    diffs: dict[str, Any] = {}
    for name in adapter.names:
        diff = adapter[name].to("cpu")
        flat, order = _column_major(diff.indices.long(), diff.shape).sort()
        steps = torch.diff(flat, prepend=flat.new_zeros(1)) if diff.nnz else flat
        diffs[name] = {
            "size": torch.Size(diff.shape),
            "index_steps": steps.tolist(),
            "values": diff.values.detach()[order].clone(),
        }
    dense = {n: t.detach().cpu().clone() for n, t in adapter.dense.items()}
    file = path if path.suffix == ".bin" else path / DIFF_FILE
    with atomic_write(file, overwrite=overwrite) as out:
        torch.save({"diffs": diffs, "abs": dense}, out)
    return Written((file,), os.path.getsize(file), adapter.nnz)
