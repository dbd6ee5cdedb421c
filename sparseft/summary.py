"""What an adapter holds, tensor by tensor, as plain data: what ``sparseft inspect`` prints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparseft._integrity import chunk_of
from sparseft.adapter import Adapter, AdapterMetadata

__all__ = ["AdapterSummary", "TensorSummary", "summarise"]


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of an adapter: a sparse diff, or a tensor that was trained fully."""

    name: str
    kind: Literal["diff", "dense"]
    shape: tuple[int, ...]
    nnz: int
    density: float
    mode: str
    dtype: str
    mean_abs: float
    max_abs: float
    nbytes: int


@dataclass(frozen=True)
class AdapterSummary:
    """All tensors of an adapter, their totals and where they come from."""

    name: str
    digest: str
    tensors: tuple[TensorSummary, ...]
    nnz: int
    numel: int
    dense_numel: int
    nbytes: int
    metadata: AdapterMetadata

    @property
    def density(self) -> float:
        """nnz over all entries of the tensors that have a diff."""
        return self.nnz / self.numel if self.numel else 0.0


def _abs_mean_max(values: Tensor) -> tuple[float, float]:
    """Mean and largest absolute value, summed in float64 by pieces."""
    flat = values.detach().reshape(-1)
    total, largest = 0.0, 0.0
    for part in flat.split(chunk_of(flat)):
        if part.numel():
            magnitude = part.double().abs()
            total += float(magnitude.sum())
            largest = max(largest, float(magnitude.max()))
    return (total / flat.numel() if flat.numel() else 0.0), largest


def _row(
    name: str, kind: Literal["diff", "dense"], shape: tuple[int, ...], mode: str, values: Tensor
) -> TensorSummary:
    mean, largest = _abs_mean_max(values)
    numel = math.prod(shape)
    index_size = 0 if kind == "dense" else 4 if numel < 2**31 else 8
    return TensorSummary(
        name=name,
        kind=kind,
        shape=shape,
        nnz=values.numel(),
        density=values.numel() / numel if numel else 0.0,
        mode=mode,
        dtype=str(values.dtype).removeprefix("torch."),
        mean_abs=mean,
        max_abs=largest,
        nbytes=values.numel() * (index_size + values.element_size()),
    )


def summarise(adapter: Adapter) -> AdapterSummary:
    """Describe every tensor of ``adapter`` and the totals; reads each tensor once."""
    rows = [_row(n, "diff", tuple(d.shape), d.mode, d.values) for n, d in adapter.diffs.items()]
    rows += [_row(n, "dense", tuple(t.shape), "set", t) for n, t in adapter.dense.items()]
    diffs = [r for r in rows if r.kind == "diff"]
    return AdapterSummary(
        name=adapter.name,
        digest=adapter.digest,
        tensors=tuple(rows),
        nnz=sum(r.nnz for r in diffs),
        numel=sum(math.prod(r.shape) for r in diffs),
        dense_numel=sum(r.nnz for r in rows if r.kind == "dense"),
        nbytes=sum(r.nbytes for r in rows),
        metadata=adapter.metadata,
    )
