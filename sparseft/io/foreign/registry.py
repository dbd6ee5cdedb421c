"""Which formats there are, which one lies at a path, and reading and writing by name."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparseft._registry import Registry
from sparseft._text import did_you_mean
from sparseft.adapter import Adapter
from sparseft.diff import SparsePattern
from sparseft.errors import AdapterFormatError, BaseMismatchError, OptionError, UnknownNameError
from sparseft.fingerprint import Fingerprint, fingerprint_tensor
from sparseft.io.configs import read_json_object
from sparseft.io.foreign import (
    composable_sft,
    lora,
    masks,
    peft_shira,
    peft_sparseft,
    peft_supertuning,
    rosa,
    spiel,
)
from sparseft.io.foreign.base import Base, BaseLike
from sparseft.io.foreign.found import Conversion, Found, Written
from sparseft.io.foreign.peft import CONFIG_FILE, WEIGHTS_FILES
from sparseft.io.pickles import is_pickle
from sparseft.io.safetensors_v1 import DEFAULT_FILE

__all__ = ["FORMATS", "detect", "load", "read", "read_masks", "without", "writable", "write"]

FORMATS = Registry("adapter format")

for _name, _reference, _read, _traits in (
    (
        "composable-sft",
        "https://github.com/cambridgeltl/composable-sft",
        composable_sft.read,
        {"write": composable_sft.write},
    ),
    ("spiel", "https://github.com/AlanAnsell/peft", spiel.read, {"write": spiel.write}),
    (
        "peft-shira",
        "https://huggingface.co/docs/peft/package_reference/shira",
        peft_shira.read,
        {"write": peft_shira.write},
    ),
    (
        "peft-sparseft",
        "https://huggingface.co/docs/peft/developer_guides/custom_models",
        peft_sparseft.read,
        {"write": peft_sparseft.write},
    ),
    (
        "peft-supertuning",
        "https://arxiv.org/abs/2607.09287",
        peft_supertuning.read,
        {"write": peft_supertuning.write},
    ),
    ("rosa", "https://github.com/IST-DASLab/peft-rosa", rosa.read, {}),
    ("lora", "https://huggingface.co/docs/peft/package_reference/lora", lora.read, {}),
    ("masks", "https://github.com/IST-DASLab/peft-rosa", masks.read, {}),
):
    FORMATS.register(_name, reference=_reference, **_traits)(_read)

# `peft_type` of a configuration -> our name of the format.
_PEFT_TYPES = {
    "LORA": "lora",
    "ROSA": "rosa",
    "SFT": "spiel",
    "SHIRA": "peft-shira",
    "SPARSEFT": "peft-sparseft",
    "SUPERTUNING": "peft-supertuning",
}
# Why the other kinds of PEFT have no sparse form; the rest are said to be unknown.
_NOT_SPARSE = {
    "ADALORA": "a low-rank change with trained singular values",
    "IA3": "it rescales whole activations",
    "LN_TUNING": "it stores whole tensors",
    "PREFIX_TUNING": "it adds virtual tokens, not a change of weights",
    "PROMPT_TUNING": "it adds virtual tokens, not a change of weights",
    "P_TUNING": "it adds virtual tokens, not a change of weights",
    "TRAINABLE_TOKENS": "it replaces rows of an embedding by value",
}


def writable() -> list[str]:
    """Return the names of the formats that can be written."""
    return [name for name in FORMATS.names() if "write" in FORMATS.get(name).traits]


def detect(path: str | os.PathLike[str], *, base: BaseLike = None) -> Found | None:
    """Say which foreign adapter lies at ``path``.

    Args:
        path: a folder, or a file in one.
        base: as in `read`.

    Returns:
        What was found, or None if nothing there is of a known format (one of our own, say).

    Raises:
        AdapterFormatError: an adapter of PEFT that has no sparse form, masks of our own, or a
            pickle that is damaged, hostile, or of no known format.
    """
    where = Path(path)
    given = None if base is None else (base if isinstance(base, Base) else Base(base))
    if where.is_dir():
        if (where / DEFAULT_FILE).is_file():
            return None
        if (where / composable_sft.DIFF_FILE).is_file():
            return Found(where, where / composable_sft.DIFF_FILE, "composable-sft", base=given)
        if (where / CONFIG_FILE).is_file():
            return _peft(where, where / CONFIG_FILE, None, given)
        return None
    if not where.is_file() or where.name == DEFAULT_FILE:
        return None
    config = where.with_name(CONFIG_FILE)
    if where.name == CONFIG_FILE or (where.name in WEIGHTS_FILES and config.is_file()):
        return _peft(where, config, None if where.name == CONFIG_FILE else where, given)
    if where.suffix == ".safetensors":
        found = Found(where, where, "masks", base=given)
        # Our own files never hold a bool tensor, so one look is enough to tell them apart.
        try:
            tensors = found.tensors
            first = next(iter(tensors.values()), None)
        except AdapterFormatError:
            return None
        if masks.is_ours(getattr(tensors, "metadata", {})):
            found.fail(
                "holds masks, which say where and not what: no adapter, and nothing to convert. "
                "select(model, 'file', path=...) trains at these entries, Masks.load reads them; "
                "`sparseft diff` makes an adapter of two models."
            )
        return found if first is not None and masks.is_masks({"first": first}) else None
    if not is_pickle(where):
        return None
    found = Found(where, where, base=given)
    if composable_sft.is_composable_sft(found.pickle):
        found.format = "composable-sft"
    elif masks.is_masks(found.pickle):
        found.format = "masks"
    else:
        held = found.pickle
        some = (
            ", ".join(repr(str(k)[:40]) for k in list(held)[:3]) if isinstance(held, dict) else ""
        )
        found.fail(
            f"a file of torch.save of no known format (it holds a {type(held).__name__}"
            f"{f' with {some}' if some else ''}). Known are composable-sft's pytorch_diff.bin, "
            "PEFT's adapter_model.bin beside its adapter_config.json, and masks by name."
        )
    return found


def _peft(path: Path, config_file: Path, file: Path | None, base: Base | None) -> Found:
    config = read_json_object(config_file)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterFormatError(f"{config_file} has no peft_type; it is no configuration of PEFT.")
    if kind.upper() not in _PEFT_TYPES:
        why = _NOT_SPARSE.get(kind.upper(), "this reader does not know what its tensors mean")
        raise AdapterFormatError(
            f"{config_file}: peft_type {kind[:40]!r} cannot be represented as sparse diffs: {why}. "
            f"Read are {', '.join(sorted(_PEFT_TYPES))}."
        )
    files = [config_file.with_name(name) for name in WEIGHTS_FILES]
    weights = file or next((f for f in files if f.is_file()), None)
    if weights is None:
        raise AdapterFormatError(
            f"{config_file} has neither {' nor '.join(WEIGHTS_FILES)} beside it; copy or download "
            "the whole folder."
        )
    return Found(path, weights, _PEFT_TYPES[kind.upper()], config, base)


def read(
    source: str | os.PathLike[str] | Found,
    *,
    base: BaseLike = None,
    name: str | None = None,
    **options: Any,
) -> Conversion:
    """Read a foreign adapter.

    Args:
        source: folder or file, or what `detect` found there.
        base: the base model it belongs to, as `Base` takes it. Formats without shapes need it
            unless their configuration names one that is here; the others are checked against it.
            Where it has weights, the adapter keeps their fingerprint.
        name: of the adapter; default: the folder's.
        options: the format's own (``FORMATS.get(format).options``), e.g. ``density`` for LoRA.

    Raises:
        FileNotFoundError: nothing there.
        AdapterFormatError: no foreign adapter, damaged, hostile, or not representable; says why.
        BaseMismatchError: it does not fit ``base``.
        OptionError: a base or an option is needed.
        UnknownNameError: an option that the format does not have.
    """
    if isinstance(source, Found):
        found: Found | None = source
    else:
        if not Path(source).exists():
            raise FileNotFoundError(f"nothing to convert at {source}: the path does not exist.")
        found = detect(source, base=base)
    if found is None:
        raise AdapterFormatError(
            f"{source} holds no adapter of a known foreign format ({', '.join(FORMATS.names())}): "
            f"no {composable_sft.DIFF_FILE}, no {CONFIG_FILE}, no file of boolean masks."
        )
    FORMATS.check_options(found.format, options)
    conversion: Conversion = FORMATS.get(found.format).fn(found, **options)
    if name is not None:
        conversion.adapter.name = name
    if found.given_base is not None:
        _check_base(found, conversion.adapter, found.given_base)
    return conversion


def load(path: str | os.PathLike[str], device: torch.device) -> Adapter | None:
    """Return the foreign adapter at ``path``, None if there is none; for `Adapter.load`."""
    found = detect(path)
    if found is None:
        return None
    adapter = read(found).adapter
    return adapter if device.type == "cpu" else adapter.to(device)


def _check_base(found: Found, adapter: Adapter, base: Base) -> None:
    """Compare shapes with the base that was given, and keep its fingerprint."""
    prints = {}
    for name in adapter.names:
        shape, wanted = tuple(adapter.header(name).shape), base.shape(name, found.what(name))
        if shape != wanted:
            raise BaseMismatchError(
                f"{found.what(name)} has shape {shape}, but base {base.label} has {wanted}; it "
                "belongs to another base."
            )
        tensor = base.tensor(name)
        if tensor is not None and tensor.is_floating_point():
            prints[name] = fingerprint_tensor(name, tensor)
    if prints:
        adapter.metadata = replace(adapter.metadata, fingerprint=Fingerprint(prints))
    if base.name is not None:
        adapter.metadata = replace(adapter.metadata, base_name=base.name)


def read_masks(
    source: str | os.PathLike[str] | Found, *, base: BaseLike = None
) -> dict[str, SparsePattern]:
    """Read a file of dense boolean masks.

    Args:
        source: the file, or what `detect` found there.
        base: decides whether a name is a parameter's or its module's, and checks shapes.

    Returns:
        Parameter name -> pattern.

    Raises:
        AdapterFormatError: no masks, damaged or hostile.
    """
    found = source if isinstance(source, Found) else detect(source, base=base)
    if found is None or found.format != "masks":
        raise AdapterFormatError(f"{source} holds no boolean masks.")
    return masks.patterns(found)


def without(adapter: Adapter, exclude: Sequence[str]) -> Adapter:
    """Return ``adapter`` without the tensors whose names match a glob.

    Raises:
        UnknownNameError: a pattern that matches nothing.
    """
    every = [*adapter.names, *adapter.dense]
    dropped: set[str] = set()
    for pattern in exclude:
        hit = fnmatch.filter(every, pattern)
        if not hit:
            raise UnknownNameError(
                f"exclude: {pattern!r} matches none of {len(every)} tensors."
                f"{did_you_mean(pattern, every)}"
            )
        dropped.update(hit)
    return Adapter(
        {n: adapter[n] for n in adapter.names if n not in dropped},
        name=adapter.name,
        dense={n: t for n, t in adapter.dense.items() if n not in dropped},
        metadata=adapter.metadata,
    )


def write(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str,
    *,
    base: BaseLike = None,
    overwrite: bool = False,
    exclude: Sequence[str] = (),
) -> Written:
    """Write an adapter in a foreign format.

    Args:
        adapter: to be written.
        path: folder to make.
        format: one of `writable()`.
        base: its name goes into a configuration; where its modules are known, what the format
            cannot hold is found out now and not when the file is loaded.
        overwrite: whether files already there may be replaced.
        exclude: globs of tensors to leave out.

    Raises:
        UnknownNameError: no such format, or a glob that matches nothing.
        OptionError: the format is read only.
        AdapterFormatError: something the format cannot hold; says what and why.
        FileExistsError: files are there, and ``overwrite`` is False.
    """
    entry = FORMATS.get(format)
    if "write" not in entry.traits:
        raise OptionError(f"{format} is read, not written. Written are {', '.join(writable())}.")
    known = None if base is None else (base if isinstance(base, Base) else Base(base))
    smaller = without(adapter, exclude) if exclude else adapter
    written: Written = entry.traits["write"](smaller, Path(path), base=known, overwrite=overwrite)
    left = len(adapter) + len(adapter.dense) - len(smaller) - len(smaller.dense)
    if left:
        more = f"{left} tensors were left out (--exclude)"
        written = replace(written, lost=(*written.lost, more))
    return written
