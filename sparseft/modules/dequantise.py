"""Quantised weights of other libraries: which they are, their logical shape, their dense values.

The one place that knows bitsandbytes (4 and 8 bits) and torchao. Nothing of either is imported
before a weight of its kind is met, and nothing here changes a value.

A packed tensor's own shape and dtype say nothing: 4-bit weights are (numel / 2, 1) of uint8. Shapes
come from the quantisation state, or from the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import AttachError

__all__ = [
    "dequantise",
    "drop_scales",
    "is_opaque",
    "is_quantised",
    "keep_all_trainable",
    "keep_trainable",
    "let_repack",
    "logical_shape",
    "scheme_of",
    "stored_tensors",
    "take_stored",
]

_KNOWN = "bitsandbytes' Params4bit and Int8Params, and torchao's tensors"


def is_opaque(weight: Tensor) -> bool:
    """Whether a weight's entries cannot be read as they are: quantised, packed, or a subclass.

    Floating types of one byte go with scales, and torch has no arithmetic for them.
    """
    plain = weight.is_floating_point() and weight.dtype.itemsize > 1
    return not plain or type(weight) not in (Tensor, nn.Parameter)


def _kind(weight: Tensor | None) -> str | None:
    """Return which of the known classes a weight is of: "bnb4", "bnb8", "torchao" or None."""
    for cls in type(weight).__mro__:
        library = cls.__module__.partition(".")[0]
        if library == "torchao" and hasattr(weight, "dequantize"):
            return "torchao"
        if library == "bitsandbytes" and cls.__name__ in ("Params4bit", "Int8Params"):
            return {"Params4bit": "bnb4", "Int8Params": "bnb8"}[cls.__name__]
    return None


def scheme_of(module: nn.Module, attr: str = "weight") -> str | None:
    """Return how a weight is quantised, e.g. ``"bnb.nf4"`` or ``"torchao.Int8Tensor"``.

    None for plain weights, and for those that no library known here has quantised (yet): a
    ``Linear4bit`` before it is moved to a device holds plain values.
    """
    weight = _weight(module, attr)
    kind = _kind(weight)
    if kind == "bnb4":
        state = _state_of_4bit(module, weight)
        return None if state is None else f"bnb.{state.quant_type}"
    if kind == "bnb8":
        return "bnb.int8" if weight.dtype == torch.int8 else None
    return f"torchao.{type(weight).__name__}" if kind == "torchao" else None


def is_quantised(module: nn.Module, attr: str = "weight") -> bool:
    """Whether `dequantise` has something to do: a weight of a known library, quantised by now."""
    return scheme_of(module, attr) is not None


def logical_shape(module: nn.Module, attr: str = "weight") -> tuple[int, ...]:
    """Return the shape of a weight's dense value, whatever it is packed into.

    Masks, diffs and adapters have this shape.
    """
    weight = _weight(module, attr)
    kind = _kind(weight)
    if kind == "bnb4":
        state = _state_of_4bit(module, weight)
        if state is not None:
            return tuple(int(n) for n in state.shape)
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    packed = kind != "torchao" and is_opaque(weight)
    if packed and attr == "weight" and all(isinstance(size, int) for size in sizes):
        return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]
    return tuple(weight.shape)


def dequantise(
    module: nn.Module, attr: str = "weight", dtype: torch.dtype | None = None, *, name: str = ""
) -> Tensor:
    """Return the dense value of a weight, quantised or not: `logical_shape`, detached.

    Args:
        module: the layer that has the weight; scales may be kept there and not with the weight.
        attr: its attribute.
        dtype: wanted; None: fp32 for bitsandbytes, the tensor's own dtype for torchao, a plain
            weight's own.
        name: of the parameter, for messages.

    Raises:
        AttachError: a weight of no known kind, or one whose library has not quantised it yet; the
            message names it.

    Numerics: code times scale in fp32 for bitsandbytes, then one rounding to ``dtype``; torchao's
        ``dequantize()``, rounded to the tensor's dtype, then to ``dtype``.

    A plain weight of the wanted dtype is returned as it is, not copied.
    """
    weight = _weight(module, attr)
    kind = _kind(weight)
    with torch.no_grad():
        if kind == "bnb4":
            dense = _dequantise_4bit(module, attr, name or attr)
        elif kind == "bnb8":
            dense = _dequantise_8bit(module, weight, name or attr)
        elif kind == "torchao":
            dense = weight.detach().dequantize()
        elif is_opaque(weight):
            raise AttachError(
                f"{name or attr!r} of a {type(module).__qualname__} is a {type(weight).__name__} "
                f"of {weight.dtype}, whose dense value is unknown here; known are {_KNOWN}. Load "
                "the model with one of those, or without quantisation."
            )
        else:
            dense = weight.detach()
        return dense if dtype is None else dense.to(dtype)


def stored_tensors(module: nn.Module, attr: str = "weight", *, name: str = "") -> dict[str, Tensor]:
    """Return every tensor that makes up a quantised weight, by name, in a fixed order.

    Codes and scales as the library stores them; what a CPU layer repacked for inference comes in
    the layout of before.

    Raises:
        AttachError: as `dequantise`, and for plain weights.
    """
    weight = _weight(module, attr)
    kind = _kind(weight)
    if kind == "bnb4":
        packed, state = _codes_of_4bit(module, attr, name or attr)
        found = {"codes": packed, "absmax": state.absmax, "quant_map": state.code}
        if state.nested:
            found |= {
                "nested_absmax": state.state2.absmax,
                "nested_quant_map": state.state2.code,
                "nested_offset": state.offset,
            }
        return found
    if kind == "bnb8":
        return {"codes": weight.data, "scales": _scales_of_8bit(module, weight, name or attr)}
    if kind == "torchao":
        names, _ = weight.__tensor_flatten__()
        return {n: getattr(weight, n) for n in sorted(names)}
    raise AttachError(
        f"{name or attr!r} is a {type(weight).__name__} of {weight.dtype}, which is not quantised "
        f"in a way known here ({_KNOWN})."
    )


def drop_scales(module: nn.Module, state_dict: Any, prefix: str) -> None:
    """Take what a quantised layer keeps beside its weight out of a state dict."""
    if module._parameters.get("weight") is None or not is_quantised(module):
        return
    for key in ("SCB", "weight_format"):
        state_dict.pop(prefix + key, None)
    for key in [key for key in state_dict if key.startswith(f"{prefix}weight.")]:
        del state_dict[key]


def take_stored(module: nn.Module, attr: str, state_dict: Any, prefix: str) -> str | None:
    """Take the entries of a quantised weight out of a state dict, and compare them with its own.

    Args:
        module, attr: the weight.
        state_dict: with keys of ``module.state_dict(prefix=prefix)``; changed.
        prefix: of the module.

    Returns:
        The key of the first entry that is another, None where all are the same or none is there.
    """
    stored = stored_tensors(module, attr).items()
    mine = {_KEYS.get(n, n): t for n, t in stored if n not in _INSIDE}
    given = {
        k: state_dict.pop(prefix + k) for k in ("SCB", "weight_format") if prefix + k in state_dict
    }
    for key in [k for k in state_dict if k.startswith(f"{prefix}{attr}.")]:
        given[key[len(prefix + attr) + 1 :]] = state_dict.pop(key)
    weight = state_dict.pop(prefix + attr, None)
    if weight is None:
        return None  # none is there, or a compact checkpoint
    if _kind(weight) == "torchao":
        names, _ = weight.__tensor_flatten__()
        given = {n: getattr(weight, n) for n in names}
    else:
        given["codes"] = weight.data
    for key, tensor in mine.items():
        other = given.get(key)
        if not isinstance(other, Tensor) or not _same(tensor, other):
            return prefix + (attr if key in ("codes", "SCB") else f"{attr}.{key}")
    return None


# What state dicts call them.
_KEYS = {"scales": "SCB"}
_INSIDE = ("nested_offset",)  # of the quant_state that bitsandbytes packs as text


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b.to(a.device))


def _weight(module: nn.Module, attr: str) -> Any:
    for table in (module._parameters, module._buffers):  # of a scripted module no dicts
        if attr in table and table[attr] is not None:
            return table[attr]
    raise AttachError(f"a {type(module).__qualname__} has no parameter or buffer {attr!r}.")


# bitsandbytes, 4 bits.


def _state_of_4bit(module: nn.Module, weight: Any) -> Any:
    # FSDP loses the parameter's own; the layer keeps it, too.
    return getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)


def _packed_for_cpu(state: Any) -> bool:
    """Whether bitsandbytes has repacked a 4-bit weight for inference on a CPU with AVX512-BF16.

    It does so at the first forward in eval mode whose input needs no gradient. Scales are bf16 from
    then on, and there is no backward.
    """
    return bool(getattr(state, "packing_format_for_cpu", False))


def _unpacked(weight: Any, state: Any) -> tuple[Tensor, Any]:
    """Return codes and state of such a weight in the layout of before, as new objects.

    The library's own way back is not used: of bitsandbytes 0.50 it leaves the scales transposed, or
    quantises them again. Scales keep their bf16 values, in fp32, so `dequantise` gives the same.
    """
    state = copy.copy(state)
    rows, half = weight.shape
    # (rows / 32, half, 64) nibbles: 32 low ones, then 32 high ones, of 32 rows at a time.
    packed = weight.data.reshape(-1, 32)
    nibbles = torch.cat([packed & 0xF, packed >> 4], dim=-1).view(rows // 32, half, 32, 2)
    nibbles = nibbles.transpose(1, 2).reshape(-1, 2)
    codes = ((nibbles[:, 0] << 4) | nibbles[:, 1]).view(state.original_qshape)
    if (storage := getattr(state, "original_storage_type", None)) is not None:
        codes = codes.view(storage)
    state.absmax = state.absmax.t().reshape(-1).float()
    state.dtype, state.nested, state.packing_format_for_cpu = state.original_dtype, False, False
    state.state2 = state.offset = None
    return codes, state


def keep_trainable(module: nn.Module, attr: str = "weight") -> bool:
    """Keep a 4-bit layer from repacking its weight for inference, and undo it where it has.

    Repacked, it cannot train; undone, its dense value is what it was repacked. Does nothing to
    other layers.

    Returns:
        Whether `let_repack` is to be called afterwards.
    """
    weight = _weight(module, attr)
    if _kind(weight) != "bnb4":
        return False
    state = _state_of_4bit(module, weight)
    if _packed_for_cpu(state):
        weight.data, weight.quant_state = _unpacked(weight, state)
        module.quant_state = weight.quant_state
    repacks = getattr(module, _REPACKS, False)
    if repacks:
        module.__dict__[_REPACKS_LATER] = repacks
        setattr(module, _REPACKS, False)
    return bool(repacks)


def keep_all_trainable(model: nn.Module) -> list[Callable[[], None]]:
    """Call `keep_trainable` on every layer of a model.

    Backward has to pass layers that are not trained, too: through a repacked one comes a gradient
    of zeros, and only a warning of torch's.

    Returns:
        What undoes it, for each layer that was changed; copied together with the model, they act on
        the copy.
    """
    layers = [m for m in model.modules() if _kind(m._parameters.get("weight")) == "bnb4"]
    return [partial(let_repack, layer) for layer in layers if keep_trainable(layer)]


def let_repack(module: nn.Module) -> None:
    """Undo `keep_trainable`: inference may repack the weight again."""
    if _REPACKS_LATER in module.__dict__:
        setattr(module, _REPACKS, module.__dict__.pop(_REPACKS_LATER))


_REPACKS, _REPACKS_LATER = "support_avx512bf16_for_cpu", "_sparseft_repacks"


def _codes_of_4bit(module: nn.Module, attr: str, name: str) -> tuple[Tensor, Any]:
    weight = _weight(module, attr)
    state = _state_of_4bit(module, weight)
    if state is None:
        raise AttachError(
            f"{name!r} is a 4-bit weight of bitsandbytes that is not quantised yet: it is when the "
            "layer is moved to a device. Call model.to(device) first."
        )
    return _unpacked(weight, state) if _packed_for_cpu(state) else (weight.data, state)


def _dequantise_4bit(module: nn.Module, attr: str, name: str) -> Tensor:
    from bitsandbytes import functional

    packed, state = _codes_of_4bit(module, attr, name)
    wide = copy.copy(state)
    wide.dtype = torch.float32
    return functional.dequantize_4bit(packed, wide).view(tuple(state.shape))


# bitsandbytes, 8 bits.


def _scales_of_8bit(module: nn.Module, weight: Any, name: str) -> Tensor:
    # With the weight until the layer's first forward, in the layer's state afterwards.
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if weight.dtype != torch.int8 or scales is None:
        how = "keeps fp16 weights" if getattr(weight, "has_fp16_weights", False) else "is not there"
        raise AttachError(
            f"{name!r} is an 8-bit weight of bitsandbytes whose int8 form {how} yet. Make the "
            "layer with has_fp16_weights=False and call model.to(device) first."
        )
    return scales.to(weight.device)


def _dequantise_8bit(module: nn.Module, weight: Any, name: str) -> Tensor:
    scales = _scales_of_8bit(module, weight, name)
    return weight.data.float() * (scales.float() * (1.0 / 127.0)).view(-1, 1)
