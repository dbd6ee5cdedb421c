"""`SparsePattern`: where. The positions inside one tensor that a mask keeps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparseft._integrity import bits_equal, chunk_of, find_index_fault, hash_tensor
from sparseft.errors import MaskError

__all__ = ["Entries", "SparsePattern", "index_dtype_for"]


def index_dtype_for(numel: int) -> torch.dtype:
    """Return the index dtype of a tensor with ``numel`` entries: int32 below 2**31, else int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def as_size(shape: Sequence[int]) -> torch.Size:
    """Return ``shape`` as a size that int64 positions can address, or raise MaskError."""
    size = torch.Size(int(s) for s in shape)
    if any(s < 0 for s in size):
        raise MaskError(f"shape {tuple(size)} has a negative dimension; sizes are 0 or more.")
    if math.prod(size) >= 2**63:
        raise MaskError(
            f"shape {tuple(size)} has more than 2**63 - 1 entries; flat indices are int64."
        )
    return size


def check_indices(indices: Tensor, shape: torch.Size, error: type[Exception]) -> None:
    """Raise ``error`` unless ``indices`` are what `SparsePattern` promises for ``shape``."""
    wanted = index_dtype_for(math.prod(shape))
    if indices.dim() != 1:
        raise error(
            f"indices has shape {tuple(indices.shape)}, wanted (nnz,): flat row-major positions. "
            "For (row, column) pairs pass row * columns + column."
        )
    if indices.dtype != wanted:
        raise error(
            f"indices is {indices.dtype}, wanted {wanted} for shape {tuple(shape)}. "
            "SparsePattern.from_indices(indices, shape) converts any integer dtype."
        )
    fault = find_index_fault(indices, math.prod(shape))
    if fault is not None:
        raise error(
            f"indices into shape {tuple(shape)} must ascend, without repeats, in range; {fault}. "
            "SparsePattern.from_indices(indices, shape, sort=True) sorts them."
        )


class Entries:
    """What anything with flat ``indices`` into a tensor of ``shape`` has: counts and a device."""

    indices: Tensor
    shape: torch.Size

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.indices.numel()

    @property
    def numel(self) -> int:
        """Number of entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """nnz / numel, 0 for a tensor without entries."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def device(self) -> torch.device:
        return self.indices.device


@dataclass(frozen=True, eq=False)
class SparsePattern(Entries):
    """Positions inside one tensor: the mask, stored as what it keeps.

    Args:
        indices: (nnz,) flat row-major positions, ascending and unique; int32 when the tensor has
            fewer than 2**31 entries, else int64.
        shape: shape of the tensor, 0-d allowed.

    Raises:
        MaskError: indices of the wrong dtype, unsorted, repeated or out of range.

    Example:
        >>> pattern = SparsePattern.from_mask(torch.eye(3, dtype=torch.bool))
        >>> pattern.indices.tolist(), pattern.nnz
        ([0, 4, 8], 3)
    """

    indices: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", as_size(self.shape))
        check_indices(self.indices, self.shape, MaskError)

    @classmethod
    def _trusted(cls, indices: Tensor, shape: Sequence[int]) -> SparsePattern:
        """Build from indices known to be right, unread (no device synchronisation)."""
        self = object.__new__(cls)
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "shape", torch.Size(shape))
        return self

    @classmethod
    def from_mask(cls, mask: Tensor) -> SparsePattern:
        """Keep the entries where ``mask`` (any shape, bool) is True."""
        if mask.dtype != torch.bool:
            raise MaskError(
                f"mask is {mask.dtype}, wanted torch.bool (True = trainable). Pass mask.bool(), or "
                "SparsePattern.from_indices for positions."
            )
        dtype = index_dtype_for(mask.numel())
        flat = mask.detach().reshape(-1)
        # In pieces: nonzero() answers in int64, twice the size of the result.
        step = 16 * chunk_of(flat)
        parts = [
            flat[start : start + step].nonzero().view(-1).add_(start).to(dtype)
            for start in range(0, flat.numel(), step)
        ]
        indices = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=mask.device)
        return cls._trusted(indices, mask.shape)

    @classmethod
    def from_indices(
        cls, indices: Tensor, shape: Sequence[int], *, sort: bool = False
    ) -> SparsePattern:
        """Build from flat row-major positions of any integer dtype.

        Args:
            indices: (nnz,) integers.
            shape: shape of the tensor they index.
            sort: sort first; otherwise unsorted positions are an error. Repeated ones always are.

        Raises:
            MaskError: not integers, not one-dimensional, unsorted, repeated or out of range.
        """
        size = as_size(shape)
        if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
            raise MaskError(
                f"indices is {indices.dtype}, wanted integers. "
                "For a boolean mask use SparsePattern.from_mask."
            )
        if indices.dim() != 1:
            raise MaskError(
                f"indices has shape {tuple(indices.shape)}, wanted (nnz,): flat row-major ones."
            )
        # Widened before the checks: narrowing first would wrap a wild position back into range.
        wide = indices.detach().to(torch.int64)
        if sort:
            wide = wide.sort().values
        fault = find_index_fault(wide, math.prod(size))
        if fault is not None:
            fix = "" if sort else " Pass sort=True to sort them."
            raise MaskError(f"indices do not fit shape {tuple(size)}; {fault}.{fix}")
        narrow = wide.to(index_dtype_for(math.prod(size)))
        return cls._trusted(narrow.clone() if narrow is indices else narrow, size)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns): dim 0 and the rest flattened; a 0-d or 1-d tensor is one row."""
        if len(self.shape) < 2:
            return 1, self.numel
        return self.shape[0], math.prod(self.shape[1:])

    @cached_property
    def _row_offsets(self) -> Tensor:
        rows, cols = self.matrix_shape
        edges = torch.arange(rows + 1, dtype=torch.int64, device=self.device).mul_(cols)
        # The last edge is numel, at most 2**31 - 1 where indices are int32: the narrowing is exact.
        edges = edges.to(self.indices.dtype)
        return torch.searchsorted(self.indices, edges, out_int32=self.indices.dtype == torch.int32)

    @cached_property
    def _col_indices(self) -> Tensor:
        return self.indices.remainder(max(self.matrix_shape[1], 1))

    def row_offsets(self) -> Tensor:
        """CSR row offsets: (rows + 1,) in the indices' dtype; computed once and kept."""
        return self._row_offsets

    def col_indices(self) -> Tensor:
        """CSR column of each entry: (nnz,) in the indices' dtype; computed once and kept."""
        return self._col_indices

    def to(self, device: torch.device | str) -> SparsePattern:
        """Return the pattern on ``device``: itself when it is there already."""
        indices = self.indices.to(device)
        return self if indices is self.indices else SparsePattern._trusted(indices, self.shape)

    def to_mask(self) -> Tensor:
        """Return the dense bool mask (True = kept)."""
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.device)
        mask[self.indices.long()] = True
        return mask.view(self.shape)

    def equals(self, other: SparsePattern) -> bool:
        """Same shape and same positions, devices aside."""
        return self.shape == other.shape and bits_equal(self.indices, other.indices)

    def digest(self) -> str:
        """Return 32 hex digits of BLAKE2b over shape and indices; the same on every device."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"pattern:{','.join(map(str, self.shape))}:".encode())
        hash_tensor(digest, self.indices)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return (
            f"SparsePattern(nnz={self.nnz:,} of {self.numel:,} ({self.density:.3%}), "
            f"shape={tuple(self.shape)}, device={self.device})"
        )
