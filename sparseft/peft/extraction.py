"""Adapters of a model in memory as sparseft's own `Adapter`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.errors import CompositionError, UnknownNameError
from sparseft.fingerprint import Fingerprint, fingerprint_tensor
from sparseft.io.foreign.names import parameter_name
from sparseft.modules.dequantise import dequantise
from sparseft.modules.separate import is_opaque
from sparseft.peft.layer import SparseFtLayer

__all__ = ["adapter_of", "heads_of", "merged_state_dict"]


def heads_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors that an adapter trained whole, by the bare model's names."""
    found = {}
    for key, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            own: Any = module.modules_to_save[adapter_name]
            for name, parameter in own.named_parameters():
                found[parameter_name(f"{key}.{name}")] = parameter
    return found


def adapter_of(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    name: str | None = None,
    fingerprint: bool = True,
) -> Adapter:
    """Return one of a PEFT model's sparse adapters as an `Adapter`, copied to the CPU.

    Args:
        model: what ``get_peft_model`` returned, or a model with PEFT's layers in it.
        adapter_name: which.
        name: of the result; default: ``adapter_name``.
        fingerprint: whether to note which base weights it belongs to (reads them; not those that
            are merged or quantised).

    Raises:
        UnknownNameError: no such adapter.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparseft.peft import SparseFtConfig, adapter_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> model = get_peft_model(model, SparseFtConfig(target_modules=["0"], nnz=6))
        >>> adapter_of(model).nnz
        6
    """
    config = _check_known(model, adapter_name)
    diffs, prints = {}, {}
    for key, module in model.named_modules():
        if not isinstance(module, SparseFtLayer):
            continue
        for attr in ("weight", "bias"):
            diff = module.diff(adapter_name, attr)
            if diff is None:
                continue
            own = parameter_name(f"{key}.{attr}")
            diffs[own] = diff.to("cpu") if diff.device.type != "cpu" else _copied(diff)
            weight = getattr(module.stock, attr)
            if fingerprint and not module.merged and not is_opaque(weight) and not weight.is_meta:
                prints[own] = fingerprint_tensor(own, weight)
    heads = {n: t.detach().cpu().clone() for n, t in heads_of(model, adapter_name).items()}
    metadata = AdapterMetadata(
        base_name=config.base_model_name_or_path or None,
        fingerprint=Fingerprint(prints) if prints else None,
        method=config.selection,
        density=config.density,
        seed=config.seed,
    )
    return Adapter(diffs, name=name or adapter_name, dense=heads, metadata=metadata)


def _check_known(model: nn.Module, adapter_name: str) -> Any:
    """Return an adapter's configuration; raise UnknownNameError where there is none."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise UnknownNameError(
            f"the model has no adapter {adapter_name!r}.{did_you_mean(adapter_name, configs)} "
            f"There are: {', '.join(configs) or 'none'}."
        )
    return configs[adapter_name]


def _copied(diff: Any) -> Any:
    from sparseft.diff import SparseDiff

    return SparseDiff._trusted(
        diff.indices.clone(), diff.values.detach().clone(memory_format=torch.contiguous_format),
        diff.shape,
    )  # fmt: skip


def merged_state_dict(
    model: nn.Module,
    adapter_names: Sequence[str] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Return the state of the bare model, dense, with adapters written in. The model is unchanged.

    Quantised weights, targets or not, come as ``rn(dequantised + diff)``: what a merge into
    quantised storage would have to round once more. Load it into the model of the same class made
    without quantisation.

    Args:
        model: what ``get_peft_model`` returned, with nothing merged.
        adapter_names: which, summed up; default: the active ones.
        dtype: of floating tensors.

    Raises:
        UnknownNameError: no such adapter.
        CompositionError: adapters are merged, in a layer that is named.
        AttachError: a weight whose dense value is not known.

    Numerics: the sum in fp32 (fp64 for fp64 weights) and one rounding.
    """
    state: dict[str, Tensor] = {}
    active: Any = model.active_adapters
    names = list(active if adapter_names is None else adapter_names)
    for name in names:
        _check_known(model, name)
    for key, module in model.named_modules():
        inside = key.split(".")
        if any(part in _OWN for part in inside):
            continue
        bare = ".".join(part for part in inside if part != "original_module")
        for attr, tensor in _stored(module):
            state[parameter_name(f"{bare}.{attr}")] = _dense(module, attr, tensor)
    for key, module in model.named_modules():
        if isinstance(module, SparseFtLayer):
            if module.merged:
                raise CompositionError(
                    f"{key!r} has merged adapters; call unmerge_adapter() first."
                )
            module.check_filled(names)
            for attr in ("weight", "bias"):
                indices, total = module.summed(names, attr)
                if indices is not None:
                    own = parameter_name(f"{key}.{attr}")
                    base = state[own]
                    sums = torch.promote_types(base.dtype, torch.float32)
                    wide = base.to(sums, copy=True, memory_format=torch.contiguous_format)
                    wide.view(-1).index_add_(0, indices, total().detach().to(wide))
                    state[own] = wide
    for name in names:
        state.update({n: t.detach().clone() for n, t in heads_of(model, name).items()})
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


# Containers of PEFT's, and copies of heads: no tensors of the bare model.
_OWN = {
    "sparseft_values", "sparseft_indices", "sparseft_bias_values", "sparseft_bias_indices",
    "modules_to_save",
}  # fmt: skip


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for attr, parameter in module._parameters.items():
        if parameter is not None:
            yield attr, parameter
    for attr, buffer in module._buffers.items():
        if buffer is not None and attr not in module._non_persistent_buffers_set:
            yield attr, buffer


def _dense(module: nn.Module, attr: str, tensor: Tensor) -> Tensor:
    if is_opaque(tensor) and isinstance(tensor, nn.Parameter):
        return dequantise(module, attr)
    return tensor.detach()
