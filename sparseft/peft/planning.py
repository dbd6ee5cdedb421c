"""Which entries of which layers a configuration means in a model: decided before it is changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.adapter import Adapter
from sparseft.diff import SparsePattern, as_pattern
from sparseft.errors import AttachError, BaseMismatchError, MaskError, OptionError
from sparseft.fingerprint import compare, fingerprint_tensor
from sparseft.modules import ParameterIndex
from sparseft.modules.dequantise import dequantise
from sparseft.modules.names import STATE_KEY, canonical_name
from sparseft.modules.separate import is_opaque, shape_of, why_not_separate
from sparseft.peft.base_samples import check_base, samples_of
from sparseft.peft.config import SparseFtConfig
from sparseft.peft.layer import SparseFtLayer

__all__ = ["Part", "Plan", "plan_layers"]


class Part(NamedTuple):
    """What an adapter has of one parameter.

    Args:
        shape: of the parameter.
        nnz: entries.
        pattern: where; None: as a file will say.
        values: (nnz,) what they start from; None: zeros.
    """

    shape: tuple[int, ...]
    nnz: int
    pattern: SparsePattern | None = None
    values: Tensor | None = None


Plan = dict[str, dict[str, Part]]  # module -> "weight" or "bias" -> part


def plan_layers(config: SparseFtConfig, model: nn.Module) -> Plan:
    """Return the entries of every layer, and note their numbers in the configuration.

    Raises:
        AttachError: a layer that cannot have a diff of its own: tied, of an unknown kind, or
            another method's.
        MaskError, OptionError, UnknownNameError: masks or a selection that do not fit.
        BaseMismatchError: entries of another model, or samples of another base.
    """
    layers = _layers(model)
    masked = next((key for key, module in layers.items() if STATE_KEY in vars(module)), None)
    if masked is not None:
        raise AttachError(
            f"{masked!r} has masks of sparseft.attach, whose values PEFT would freeze without a "
            "word. Detach them first: sparse.detach(restore=False) keeps what was trained."
        )
    entries = None if config._chosen_here else config.entries
    if entries is not None:
        parts = {name: Part(tuple(fact["shape"]), fact["nnz"]) for name, fact in entries.items()}
    elif config.adapter is not None:
        parts = _of_adapter(config, layers)
        config.selection = config.adapter.metadata.method
    elif config.masks is not None:
        parts = _of_masks(config, layers)
        config.selection = ""  # as chosen by the caller
    else:
        _maybe_include_all_linear_layers(config, model)
        parts = _selected(config, model, layers)
    ties = ParameterIndex(model)
    plan: Plan = {}
    for name, part in parts.items():
        _check(name, part, layers, ties)
        _check_not_saved(name, config)
        module, _, attr = name.rpartition(".")
        plan.setdefault(module, {})[attr] = part
    if entries is None:
        config.base_samples = samples_of(layers, parts)
    elif config.base_samples is not None:
        check_base(config.base_samples, layers, parts)
    config.entries = {
        name: {"nnz": part.nnz, "shape": list(part.shape)} for name, part in sorted(parts.items())
    }
    config._chosen_here = any(part.pattern is not None for part in parts.values())
    if config.target_modules is None:
        config.target_modules = set(plan)  # type: ignore[assignment]
    return plan


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the bare model by name, those inside PEFT's layers aside."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for key, module in model.named_modules():
        if not key or any(key.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{key}.")
        found[key] = module
    return found


def _bare(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _shape(module: nn.Module, attr: str) -> tuple[int, ...]:
    bare = _bare(module)
    return shape_of(bare, attr, getattr(bare, attr))


def _check(name: str, part: Part, layers: Mapping[str, nn.Module], ties: ParameterIndex) -> None:
    """Refuse what a layer of ours cannot be put around."""
    key, _, attr = name.rpartition(".")
    module = layers.get(key)
    if module is None or getattr(_bare(module), attr, None) is None:
        raise BaseMismatchError(
            f"the adapter has entries of {name!r}, and the model has no such parameter."
            f"{did_you_mean(key, layers)} Load the base model that it was made on."
        )
    if isinstance(module, BaseTunerLayer) and not isinstance(module, SparseFtLayer):
        raise AttachError(
            f"{key!r} is a {type(module).__module__}.{type(module).__qualname__} already; two "
            "methods of PEFT cannot share a layer. Merge and unload that adapter, or leave the "
            f"layer out: exclude_modules=[{key!r}]."
        )
    bare = _bare(module)
    why = why_not_separate(bare, attr)
    if why is not None:
        raise AttachError(
            f"{name!r} cannot be a target: {why}. Leave it out: exclude_modules=[{key!r}]."
        )
    around = layers.get(key.rpartition(".")[0])
    if isinstance(around, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise AttachError(
            f"{name!r} cannot be a target: in eval mode torch's fast path reads the weight past "
            "its layer, and adapters would silently count for nothing. Switch that off "
            "(torch.backends.mha.set_fastpath_enabled(False)), or train with sparseft.attach."
        )
    shape = _shape(module, attr)
    if shape != part.shape:
        raise BaseMismatchError(
            f"{name!r} has shape {shape} in the model, but {part.shape} in the adapter; load the "
            "base model that it was made on."
        )
    others = ties.aliases(name) if name in ties else []
    if others:
        raise AttachError(
            f"{name!r} is tied to {', '.join(map(repr, others[:3]))}: PEFT changes the output of "
            "one module, and merging would change all of them. Leave it out "
            f"(exclude_modules=[{key!r}]), untie the weights (tie_word_embeddings=False), or train "
            "it with sparseft.attach, which knows ties."
        )


def _check_not_saved(name: str, config: SparseFtConfig) -> None:
    """Refuse a target inside a module that is trained whole."""
    inside = name.split(".")[:-1]
    for whole in config.modules_to_save or ():
        parts = whole.split(".")
        if any(inside[at : at + len(parts)] == parts for at in range(len(inside))):
            raise OptionError(
                f"{name!r} is a target, and {whole!r} in modules_to_save is trained whole; give it "
                f"one of the two, e.g. exclude_modules=[{'.'.join(inside)!r}]."
            )


def _targets(config: SparseFtConfig, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules that ``target_modules`` and its companions mean."""
    return {key: m for key, m in layers.items() if check_target_module_exists(config, key)}


