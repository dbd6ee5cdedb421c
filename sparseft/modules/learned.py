"""What masks have learned so far, as an `Adapter` on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.diff import SparseDiff
from sparseft.fingerprint import Fingerprint
from sparseft.modules.full_params import FullParameter
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.storage_stack import parents_of
from sparseft.modules.weight_storage import full_value

__all__ = ["learned_adapter"]


def learned_adapter(
    model: nn.Module,
    masked: Mapping[str, MaskedParameter],
    full: Iterable[FullParameter],
    *,
    name: str,
    base_name: str | None,
    fingerprint: Fingerprint,
    method: str,
    seed: int | None,
    extra: Mapping[str, Any] | None,
) -> Adapter:
    """Copy leaves and full parameters, those that are sharded whole, into an adapter.

    Args:
        model: whose config may know the name of its base.
        masked: name -> what is trained at a mask.
        full: what is trained densely.
        name, base_name, method, seed, extra: as of `sparseft.Attachment.adapter`.
        fingerprint: of the base.

    Raises:
        DiffError: a value is NaN or infinite.
    """
    if base_name is None:
        config = getattr(model, "config", None)
        base_name = getattr(config, "_name_or_path", None) or None
    diffs = {
        n: SparseDiff.from_pattern(m.pattern.to("cpu"), m.leaf.detach().to("cpu", copy=True))
        for n, m in masked.items()
    }
    dense = {f.name: full_value(f.parameter).to("cpu", copy=True) for f in full}
    parents = dict.fromkeys(p for m in masked.values() for p in parents_of(m.weight))
    entries = sum(m.pattern.nnz for m in masked.values())
    metadata = AdapterMetadata(
        base_name=base_name,
        fingerprint=fingerprint,
        method=method,
        density=entries / sum(m.weight.numel() for m in masked.values()),
        seed=seed,
        parents=tuple(parents),
        extra=extra or {},
    )
    return Adapter(diffs, name=name, dense=dense, metadata=metadata)
