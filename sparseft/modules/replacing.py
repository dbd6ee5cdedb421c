"""What a module with masks refuses: that a masked weight is replaced, deleted or taken away.

Only what goes through the module can be refused here. What goes around it (``_parameters``,
``weight.data``, another module in its place) `sparseft.modules.placement` notices at the next
optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sparseft.errors import AttachError
from sparseft.modules.leaves import MaskedParameter, leaf_attribute
from sparseft.modules.names import STATE_KEY
from sparseft.modules.weight_storage import is_sharded, own_rows

__all__ = ["RefusesReplacing"]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether one is the other, or an alias of all of it: a transposed view is none."""
    return a is b or (
        not (is_sharded(a) or is_sharded(b))
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    )


class RefusesReplacing(nn.Module):
    """The part of a swapped class that keeps its masked weights the objects they are."""

    def _masks(self) -> dict[str, MaskedParameter]:
        return self.__dict__.get(STATE_KEY, {})

    def __setattr__(self, name: str, value: Any) -> None:
        for attr, masked in self._masks().items():
            if name not in (attr, leaf_attribute(attr)):
                continue
            if masked.shards is not None and name == attr and masked.shards.shows(value):
                self._parameters[name] = value  # cut and whole, around each forward and backward
                return
            current = self._parameters.get(name)
            # Tying code assigns what it read, which may be an alias: nothing to do then.
            tied = name == attr and isinstance(value, Tensor)
            if value is current or (tied and _same_memory(value, masked.weight)):
                return
            if isinstance(value, Tensor) and is_sharded(value):
                raise _cannot_shard(name, masked)
            raise _cannot("replace", name, masked)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        for attr, masked in self._masks().items():
            if name in (attr, leaf_attribute(attr)):
                raise _cannot("delete", name, masked)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, unless that replaces a masked one (weight norm, pruning)."""
        for attr, masked in self._masks().items():
            if name in (attr, leaf_attribute(attr)) and param is not self._parameters.get(name):
                raise _cannot("replace", name, masked)
            if attr not in self._parameters:
                # torch.nn.utils.weight_norm takes the weight out, then registers what makes it.
                rest = dict(self._parameters)
                self._parameters.clear()
                self._parameters.update({attr: masked.weight, **rest})
                raise _cannot("delete", attr, masked)
            if name != attr and param is not None and _same_memory(param, masked.weight):
                raise _cannot("rename", attr, masked)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RefusesReplacing:
        """Move and cast in place; a weight is the same object afterwards, whatever torch does."""
        masks = self._masks()
        for masked in masks.values():
            if fn(masked.leaf.data).is_meta and not masked.leaf.is_meta:
                raise AttachError(
                    f"{masked.name!r} has a mask attached and cannot go to the meta device, where "
                    "its values and its diff would be lost. Keep attachment.adapter(), detach(), "
                    "then move the model."
                )
        sharded = {attr: masked for attr, masked in masks.items() if masked.shards is not None}
        for attr, masked in sharded.items():
            _refuse_conversion(masked, fn)
            # Torch would swap the insides of a DTensor, even for what it is already.
            self._parameters[attr] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters.update((attr, masked.weight) for attr, masked in sharded.items())
        for attr, masked in masks.items():
            current = self._parameters[attr]
            # torch.__future__.set_overwrite_module_params_on_conversion makes new parameters.
            if current is not None and current is not masked.weight:
                masked.weight.data = current.data
                self._parameters[attr] = masked.weight
        return self


def _refuse_conversion(masked: MaskedParameter, fn: Callable[[Tensor], Tensor]) -> None:
    if masked.shards is not None:
        masked.shards.settle()
    local = own_rows(masked.weight).local
    after = fn(local)
    if (after.dtype, after.device) != (local.dtype, local.device):
        raise AttachError(
            f"{masked.name!r} is sharded and has a mask attached, so it cannot go from "
            f"{local.dtype} on {local.device} to {after.dtype} on {after.device}. Cast and move "
            "the model before fully_shard and attach; for compute in a lower precision give "
            "fully_shard mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)."
        )


def _cannot_shard(name: str, masked: MaskedParameter) -> AttachError:
    return AttachError(
        f"cannot shard {name!r}: {masked.name!r} has a mask attached. Call fully_shard on the "
        "layers and on the model first, load the weights, then attach; sparse.parameters() are "
        "reduced by the attachment and go to the optimizer as they are. (accelerate: model, "
        "optimizer = accelerator.prepare(model, optimizer), then attach(model, masks, "
        "optimizer=optimizer).)"
    )


def _cannot(do: str, name: str, masked: MaskedParameter) -> AttachError:
    return AttachError(
        f"cannot {do} {name!r}: {masked.name!r} has a mask attached. Parametrizations, weight "
        "norm, pruning and resized embeddings replace the parameter, too. Keep "
        "attachment.adapter() if it has trained, detach() first, change the model and attach again."
    )