def _within(config: SparseFtConfig, layers: Mapping[str, nn.Module]) -> set[str]:
    return set(layers) if config.target_modules is None else set(_targets(config, layers))


def _of_masks(config: SparseFtConfig, layers: Mapping[str, nn.Module]) -> dict[str, Part]:
    from sparseft.selection import Masks

    masks = config.masks
    if isinstance(masks, str | os.PathLike):
        masks = Masks.load(masks)
    if not isinstance(masks, Mapping):
        raise OptionError(
            f"masks is {type(masks).__name__}, wanted what sparseft.select returns, a mapping from "
            "parameter name to mask, or the path of a file of Masks.save."
        )
    wanted = _within(config, layers)
    parts = {}
    for given, mask in masks.items():
        name = canonical_name(given)
        key, _, attr = name.rpartition(".")
        if key not in wanted and key in layers:
            continue
        if key not in layers or getattr(_bare(layers[key]), attr, None) is None:
            raise MaskError(f"masks: the model has no {name!r}.{did_you_mean(key, layers)}")
        pattern = as_pattern(mask, name=name, shape=_shape(layers[key], attr))
        if pattern.nnz:
            parts[name] = Part(tuple(pattern.shape), pattern.nnz, pattern)
    if not parts:
        raise MaskError("masks: no entry is left for any of the modules that are targets.")
    return parts


