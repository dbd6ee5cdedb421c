"""The inverse of merging: an adapter from a base and a tuned checkpoint, both read as streams."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparseft._integrity import chunk_of, find_value_fault
from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.composition.checkpoint_pairs import Pair, Side, find_gaps, open_side, pair_up
from sparseft.composition.fit import check_choice
from sparseft.diff import Mode, SparseDiff, SparsePattern, index_dtype_for
from sparseft.errors import CompositionError
from sparseft.fingerprint import Fingerprint, TensorFingerprint, fingerprint_tensor
from sparseft.io.model_folder import shown_name
from sparseft.modules import match_patterns
from sparseft.ops import StreamingTopK
from sparseft.ops._common import bits
from sparseft.ops.score_keys import difference
from sparseft.selection.counts import total_nnz

__all__ = ["New", "extract_adapter"]

logger = logging.getLogger(__name__)

New = Literal["dense", "error", "skip"]

_GAPS = {
    "stay": "the tuned checkpoint lacks %d tensors of the base (%s): an adapter takes nothing "
    "away, so base + diff has them still",
    "lost": "the base lacks %d tensors of the tuned checkpoint that are no floating parameters "
    "(%s): an adapter cannot hold them, so base + diff lacks them too",
    "other_dtype": "%d tensors of the tuned checkpoint have another dtype than the base (%s): base "
    "+ diff has them in the base's, so not bit for bit",
}


def extract_adapter(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    nnz: int | None = None,
    density: float | None = None,
    mode: Mode = "add",
    name: str | None = None,
    new: New = "dense",
    exclude: str | Iterable[str] = (),
) -> Adapter:
    """Return what was changed between two checkpoints as an adapter of the first.

    Both are streamed: two tensors are in memory at a time, beside the result. Without ``nnz`` and
    ``density`` every entry that differs in any bit is taken; composed onto the base, "set" entries
    then give the tuned weights bit for bit, if both checkpoints have the same tensors in the same
    dtypes, heads aside. What is not so is logged, and in the metadata as ``gaps``.

    Args:
        base, tuned: folders as save_pretrained writes them, names on the hub, or single files (of
            which tied weights and prefixes are not known).
        nnz, density: take the largest of ``|tuned - base|`` over all tensors: exactly so many, or
            that fraction of the entries that both have; ties by (canonical name, flat index).
        mode: "add" stores fp32 differences, to be weighted and summed with those of others; "set"
            the tuned values in the tuned dtype.
        name: of the adapter; default: that of ``tuned``.
        new: tensors that only ``tuned`` has (a head): "dense" takes them whole, "error" refuses,
            "skip" leaves them out.
        exclude: globs of tensors that are not looked at.

    Returns:
        The adapter. Its metadata has the base's fingerprint and how it was made.

    Raises:
        CompositionError: a checkpoint that cannot be read; tensors that differ and are no floating
            parameters; weights tied in one checkpoint only; "set" values that the base's dtype
            cannot hold; values that are not finite where they differ.
        BaseMismatchError: a tensor of another shape (a resized embedding).
        MaskError: nnz and density both given or out of range; differences that are NaN.
        UnknownNameError: a pattern that matches nothing.

    Numerics: differences are taken in fp32 (fp64 if either side is) and rounded once. A bf16 base
    plus an fp32 difference gives the tuned bf16 value back; an fp32 difference of fp32 values may
    miss it by a rounding, "set" never does.

    Example:
        >>> from safetensors.torch import save_file
        >>> save_file({"w": torch.zeros(4)}, "base.safetensors")
        >>> save_file({"w": torch.tensor([0.0, 1.0, -3.0, 0.5])}, "tuned.safetensors")
        >>> adapter = extract_adapter("base.safetensors", "tuned.safetensors", density=0.5)
        >>> adapter.diffs["w"].indices.tolist(), adapter.diffs["w"].values.tolist()
        ([1, 2], [1.0, -3.0])
    """
    check_choice("mode", mode, Mode)
    check_choice("new", new, New)
    before, after = open_side(base, "base"), open_side(tuned, "tuned")
    left_out = _left_out(after, exclude) if exclude else set()
    pairs, only_new = pair_up(before, after, left_out)
    if new == "error" and only_new:
        raise CompositionError(
            f"only {after.files.path} has {', '.join(only_new[:3])}"
            f"{', ...' if len(only_new) > 3 else ''}; --new dense (new='dense') takes such "
            "tensors whole, --new skip (new='skip') leaves them out."
        )
    if mode == "set":
        for pair in pairs:
            _check_settable(pair)
    heads = {n: _head(after, n) for n in only_new} if new == "dense" else {}
    if nnz is None and density is None:
        found = _all_entries(before, after, pairs, mode)
    else:
        numel = sum(pair.numel for pair in pairs)
        count = total_nnz(nnz, density, candidates=numel, of=numel, of_what="entries of both")
        found = _largest_entries(before, after, pairs, mode, count)
    diffs: dict[str, SparseDiff] = {}
    prints: dict[str, TensorFingerprint] = {}
    for pair, diff, print_ in found:
        diffs[pair.name], prints[pair.name] = diff, print_
    everything = nnz is None and density is None
    noted: dict[str, Any] = {
        "tuned": shown_name(tuned),
        "entries": "all that differ" if everything else "largest differences",
        "mode": mode,
        "architecture": after.architecture,
        "left_out": sorted([*left_out, *(only_new if new == "skip" else ())]),
    }
    gaps = find_gaps(before, after, pairs, heads, left_out) if everything else {}
    if mode == "add":  # holds differences, which have the dtype of what they are added to
        gaps.pop("other_dtype", None)
    if gaps:
        noted["gaps"] = gaps
        for what, names in gaps.items():
            logger.warning(
                _GAPS[what], len(names), ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            )
    if heads and after.id2label:
        noted["id2label"] = after.id2label
    metadata = AdapterMetadata(
        base_name=shown_name(base),
        fingerprint=Fingerprint(prints) if prints else None,
        method="diff/all" if everything else "diff/topk",
        density=density,
        extra={"extracted": noted},
    )
    title = Path(shown_name(tuned)).name
    for suffix in (".safetensors", ".bin"):
        title = title.removesuffix(suffix)
    return Adapter(diffs, name=name or title, dense=heads, metadata=metadata)


def _left_out(after: Side, exclude: str | Iterable[str]) -> set[str]:
    """Return the tensors that globs name, tied ones under any of their names."""
    named = {name: name for name in (*after.parameters, *after.others)}
    for name in after.parameters:
        if name in after.index:
            named |= dict.fromkeys(after.index.aliases(name), name)
    return {named[found] for found in match_patterns(exclude, list(named))}


Found = Iterator[tuple[Pair, SparseDiff, TensorFingerprint]]


def _all_entries(before: Side, after: Side, pairs: list[Pair], mode: Mode) -> Found:
    """Yield the diff of every tensor that differs anywhere."""
    for pair in pairs:
        if not before.files.same_bytes(pair.base, after.files, pair.tuned):
            found = _take(before, after, pair, None, mode)
            if found is not None:
                yield found


def _largest_entries(before: Side, after: Side, pairs: list[Pair], mode: Mode, count: int) -> Found:
    """Yield the diffs of those tensors that have one of the largest differences."""
    top = StreamingTopK(count)
    for pair in pairs:
        top.add_difference(pair.name, after.files.read(pair.tuned), before.files.read(pair.base))
    patterns: Mapping[str, SparsePattern] = top.finish()
    if top.zeros:
        logger.warning(
            "%d of the %d entries asked for do not differ; all that do are %d",
            top.zeros, count, count - top.zeros,
        )  # fmt: skip
    for pair in pairs:
        indices = patterns[pair.name].indices
        if indices.numel():
            found = _take(before, after, pair, indices, mode)
            if found is not None:
                yield found


def _take(
    before: Side, after: Side, pair: Pair, indices: Tensor | None, mode: Mode
) -> tuple[Pair, SparseDiff, TensorFingerprint] | None:
    """Read both tensors and take the entries ``indices``, or those that differ; None without any.

    The tensors are let go of on return, before the next two are read.
    """
    theta0, theta1 = before.files.read(pair.base), after.files.read(pair.tuned)
    indices = _differing(theta1, theta0) if indices is None else indices
    if not indices.numel():
        return None
    diff = _diff(pair, indices, theta1, theta0, mode)
    return pair, diff, fingerprint_tensor(pair.name, theta0)


def _differing(theta1: Tensor, theta0: Tensor) -> Tensor:
    """Return the flat positions where two tensors differ in any bit, ascending.

    Of different dtypes, they are compared in the one that holds both.
    """
    wide = torch.promote_types(theta1.dtype, theta0.dtype)
    new, old = theta1.view(-1), theta0.view(-1)
    dtype, step = index_dtype_for(new.numel()), chunk_of(new)
    found = [torch.empty(0, dtype=dtype)]
    for start in range(0, new.numel(), step):
        a, b = new[start : start + step].to(wide), old[start : start + step].to(wide)
        found.append(((bits(a) != bits(b)).nonzero().view(-1) + start).to(dtype))
    return torch.cat(found)


def _diff(pair: Pair, indices: Tensor, theta1: Tensor, theta0: Tensor, mode: Mode) -> SparseDiff:
    place = indices.long()
    # A tensor stored narrower than its model has it (fp16 files of an fp32 model) is that model's.
    new, old = theta1.view(-1)[place].to(pair.tuned_dtype), theta0.view(-1)[place]
    values = new if mode == "set" else difference(new, old)
    fault = find_value_fault(values)
    if fault is not None:
        at = int((~torch.isfinite(values)).to(torch.uint8).argmax())
        raise CompositionError(
            f"{pair.name!r} is {float(old[at])} in the base and {float(new[at])} in the tuned "
            f"checkpoint at flat index {int(indices[at])}; a diff holds finite values. Did "
            f"training diverge? --exclude (exclude={pair.name!r}) leaves the tensor out."
        )
    return SparseDiff(indices, values, theta1.shape, mode)


def _check_settable(pair: Pair) -> None:
    if torch.promote_types(pair.tuned_dtype, pair.base_dtype) != pair.base_dtype:
        raise CompositionError(
            f"{pair.name!r} is {pair.tuned_dtype} in the tuned checkpoint but {pair.base_dtype} in "
            "the base, which cannot hold its values, so mode 'set' could not rebuild them. Load "
            f"the base with dtype={pair.tuned_dtype}, save it and diff against that, or take "
            "--mode add (mode='add')."
        )


def _head(after: Side, name: str) -> Tensor:
    tensor = after.files.read(after.parameters[name][0])
    fault = find_value_fault(tensor)
    if fault is not None:
        raise CompositionError(
            f"{name!r}, which only the tuned checkpoint has, is {fault}; an adapter holds finite "
            f"values. --exclude (exclude={name!r}) leaves it out."
        )
    return tensor
