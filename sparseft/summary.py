"""What an adapter holds, tensor by tensor, as plain data: what ``sparseft inspect`` prints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseft._integrity import chunk_of
from sparseft.adapter import Adapter, AdapterMetadata, DiffHeader, Encoding

__all__ = ["AdapterSummary", "TensorSummary", "summarise"]


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of an adapter: a sparse diff, or a tensor that was trained fully.

    ``nbytes`` are those in memory, ``stored_nbytes`` those in the file it was loaded from (in
    memory, if there is none), whose indices are ``encoding``.
    """

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
    encoding: Encoding
    stored_nbytes: int


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
    stored_nbytes: int
    metadata: AdapterMetadata

    @property
    def encoding(self) -> Encoding:
        """ "gaps" where the file is compact, i.e. some diff's indices are stored so."""
        return "gaps" if any(r.encoding == "gaps" for r in self.tensors) else "plain"

    @property
    def bytes_per_entry(self) -> float:
        """Stored bytes of indices and values per entry of the diffs; 0 if there is none."""
        stored = sum(r.stored_nbytes for r in self.tensors if r.kind == "diff")
        return stored / self.nnz if self.nnz else 0.0

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


def _diff_row(name: str, header: DiffHeader, values: Tensor) -> TensorSummary:
    mean, largest = _abs_mean_max(values)
    return TensorSummary(
        name=name,
        kind="diff",
        shape=tuple(header.shape),
        nnz=header.nnz,
        density=header.nnz / header.numel if header.numel else 0.0,
        mode=header.mode,
        dtype=_short(header.dtype),
        mean_abs=mean,
        max_abs=largest,
        nbytes=header.nbytes,
        encoding=header.encoding,
        stored_nbytes=header.stored_nbytes,
    )


def _dense_row(name: str, tensor: Tensor) -> TensorSummary:
    mean, largest = _abs_mean_max(tensor)
    nbytes = tensor.numel() * tensor.element_size()
    return TensorSummary(
        name=name,
        kind="dense",
        shape=tuple(tensor.shape),
        nnz=tensor.numel(),
        density=1.0 if tensor.numel() else 0.0,
        mode="set",
        dtype=_short(tensor.dtype),
        mean_abs=mean,
        max_abs=largest,
        nbytes=nbytes,
        encoding="plain",
        stored_nbytes=nbytes,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def summarise(adapter: Adapter) -> AdapterSummary:
    """Describe every tensor of ``adapter`` and the totals; reads each tensor once."""
    rows = [_diff_row(n, adapter.header(n), d.values) for n, d in adapter.diffs.items()]
    rows += [_dense_row(n, t) for n, t in adapter.dense.items()]
    diffs = [r for r in rows if r.kind == "diff"]
    return AdapterSummary(
        name=adapter.name,
        digest=adapter.digest,
        tensors=tuple(rows),
        nnz=sum(r.nnz for r in diffs),
        numel=sum(math.prod(r.shape) for r in diffs),
        dense_numel=sum(r.nnz for r in rows if r.kind == "dense"),
        nbytes=sum(r.nbytes for r in rows),
        stored_nbytes=sum(r.stored_nbytes for r in rows),
        metadata=adapter.metadata,
    )
