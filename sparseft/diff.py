"""`SparseDiff`: what. The sparse change of one tensor; `SparsePattern` (where) comes along.

Both are frozen and checked once, at construction, so that no op, kernel or file writer has to check
again. They are pure data: nothing here knows about modules, files or adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sparseft._integrity import bits_equal, find_value_fault, hash_tensor
from sparseft.errors import DiffError, MaskError
from sparseft.pattern import Entries, SparsePattern, as_size, check_indices, index_dtype_for

__all__ = [
    "VALUE_DTYPES",
    "MaskLike",
    "Mode",
    "SparseDiff",
    "SparsePattern",
    "as_pattern",
    "index_dtype_for",
]

Mode = Literal["add", "set"]
MODES: tuple[str, ...] = get_args(Mode)

# What a diff's values may be: the dtypes weights have, and float64 for gradient checks.
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class SparseDiff(Entries):
    """Sparse change of one tensor.

    ``mode="add"``: W[indices] + values; ``mode="set"``: W[indices] = values. Tuned weights come
    back bit for bit from "set" values in the weight's dtype; bf16 differences do not rebuild them.

    Args:
        indices: (nnz,) as in `SparsePattern`.
        values: (nnz,) fp32, bf16, fp16 or fp64, finite, in the order and on the device of
            ``indices``.
        shape: shape of the tensor.
        mode: "add" or "set".

    Raises:
        DiffError: the parts do not belong together, or a value is NaN or infinite.

    Example:
        >>> diff = SparseDiff.from_dense(torch.tensor([[0.0, 0.5], [-1.0, 0.0]]))
        >>> diff.indices.tolist(), diff.values.tolist()
        ([1, 2], [0.5, -1.0])
    """

    indices: Tensor
    values: Tensor
    shape: torch.Size
    mode: Mode = "add"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "shape", as_size(self.shape))
        except MaskError as bad:
            raise DiffError(str(bad)) from None
        self._check_values()
        check_indices(self.indices, self.shape, DiffError)

    def _check_values(self) -> None:
        if self.mode not in MODES:
            raise DiffError(f"mode is {self.mode!r}, wanted one of {', '.join(map(repr, MODES))}.")
        if self.values.dtype not in VALUE_DTYPES:
            raise DiffError(
                f"values is {self.values.dtype}, wanted one of "
                f"{', '.join(map(str, VALUE_DTYPES))}. Pass values.float()."
            )
        if self.values.shape != self.indices.shape:
            raise DiffError(
                f"values has shape {tuple(self.values.shape)} but indices has "
                f"{tuple(self.indices.shape)}; both must be (nnz,), entry for entry."
            )
        if self.values.device != self.indices.device:
            raise DiffError(
                f"values is on {self.values.device} but indices on {self.indices.device}; "
                "move both to one device."
            )
        fault = find_value_fault(self.values)
        if fault is not None:
            raise DiffError(
                f"values of a diff of shape {tuple(self.shape)} must be finite; {fault}. "
                "Look for a loss that diverged, or a cast that overflowed."
            )

    @classmethod
    def _trusted(
        cls, indices: Tensor, values: Tensor, shape: Sequence[int], mode: Mode = "add"
    ) -> SparseDiff:
        """Build from parts known to fit, unread (no device synchronisation)."""
        self = object.__new__(cls)
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "shape", torch.Size(shape))
        object.__setattr__(self, "mode", mode)
        return self

    @classmethod
    def from_pattern(cls, pattern: SparsePattern, values: Tensor, mode: Mode = "add") -> SparseDiff:
        """Put ``values`` (nnz,) at the positions of ``pattern``, which is not checked again."""
        self = cls._trusted(pattern.indices, values, pattern.shape, mode)
        self._check_values()
        self.__dict__["pattern"] = (
            pattern  # keeps what the pattern has cached (row offsets, columns)
        )
        return self

    @classmethod
    def from_dense(
        cls, delta: Tensor, mask_or_pattern: MaskLike | None = None, mode: Mode = "add"
    ) -> SparseDiff:
        """Take the entries of a dense tensor at a mask, or its nonzero entries.

        Args:
            delta: any shape, floating; copied, not viewed.
            mask_or_pattern: bool mask of ``delta``'s shape or pattern; default: ``delta != 0``.
            mode: "add" or "set".

        Raises:
            DiffError: ``delta`` is not floating or not finite there.
            MaskError: the mask has another shape.
        """
        if mask_or_pattern is None:
            mask_or_pattern = delta.detach() != 0
        pattern = as_pattern(mask_or_pattern, name="delta", shape=delta.shape).to(delta.device)
        values = delta.detach().reshape(-1)[pattern.indices.long()]
        return cls.from_pattern(pattern, values, mode)

    @cached_property
    def pattern(self) -> SparsePattern:
        """Where the diff has entries."""
        return SparsePattern._trusted(self.indices, self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values."""
        return self.nnz * (self.indices.element_size() + self.values.element_size())

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SparseDiff:
        """Move both parts to ``device`` and cast the values to ``dtype``; itself if no change.

        Raises:
            DiffError: a value overflows in ``dtype``.
        """
        device = self.device if device is None else torch.device(device)
        indices = self.indices.to(device)
        values = self.values.to(device=device, dtype=dtype or self.dtype)
        if indices is self.indices and values is self.values:
            return self
        if values.dtype != self.dtype:
            fault = find_value_fault(values)
            if fault is not None:
                raise DiffError(f"cast from {self.dtype} to {values.dtype} overflows; {fault}.")
        return SparseDiff._trusted(indices, values, self.shape, self.mode)

    def to_dense(self) -> Tensor:
        """Return a dense tensor of the values' dtype, 0 outside the pattern in either mode."""
        dense = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
        dense[self.indices.long()] = self.values.detach()
        return dense.view(self.shape)

    def equals(self, other: SparseDiff) -> bool:
        """Bitwise: same mode, shape, positions, dtype, value bits (-0.0 is not 0.0); any device."""
        return (
            self.mode == other.mode
            and self.shape == other.shape
            and bits_equal(self.indices, other.indices)
            and bits_equal(self.values, other.values)
        )

    def digest(self) -> str:
        """Return 32 hex digits of BLAKE2b over mode, shape, dtype, indices and values."""
        digest = hashlib.blake2b(digest_size=16)
        shape = ",".join(map(str, self.shape))
        digest.update(f"diff:{self.mode}:{shape}:{self.dtype}:{self.nnz}:".encode())
        hash_tensor(digest, self.indices)
        hash_tensor(digest, self.values)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return (
            f"SparseDiff(nnz={self.nnz:,} of {self.numel:,} ({self.density:.3%}), "
            f"shape={tuple(self.shape)}, dtype={self.dtype}, mode={self.mode!r}, "
            f"device={self.device})"
        )


