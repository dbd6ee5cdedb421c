"""The model a checkpoint's files belong to, without its weights: a class of transformers on the
meta device, and where in it each tensor of the files goes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft.adapter import Adapter
from sparseft.errors import CompositionError
from sparseft.io.checkpoint_shards import TensorInfo
from sparseft.io.configs import read_config
from sparseft.io.hub import first_line
from sparseft.modules import ParameterIndex
from sparseft.modules.prefixes import find_name

__all__ = ["Places", "Target", "build_target", "find_places", "heads_of"]

# Output layers of transformers' sequence classifiers: one row per label.
_CLASSIFIER_OUTPUTS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")


@dataclass(frozen=True)
class Heads:
    """What the adapters' heads say of the model they belong on.

    Args:
        labels: rows of a classifier's output layer; None without one.
        architecture: class the head was taken from, where an adapter says so.
        id2label: names of its labels, where an adapter says so.
    """

    labels: int | None = None
    architecture: str | None = None
    id2label: Mapping[str, str] | None = None


def heads_of(adapters: Iterable[Adapter]) -> Heads:
    """Look at the dense tensors of adapters, and at what `extract_adapter` noted of them."""
    found = []
    for adapter in adapters:
        noted = adapter.metadata.extra.get("extracted")
        noted = noted if isinstance(noted, dict) and adapter.dense else {}
        rows = [adapter.dense[n].shape[0] for n in _CLASSIFIER_OUTPUTS if n in adapter.dense]
        names = noted.get("id2label")
        heads = Heads(
            int(rows[0]) if rows else None,
            str(noted["architecture"]) if noted.get("architecture") else None,
            {str(k): str(v) for k, v in names.items()} if isinstance(names, dict) else None,
        )
        if rows:  # a classifier before any other head
            return heads
        found.append(heads)
    return next((heads for heads in found if heads.architecture), Heads())


@dataclass(frozen=True)
class Target:
    """The class that the written checkpoint is for.

    Args:
        model: on the meta device, ties resolved.
        own: whether it is the class that the base names itself.
        config: content for ``config.json``; None: the base's as it is.
        dtype: what config.json says the model is loaded in; None: what the files have.
    """

    model: nn.Module
    own: bool
    config: dict[str, Any] | None
    dtype: torch.dtype | None

    def live_dtype(self, info: TensorInfo) -> torch.dtype:
        """Return the dtype of a stored floating parameter in the model.

        What is stored narrower than config.json says (weights published in fp16 of an fp32 model)
        is loaded in that dtype, or an adapter's change would be lost to rounding; what is stored
        wider keeps its own.
        """
        stored = info.torch_dtype or torch.float32
        if self.dtype is not None and torch.promote_types(stored, self.dtype) == self.dtype:
            return self.dtype
        return stored


def class_for(config: Any, architecture: str | None, heads: Heads) -> str:
    """Return the name of the class of transformers that base and adapters make up."""
    if architecture is not None:
        return architecture
    if heads.architecture is not None:
        return heads.architecture
    if heads.labels is not None:
        return "AutoModelForSequenceClassification"
    return next(iter(getattr(config, "architectures", None) or ()), None) or "AutoModel"


def build_target(
    folder: Path, architecture: str | None = None, heads: Heads | None = None
) -> Target:
    """Build the class for a base and the heads on it; no weight is read or made.

    Args:
        folder: of the base.
        architecture: class of transformers; default: by the heads, else what the base names.
        heads: of the adapters.

    Raises:
        CompositionError: no such class, a quantised base, or one that transformers cannot
            build.
    """
    import transformers

    content, heads = read_config(folder), heads or Heads()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as bad:
        raise CompositionError(
            f"{folder / 'config.json'}: transformers cannot use it: {first_line(bad)}."
        ) from bad
    if getattr(config, "quantization_config", None) is not None:
        raise CompositionError(
            f"{folder} is quantised; diffs are written into floating weights only. Take the "
            "checkpoint it was quantised from, and quantise the result."
        )
    name = class_for(config, architecture, heads)
    kind: Any = getattr(transformers, name, None)
    if kind is None:
        raise CompositionError(
            f"transformers has no class {name!r}; pass --architecture AutoModelFor... "
            "(architecture=...)."
        )
    labels = heads.labels if "Classification" in name else None
    relabelled = labels is not None and labels != config.num_labels
    if relabelled:
        config.num_labels = labels
    make: Callable[..., Any] = getattr(kind, "from_config", kind)
    options = {"trust_remote_code": False} if hasattr(kind, "from_config") else {}
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: Any = make(config, **options)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as bad:
        raise CompositionError(
            f"transformers cannot build {name} of {folder}: {first_line(bad)}. Pass another "
            "--architecture (architecture=...), or, in Python, the model itself."
        ) from bad
    if not isinstance(model, nn.Module):
        raise CompositionError(
            f"transformers' {name} is no model; pass another --architecture (architecture=...)."
        )
    getattr(model, "tie_weights", lambda: None)()
    found = type(model).__name__
    own = found in (content.get("architectures") or [found])
    named = heads.id2label if heads.id2label and len(heads.id2label) == labels else None
    changed = not own or relabelled
    if changed:
        content["architectures"] = [found]
    if labels is not None and changed and (relabelled or named):
        names = named or {str(i): f"LABEL_{i}" for i in range(labels)}
        content["id2label"] = names
        content["label2id"] = {label: int(i) for i, label in names.items()}
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return Target(model, own, content if changed else None, dtype if known else None)


@dataclass
class Places:
    """Where the tensors of a checkpoint go in a model: a name in the files -> one in the model.

    Args:
        parameters: parameters; the model's name may be an alias of a tied one.
        buffers: the rest of its state.
        converted: tensors that transformers puts together with others when it loads them, and the
            parameter they become a part of.
        nowhere: tensors that the model does not have.
    """

    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    nowhere: list[str] = field(default_factory=list)

    def missing(self, model: nn.Module, index: ParameterIndex) -> list[str]:
        """Return canonical names that no tensor of the files is for, and that should be there."""
        there = {index.resolve(n) for n in self.parameters.values()}
        there |= {index.resolve(n) for n in self.converted.values() if n in index}
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        return [n for n in index if n not in there and not any(re.search(p, n) for p in ignored)]


def find_places(model: nn.Module, index: ParameterIndex, names: Sequence[str]) -> Places:
    """Find the place of every tensor of a checkpoint, as transformers' loader would.

    Args:
        model: the model, on any device.
        index: its parameters.
        names: of the tensors in the files.
    """
    places, rename = Places(), _renaming(model)
    buffers = {name for name, _ in model.named_buffers()}
    for name in names:
        parameter = find_name(model, name, index.__contains__)
        buffer = None if parameter else find_name(model, name, buffers.__contains__)
        converted = False
        if parameter is None and buffer is None:
            other, converted = rename(name)
            if other != name:
                parameter = find_name(model, other, index.__contains__)
        if parameter is not None:
            (places.converted if converted else places.parameters)[name] = parameter
        elif buffer is not None:
            places.buffers[name] = buffer
        else:
            places.nowhere.append(name)
    return places


def _renaming(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """Return how transformers renames a checkpoint's tensor when it loads one, and whether it also
    makes another tensor of it (experts that are stacked, projections that are fused).
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4 knows renaming only
        table = dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})
        table |= {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}

        def by_pattern(name: str) -> tuple[str, bool]:
            for pattern, into in table.items():
                name = re.sub(pattern, into, name, count=1)
            return name, False

        return by_pattern
    if not hasattr(model, "config"):
        return lambda name: (name, False)
    steps = get_model_conversion_mapping(model)
    converters = [s for s in steps if isinstance(s, WeightConverter)]
    renamings = [s for s in steps if not isinstance(s, WeightConverter)]

    def by_steps(name: str) -> tuple[str, bool]:
        for step in renamings:
            name, _ = step.rename_source_key(name)
        for step in converters:
            other, pattern = step.rename_source_key(name)
            if pattern is not None:
                return other, True
        return name, False

    return by_steps