def _of_adapter(config: SparseFtConfig, layers: Mapping[str, nn.Module]) -> dict[str, Part]:
    adapter = config.adapter
    if isinstance(adapter, str | os.PathLike):
        adapter = config.adapter = Adapter.load(adapter)
    if not isinstance(adapter, Adapter):
        raise OptionError(
            f"adapter is {type(adapter).__name__}, wanted a sparseft.Adapter or the path of one."
        )
    wanted = _within(config, layers)
    _check_base(adapter, layers)
    parts = {}
    for name, diff in adapter.items():
        if not diff.nnz or (name.rpartition(".")[0] not in wanted and config.target_modules):
            continue
        if diff.mode != "add":
            raise OptionError(
                f"adapter: {name!r} has mode 'set' (it replaces weights), and PEFT's adapters add. "
                "Extract it in mode 'add', or apply it with sparseft.Composer."
            )
        parts[name] = Part(tuple(diff.shape), diff.nnz, diff.pattern, diff.values)
    if not parts:
        raise OptionError(f"adapter: {adapter!r} has no entries for the modules that are targets.")
    if config.modules_to_save is None and adapter.dense:
        config.modules_to_save = sorted({name.rpartition(".")[0] for name in adapter.dense})
    return parts


def _check_base(adapter: Adapter, layers: Mapping[str, nn.Module]) -> None:
    """Compare the base weights with those that the adapter was made on, where both are known."""
    if adapter.metadata.fingerprint is None:
        return
    for name, wanted in adapter.metadata.fingerprint.tensors.items():
        key, _, attr = name.rpartition(".")
        layer = layers.get(key)
        tensor = None if layer is None else getattr(_bare(layer), attr, None)
        if tensor is None or is_opaque(tensor) or tensor.is_meta:
            continue  # quantised since, or not there, which is said elsewhere
        if isinstance(layer, SparseFtLayer) and layer.merged:
            continue
        got = fingerprint_tensor(name, tensor)
        if compare(wanted, got) == "different":
            raise BaseMismatchError(
                f"{name!r} is not the base tensor the adapter was made on: the adapter has "
                f"{wanted}, the model {got}. Load the base model it names."
            )


def _candidates(
    config: SparseFtConfig, layers: Mapping[str, nn.Module]
) -> Iterator[tuple[str, nn.Module, str]]:
    for key, module in _targets(config, layers).items():
        for attr in ("weight", "bias") if config.biases else ("weight",):
            bare = _bare(module)
            if getattr(bare, attr, None) is not None:
                yield f"{key}.{attr}", bare, attr
            elif attr == "weight":
                raise AttachError(
                    f"target {key!r} is a {type(bare).__qualname__}, which has no weight. Name the "
                    "layers below it, or leave it out: exclude_modules."
                )


def _selected(
    config: SparseFtConfig, model: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[str, Part]:
    """Run the selection over the targets alone."""
    from sparseft.selection import Masks, select

    found: dict[str, Tensor] = {}
    ties = ParameterIndex(model)
    for name, bare, attr in _candidates(config, layers):
        tensor: Tensor = getattr(bare, attr)
        shape = shape_of(bare, attr, tensor)
        _check(name, Part(shape, 1), layers, ties)
        if config.selection == "random":  # needs shapes alone: no weight is read or unpacked
            tensor = torch.zeros((), device=tensor.device).expand(shape)
        elif is_opaque(tensor):
            tensor = dequantise(bare, attr)
        found[name] = tensor
    if not found:
        return {}  # PEFT says why, with what was excluded
    wanted: dict[str, Any] = {"density": config.density, "nnz": config.nnz, "scope": config.scope}
    options = {"seed": config.seed, **wanted, **config.selection_options}
    try:
        masks: Masks = select(_stand_in(found), config.selection, **options)
    except OptionError as bad:
        raise OptionError(
            f"SparseFtConfig(selection={config.selection!r}): {bad} What the configuration has no "
            f"place for (batches, a base, ...) is chosen first and given: SparseFtConfig(masks="
            f"sparseft.select(model, {config.selection!r}, ...))."
        ) from None
    return {
        name: Part(tuple(pattern.shape), pattern.nnz, pattern)
        for name, pattern in masks.items()
        if pattern.nnz
    }


def _stand_in(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a module that has just these parameters, under these names."""
    root: Any = nn.Module()
    for name, tensor in tensors.items():
        *path, attr = name.split(".")
        node = root
        for part in path:
            # Past add_module: a layer may be called like an attribute of nn.Module.
            node = node._modules.setdefault(part, nn.Module())
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
        node._parameters[attr] = parameter
    return root