# What a user may pass as a mask: a pattern, or a bool tensor with True = trainable.
MaskLike: TypeAlias = SparsePattern | Tensor


def as_pattern(mask: object, *, name: str, shape: Sequence[int]) -> SparsePattern:
    """Turn a mask into a pattern of ``shape``, with ``name`` in every error.

    Args:
        mask: `SparsePattern`, or bool tensor of ``shape`` (True = trainable).
        name: what the mask is for, usually the parameter's name.
        shape: shape of that parameter.

    Raises:
        MaskError: another type, dtype or shape.
    """
    if isinstance(mask, SparseDiff):
        mask = mask.pattern
    if not isinstance(mask, SparsePattern | Tensor):
        raise MaskError(
            f"mask of {name!r} is {type(mask).__name__}, wanted a SparsePattern or a bool tensor "
            "(True = trainable)."
        )
    if tuple(mask.shape) != tuple(shape):
        got, wanted = tuple(mask.shape), tuple(shape)
        hint = (
            " It looks transposed: pass mask.t()." if len(got) > 1 and got == wanted[::-1] else ""
        )
        raise MaskError(f"mask of {name!r} has shape {got} but the tensor has {wanted}.{hint}")
    if isinstance(mask, SparsePattern):
        return mask
    if mask.dtype != torch.bool:
        raise MaskError(
            f"mask of {name!r} is {mask.dtype}, wanted torch.bool (True = trainable). "
            "Pass mask.bool()."
        )
    return SparsePattern.from_mask(mask)
