"""What cannot have a mask, each refused by name with the reason and the way out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparseft.adapter import Adapter
from sparseft.errors import AttachError
from sparseft.modules.class_swap import masked_attributes
from sparseft.modules.leaves import leaf_attribute
from sparseft.modules.names import ParameterIndex, end_embeddings
from sparseft.modules.separate_mask import check_separable
from sparseft.modules.weight_storage import is_sharded

__all__ = ["check_maskable", "check_masks", "check_overlaps", "check_ties"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_masks(given: object) -> None:
    """Raise AttachError for masks that are a path, a tensor, a list of names."""
    if isinstance(given, Mapping | Adapter):
        return
    if isinstance(given, str | os.PathLike):
        got, path = f"the path {os.fspath(given)!r}", repr(os.fspath(given))
        fix = (
            f"Masks in a file: sparseft.select(model, method='file', path={path}). An adapter, "
            f"its values too: sparseft.Adapter.load({path})."
        )
    else:
        got = type(given).__name__
        fix = "sparseft.select makes such a mapping."
    raise AttachError(
        f"masks is {got}, wanted a mapping from parameter name to mask (a bool tensor or a "
        f"SparsePattern), or an Adapter. {fix}"
    )


def check_maskable(name: str, parameter: nn.Parameter, owners: list[tuple[nn.Module, str]]) -> None:
    """Raise AttachError if a mask on this parameter would not train it exactly.

    Args:
        name: canonical name.
        parameter: the weight.
        owners: every (module, attribute) that holds it.
    """
    for module, attr in owners:
        if attr in masked_attributes(module):
            raise AttachError(
                f"{name!r} has a mask attached already. detach() that one first; one mask can hold "
                "the union of both."
            )
    _check_tensor(name, parameter, beside=check_separable(name, owners))
    for module, attr in owners:
        _check_owner(name, module, attr)


def _check_tensor(name: str, parameter: nn.Parameter, *, beside: bool) -> None:
    if is_lazy(parameter):
        raise AttachError(
            f"{name!r} is not initialised yet (a lazy module). Run one batch through the model "
            "first."
        )
    if parameter.is_meta:
        raise AttachError(
            f"{name!r} is on the meta device, so it has no values to train. Load the weights first."
        )
    if parameter.is_inference() or torch.is_inference_mode_enabled():
        raise AttachError(
            f"{name!r} was made, or would get its leaf, under torch.inference_mode, whose tensors "
            "autograd refuses. Load the model and attach outside of it."
        )
    if parameter.dtype.is_complex:
        raise AttachError(
            f"{name!r} is {parameter.dtype}; masks are on real floating weights. Keep it as two "
            "real parameters, or train it through full_params."
        )
    if beside:
        return  # quantised, and left as it is
    plain = type(parameter) is nn.Parameter or _is_fake(parameter)
    # How it is cut, `sparseft.modules.sharding` looks at.
    if is_sharded(parameter):
        rows = cast(Any, parameter).to_local()
        plain = type(rows) is Tensor or _is_fake(rows)
    if not plain or parameter.dtype not in _DTYPES:
        kind = f"{type(parameter).__name__} of {parameter.dtype}"
        raise AttachError(
            f"{name!r} is a {kind}, wanted a plain nn.Parameter of float32, bfloat16, float16 or "
            "float64. Quantised weights get masks where bitsandbytes (it does when the model moves "
            "to a device) or torchao quantised them; for others, load the model without "
            "quantisation."
        )
    if any(n > 1 and s == 0 for n, s in zip(parameter.shape, parameter.stride(), strict=True)):
        raise AttachError(
            f"{name!r} of shape {tuple(parameter.shape)} is expanded (strides "
            f"{parameter.stride()}): its entries share memory. Make it contiguous first."
        )


def _is_fake(parameter: Tensor) -> bool:
    """Whether it is a stand-in without memory, of the FakeTensorMode that is active now.

    Under its mode a stand-in goes through every op as a plain weight would; outside, none would.
    """
    from torch._guards import active_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor

    mode = active_fake_mode()
    return mode is not None and isinstance(parameter, FakeTensor) and parameter.fake_mode is mode


def _check_owner(name: str, module: nn.Module, attr: str) -> None:
    kind = type(module).__qualname__
    if isinstance(module, torch.jit.ScriptModule):
        raise AttachError(
            f"{name!r} belongs to a scripted {kind}, which reads its weights where no Python "
            "sees it. Attach to the Python module, before torch.jit."
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        raise AttachError(
            f"{name!r} belongs to a {kind} with max_norm={module.max_norm}, which rescales whole "
            "rows in forward, frozen entries included. Set max_norm=None."
        )
    if hasattr(module, leaf_attribute(attr)):
        raise AttachError(
            f"the {kind} of {name!r} has an attribute {leaf_attribute(attr)!r} of its own, "
            "where its leaf would go. Rename that attribute."
        )


def _extent(t: Tensor) -> tuple[int, int, int]:
    """Return (storage address, first byte, one past the last byte)."""
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    first = int(t.storage_offset()) * t.element_size()
    return t.untyped_storage().data_ptr(), first, first + int(reach) * t.element_size()


def check_overlaps(index: ParameterIndex, names: Iterable[str]) -> None:
    """Raise AttachError if a masked weight shares memory with another parameter object.

    Tied weights are one Parameter under several names and are fine.
    """
    plain = {
        n: p
        for n, p in index.items()
        if type(p) is nn.Parameter and not is_lazy(p) and not p.is_meta and p.numel()
    }
    extents = {n: _extent(p) for n, p in plain.items()}
    neighbours: dict[int, list[str]] = {}
    for name, (storage, _, _) in extents.items():
        neighbours.setdefault(storage, []).append(name)
    for name in names:
        if name not in extents:
            continue
        storage, first, last = extents[name]
        for other in neighbours[storage]:
            if other != name and extents[other][1] < last and first < extents[other][2]:
                a, b = plain[name], plain[other]
                raise AttachError(
                    f"{name!r} ({a.dtype}) and {other!r} ({b.dtype}) share memory but are two "
                    "parameters, so a diff of one would change the other. Tie them by assigning "
                    "one Parameter to both modules, or give each its own memory."
                )


def _declared_ties(model: nn.Module) -> set[tuple[str, str]]:
    """Return pairs of full names that transformers models in here declare to be one parameter."""
    pairs = set()
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        # transformers 5 lists what its config ties; 4 knows input and output embeddings.
        declared = getattr(module, "all_tied_weights_keys", None)
        if isinstance(declared, Mapping):
            pairs |= {(f"{start}{a}", f"{start}{b}") for a, b in declared.items()}
        elif getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            names = {id(m): name for name, m in module.named_modules()}
            found = end_embeddings(module)
            if len(found) == 2 and all(id(m) in names for m in found):
                b, a = (f"{start}{names[id(m)]}.weight" for m in found)
                pairs.add((a, b))
    return pairs


def check_ties(model: nn.Module, index: ParameterIndex, names: Iterable[str]) -> None:
    """Raise AttachError if a masked weight is half of a declared tie that is two dtypes.

    Such a tie is broken: a mask would train one half, and a save or `tie_weights` drop the other.
    """
    masked = set(names)
    for a, b in _declared_ties(model):
        if a not in index or b not in index or index.get(a) is index.get(b):
            continue
        one, two = index.get(a), index.get(b)
        if one.dtype != two.dtype and masked & {index.resolve(a), index.resolve(b)}:
            raise AttachError(
                f"{a!r} is {one.dtype} and {b!r} is {two.dtype}, but the model declares them tied "
                "(config.tie_word_embeddings), so a mask would train one of them alone. Cast the "
                "whole model and call model.tie_weights(), or set config.tie_word_embeddings=False."
            )
