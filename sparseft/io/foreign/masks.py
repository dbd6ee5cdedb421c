"""Dense boolean masks: ``torch.save({module or parameter: bool tensor})``, or the same safetensors.

RoSA writes such files (``mask_save_path``), and it is what people save by hand. A mask says where
and not what, so what comes out depends on what is given:

- masks alone: the patterns, which `sparseft.select(model, "file", path=...)` and
  `sparseft.selection.Masks.load` take once ``sparseft convert`` has written them compactly;
- masks, base and tuned model: an adapter of the differences ``tuned - base`` at the masks.

`Adapter.load` of masks alone is an error: an adapter without values would be a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparseft.diff import SparseDiff, SparsePattern
from sparseft.errors import AdapterFormatError, BaseMismatchError, OptionError
from sparseft.io.foreign.base import Base, BaseLike
from sparseft.io.foreign.found import Conversion, Found
from sparseft.io.foreign.names import parameter_name
from sparseft.io.foreign.peft import adapter_from

__all__ = ["is_masks", "is_ours", "patterns", "read"]

_PARAMETERS = ("weight", "bias")


def is_masks(state: object) -> bool:
    """Whether the contents of a pickle look like this format."""
    return (
        isinstance(state, dict)
        and bool(state)
        and all(isinstance(t, Tensor) and t.dtype == torch.bool for t in state.values())
    )


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is one of `sparseft.selection.Masks.save`."""
    return set(metadata) == {"shapes"}


def _name(found: Found, key: str, mask: Tensor) -> str:
    """Return the parameter a mask is for: ``key`` may name it, or its module."""
    last = key.rpartition(".")[2]
    # Only matrices are named by their module; a vector's name is its own.
    named = last in _PARAMETERS or last.endswith(("_weight", "_bias")) or mask.dim() < 2
    if found.given_base is not None:
        known = set(found.given_base.names())
        named = parameter_name(key) in known or (
            named and parameter_name(key, module=True) not in known
        )
    return found.parameter(key, module=not named)


def patterns(found: Found) -> dict[str, SparsePattern]:
    """Read masks.

    Returns:
        Parameter name -> pattern, in order of names.

    Raises:
        AdapterFormatError: damaged or hostile, two masks of one parameter; names the tensor.
        BaseMismatchError: a mask whose shape is not that of the base's parameter.
    """
    masks: dict[str, SparsePattern] = {}
    for key, mask in found.tensors.items():
        if mask.dtype != torch.bool:
            found.fail(f"{key[:200]!r} is {mask.dtype}, wanted torch.bool (True = trainable).")
        name = _name(found, key, mask)
        if name in masks:
            found.fail(f"two masks of parameter {name!r}.")
        if found.given_base is not None:
            shape = found.given_base.shape(name, found.what(key))
            if shape != tuple(mask.shape):
                raise BaseMismatchError(
                    f"{found.what(key)} has shape {tuple(mask.shape)}, but {name!r} of base "
                    f"{found.given_base.label} has {shape}."
                )
        masks[name] = SparsePattern.from_mask(mask)
    if not masks:
        found.fail("holds no masks.")
    return dict(sorted(masks.items()))


def read(found: Found, *, tuned: BaseLike = None) -> Conversion:
    """Make an adapter of masks and two models: fp32 differences at the masks.

    Args:
        found: the masks.
        tuned: the fine-tuned model, as `Base` takes it; the base is given as for other formats.

    Raises:
        OptionError: base or tuned model is missing, or has no weights.
    """
    base = found.given_base
    if tuned is None or base is None:
        raise OptionError(
            f"{found.file} holds masks: where, but not what. `sparseft convert {found.path} "
            "masks.safetensors` makes masks for select(model, 'file', path=...) of it; with --base "
            "and --tuned it makes an adapter of the differences."
        )
    after = tuned if isinstance(tuned, Base) else Base(tuned)
    diffs: dict[str, SparseDiff] = {}
    for name, pattern in patterns(found).items():
        at = pattern.indices.long()
        before_after = [model.tensor(name) for model in (base, after)]
        for model, tensor in zip((base, after), before_after, strict=True):
            if tensor is None or tuple(tensor.shape) != tuple(pattern.shape):
                got = "no weights" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise OptionError(
                    f"{model.label} has {got} for {name!r}, wanted those of a mask of shape "
                    f"{tuple(pattern.shape)}. Give a folder with model.safetensors."
                )
        old, new = (t.detach().cpu().reshape(-1) for t in before_after if t is not None)
        values = new[at].float() - old[at].float()
        if not bool(torch.isfinite(values).all()):
            raise AdapterFormatError(f"{name!r}: a difference at the mask is not finite.")
        diffs[name] = SparseDiff.from_pattern(pattern, values)
    adapter = adapter_from(found, diffs, {}, method="masks")
    return Conversion(adapter, found.format, found.nbytes)
