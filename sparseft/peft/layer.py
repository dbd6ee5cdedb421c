"""Layers of the tuner: a stock layer, and the sparse diffs of several adapters beside it.

The weight is left as it is: ``y = W(x) + x @ S.T``, with S what the active adapters add up to, so
quantised weights will do and a disabled adapter leaves the stock layer's bits. Merging writes the
entries into the weight and keeps what was there, so that unmerging is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparseft._integrity import find_value_fault
from sparseft.diff import SparseDiff, index_dtype_for
from sparseft.errors import AdapterFormatError, AttachError, CompositionError
from sparseft.modules.deltas import Applied, Blend, Delta
from sparseft.modules.separate import Site, shape_of
from sparseft.ops.union import union_of
from sparseft.pattern import SparsePattern, check_indices
from sparseft.peft.merging import ATTRS, Merging

if TYPE_CHECKING:
    from sparseft.peft.planning import Part

__all__ = ["BASE", "Embedding", "LayerNorm", "Linear", "SparseFtLayer", "layer_for"]

BASE = "__base__"  # PEFT's name, among those of a mixed batch, for rows without an adapter


class SparseFtLayer(Merging, nn.Module, BaseTunerLayer):
    """A layer with sparse adapters: values (nnz,) fp32 to train, flat positions (nnz,) as buffers.

    Args:
        base_layer: Linear, Conv1D, Embedding or LayerNorm, quantised or not.
        name: of the module in the model, for messages.
    """

    adapter_layer_names = ("sparseft_values", "sparseft_bias_values")
    other_param_names = ("sparseft_indices", "sparseft_bias_indices")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.sparseft_values = nn.ParameterDict()
        self.sparseft_bias_values = nn.ParameterDict()
        self.sparseft_indices = BufferDict(persistent=True)
        self.sparseft_bias_indices = BufferDict(persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._under: dict[str, tuple[Tensor, Tensor]] = {}
        self._unfilled: set[tuple[str, str]] = set()  # laid out, waiting for a file
        self._site: Site | None = None
        self._applied: dict[Any, Applied | None] = {}

    # What is there.

    @property
    def stock(self) -> Any:
        """The layer that all this is around."""
        return BaseTunerLayer.get_base_layer(self)

    def values_of(self, attr: str) -> nn.ParameterDict:
        """Return adapter -> values, of the weight or of the bias."""
        return self.sparseft_values if attr == "weight" else self.sparseft_bias_values

    def indices_of(self, attr: str) -> BufferDict:
        """Return adapter -> positions, of the weight or of the bias."""
        return self.sparseft_indices if attr == "weight" else self.sparseft_bias_indices

    def shape(self, attr: str) -> tuple[int, ...]:
        """Return the shape of the parameter, also where it is stored packed."""
        base = self.stock
        return shape_of(base, attr, getattr(base, attr))

    def diff(self, adapter_name: str, attr: str = "weight") -> SparseDiff | None:
        """Return one adapter's diff of the weight or bias, None if it has none; not a copy."""
        if adapter_name not in self.indices_of(attr):
            return None
        self.check_filled([adapter_name])
        pattern = SparsePattern._trusted(
            self.indices_of(attr)[adapter_name], torch.Size(self.shape(attr))
        )
        values = self.values_of(attr)[adapter_name].detach()
        if isinstance(values, DTensor):
            values = values.full_tensor()  # all ranks take part
        return SparseDiff.from_pattern(pattern, values)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return one adapter's change of the weight, dense, as PEFT's layers do."""
        diff = self.diff(adapter)
        if diff is None:
            return torch.zeros(self.shape("weight"), device=self.stock.weight.device)
        return diff.to_dense()

    # Making and loading.

    def update_layer(self, adapter_name: str, parts: Mapping[str, Part]) -> None:
        """Add an adapter, or lay it out anew."""
        base = self.stock
        for attr in ATTRS:
            if adapter_name in self.indices_of(attr) and attr not in parts:
                del self.indices_of(attr)[adapter_name], self.values_of(attr)[adapter_name]
        for attr, part in parts.items():
            device = getattr(base, attr).device
            if part.pattern is None:
                dtype = index_dtype_for(torch.Size(part.shape).numel())
                indices = torch.full((part.nnz,), -1, dtype=dtype, device=device)
                self._unfilled.add((attr, adapter_name))
            else:
                # A copy: files and other models may hold the same tensor.
                indices = part.pattern.indices.detach().to(device, copy=True)
                self._unfilled.discard((attr, adapter_name))
            values = torch.zeros(part.nnz, dtype=torch.float32, device=device)
            if part.values is not None:
                values.copy_(part.values.detach())
            self.indices_of(attr)[adapter_name] = indices
            self.values_of(attr)[adapter_name] = nn.Parameter(values)
        self._applied.clear()
        active: Any = self.active_adapters
        BaseTunerLayer.set_adapter(self, active)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own casts to the layer's dtype, which rounds fp32 values that were just loaded.
        for attr in ATTRS:
            if adapter_name not in self.indices_of(attr):
                continue
            where = device or getattr(self.stock, attr).device
            values, indices = self.values_of(attr), self.indices_of(attr)
            own: Any = indices[adapter_name]
            indices[adapter_name] = own.to(where)
            if values[adapter_name].device not in (where, torch.device("meta")):
                values[adapter_name] = nn.Parameter(
                    values[adapter_name].detach().to(where), values[adapter_name].requires_grad
                )
        self._applied.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; a merged one is unmerged first."""
        if adapter_name in self.merged_adapters:
            rest = [name for name in self.merged_adapters if name != adapter_name]
            self.unmerge()
            self._write(rest, check=False)
        super().delete_adapter(adapter_name)
        self._unfilled = {one for one in self._unfilled if one[1] != adapter_name}
        self._applied.clear()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Before the containers below copy anything: what is in a file reaches no op unchecked.
        for attr, dict_name, values_name in (
            ("weight", "sparseft_indices", "sparseft_values"),
            ("bias", "sparseft_bias_indices", "sparseft_bias_values"),
        ):
            for adapter in list(self.indices_of(attr).keys()):
                key = f"{prefix}{dict_name}.{adapter}"
                indices = state_dict.get(key)
                if not isinstance(indices, Tensor) or indices.is_meta:
                    continue
                self._check_loaded(attr, key, indices)
                values = state_dict.get(f"{prefix}{values_name}.{adapter}")
                if isinstance(values, Tensor):
                    self._check_values(f"{prefix}{values_name}.{adapter}", values)
                elif (attr, adapter) in self._unfilled:
                    raise AdapterFormatError(
                        f"{key}: there are positions, but no {values_name}: the file is damaged."
                    )
                self._unfilled.discard((attr, adapter))
        self._applied.clear()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_loaded(self, attr: str, key: str, indices: Tensor) -> None:
        if bool((indices == -1).all()) and indices.numel():
            raise AdapterFormatError(
                f"{key}: holds no positions; it was saved before its own file had been loaded."
            )
        try:
            check_indices(indices, torch.Size(self.shape(attr)), AdapterFormatError)
        except AdapterFormatError as bad:
            raise AdapterFormatError(f"{key}: {bad}") from None

    @staticmethod
    def _check_values(what: str, values: Tensor) -> None:
        fault = find_value_fault(values.detach())
        if fault is not None:
            raise AdapterFormatError(f"{what}: values must be finite; {fault}.")

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._applied.clear()  # devices may change
        return super()._apply(fn, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise AttachError(
            "nn.DataParallel loses the parameters of adapters (torch's ParameterDict cannot be "
            "replicated). Use DistributedDataParallel: start the script with torchrun or "
            "accelerate launch, or make one GPU visible."
        )

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own: what is cached reads this layer's parameters.
        return {**self.__dict__, "_applied": {}, "_site": None}

    # The forward.

    @property
    def site(self) -> Site:
        """The base layer, as what diffs are added to."""
        base = self.stock
        if self._site is None or self._site.module is not base:
            self._site = Site(base, {attr: f"{self.name}.{attr}" for attr in ATTRS})
            self._applied.clear()
        return self._site

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output with what the adapters add.

        Args:
            x: (..., in), or token ids of an embedding.
            adapter_names: for rows of a mixed batch, the adapter of each, or ``"__base__"``.
            args, kwargs: of the base layer.
        """
        names: Sequence[str] | None = kwargs.pop("adapter_names", None)
        active: Any = self.active_adapters
        if names is not None:
            applied = self._mixed(names)
        elif self.disable_adapters:
            if self.merged:
                self.unmerge()
            applied = None
        else:
            applied = None if self.merged else self._together(tuple(active))
        y = self.base_layer(x, *args, **kwargs)
        return y if applied is None else self.site.add(applied, x, y)

    def _together(self, names: tuple[str, ...]) -> Applied | None:
        """Return what adds the sum of some adapters to a whole batch, None for nothing."""
        site = self.site  # before the cache is asked: a new base layer empties it
        made = self._applied.get(names, self)  # threads may empty the cache at any time
        if made is self:
            self.check_filled(names)
            blend = self._blend(names, site)
            made = self._applied[names] = Applied([blend]) if blend else None
        return made

    def _mixed(self, names: Sequence[str]) -> Applied | None:
        if self.merged:
            raise CompositionError(
                f"adapter_names is given, but {', '.join(self.merged_adapters)} are merged into "
                f"{self.name!r}; call unmerge_adapter() first."
            )
        site, key = self.site, (BASE, *names)
        made = self._applied.get(key, self)
        if made is self:
            distinct = sorted(set(names))
            self.check_filled(distinct)
            blends = [{} if name == BASE else self._blend([name], site) for name in distinct]
            row_of = [distinct.index(name) for name in names]
            if len(self._applied) > 64:  # every new order of rows makes another
                self._applied.clear()
            made = self._applied[key] = Applied(blends, row_of) if any(blends) else None
        return made

    def _blend(self, names: Sequence[str], site: Site) -> Blend:
        """Return what some adapters do to the weight and the bias together."""
        blend: dict[str, Delta] = {}
        for attr in ATTRS:
            indices, total = self.summed(names, attr)
            if indices is not None:
                parameter = getattr(site.module, attr)
                key = site.weight if attr == "weight" else site.bias
                blend[str(key)] = Delta(indices, total, self.shape(attr), parameter.dtype)
        return blend

    def summed(self, names: Sequence[str], attr: str) -> tuple[Tensor | None, Callable[[], Tensor]]:
        """Return the union of the adapters' positions, and a function that adds up their values.

        In order of their names: the sum depends on no order of activation.
        """
        held, own = self.values_of(attr), self.indices_of(attr)
        chosen = [name for name in sorted(set(names)) if name in own]
        if not chosen:
            return None, lambda: torch.empty(0)
        if len(chosen) == 1:
            return own[chosen[0]], lambda: held[chosen[0]]
        with torch.inference_mode(False):  # kept, and used by later calls that train
            union, places = union_of([own[name].detach() for name in chosen])

        def total() -> Tensor:
            values = [held[name] for name in chosen]
            wide = torch.promote_types(values[0].dtype, torch.float32)
            result = torch.zeros(union.numel(), dtype=wide, device=union.device)
            for one, place in zip(values, places, strict=True):
                one = one.to(wide)
                result = result + one if place is None else result.index_add(0, place, one)
            return result

        return union, total

    def check_filled(self, names: Sequence[str]) -> None:
        """Refuse to run what was laid out and not loaded, and check what came past our own loading.

        transformers puts tensors of a file into the model one by one, without load_state_dict.
        """
        for attr, adapter in sorted(self._unfilled):
            if adapter not in names:
                continue
            indices: Tensor = self.indices_of(attr)[adapter]
            if indices.is_meta or bool((indices < 0).all()):
                raise AttachError(
                    f"adapter {adapter!r} says how many entries {self.name}.{attr} has, not "
                    "which: its file has not been loaded. Use PeftModel.from_pretrained, or set "
                    "config.entries = None to select anew."
                )
            self._check_loaded(attr, f"{self.name}.{attr} of {adapter!r}", indices)
            self._check_values(f"{self.name}.{attr} of {adapter!r}", self.values_of(attr)[adapter])
            self._unfilled.discard((attr, adapter))

    def __repr__(self) -> str:
        return f"sparseft.{super().__repr__()}"


class Linear(SparseFtLayer):
    """Around ``nn.Linear``, quantised linear layers and ``Conv1D``.

    The name is a convention: PEFT's ``"all-linear"`` knows layers of other adapters by it.
    """


class Embedding(SparseFtLayer):
    """Around ``nn.Embedding``."""


class LayerNorm(SparseFtLayer):
    """Around ``nn.LayerNorm``."""


def layer_for(base_layer: nn.Module, name: str) -> SparseFtLayer:
    """Return the layer of ours for a stock one, without adapters."""
    if isinstance(base_layer, nn.Embedding):
        return Embedding(base_layer, name)
    if isinstance(base_layer, nn.LayerNorm):
        return LayerNorm(base_layer, name)
    return Linear(base_layer, name)
