"""What reads values, kept from fake tensors, which have none: weights are not drawn there, ranks do
not compare their masks, and torch's checks of types that hold on one device only are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparseft.modules import agreement, placement, sharding, weight_storage

__all__ = ["without_values"]


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of what draws weights, or says where one packed sequence ends."""


def _nowhere(*_: Any) -> int:
    """In the place of what asks where memory is."""
    return 0


def _grouped_shape(mat_a: Tensor, mat_b: Tensor, *, offs=None, out_dtype=None, **_: Any) -> Tensor:
    """Return an empty result of ``_grouped_mm``, the product of experts, in any dtype.

    torch's own shape function takes bfloat16 only, which is true of CUDA; CPUs multiply fp32, too.
    """
    if mat_a.dim() == 2 and mat_b.dim() == 2:
        size: tuple[int, ...] = (offs.numel(), mat_a.shape[0], mat_b.shape[1])
    elif mat_a.dim() == 2:
        size = (mat_a.shape[0], mat_b.shape[2])
    elif mat_b.dim() == 2:
        size = (mat_a.shape[1], mat_b.shape[1])
    else:
        size = (mat_a.shape[0], mat_a.shape[1], mat_b.shape[2])
    return torch.empty(size, dtype=out_dtype or mat_a.dtype, device=mat_a.device)


def _even_share(self: Any, weight: Any, indices: Tensor) -> None:
    """Give a rank as many of a sharded weight's entries as its rows are of all rows.

    In the place of ``OwnEntries.__init__``, which looks them up.
    """
    rows = weight_storage.own_rows(weight)
    numel, nnz = max(weight.numel(), 1), indices.numel()
    self.weight, self.indices = weight, indices
    self.where = slice(nnz * rows.first // numel, nnz * rows.last // numel)
    self.positions = indices[self.where] - rows.first


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Within: models of transformers can be made of, and run on, fake tensors."""
    from transformers import PreTrainedModel, masking_utils

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(PreTrainedModel, "_initialize_weights", _nothing))
        for compared in (name for name in agreement.__all__ if name.startswith("check_")):
            patches.enter_context(mock.patch.object(agreement, compared, _nothing))
        # The mesh is asked for its processes; there is one group, and the default one.
        patches.enter_context(mock.patch.object(sharding, "_group_of", _nothing))
        patches.enter_context(mock.patch.object(placement, "_address", _nowhere))
        own = weight_storage.OwnEntries
        patches.enter_context(mock.patch.object(own, "__init__", _even_share))
        # Whether several sequences are packed in one is read from positions; none are. (Where it
        # is not known a mask is made, and heads that share keys get copies of them.) transformers 4
        # does not ask: there the mask is made on real tensors, too.
        if hasattr(masking_utils, "is_tracing"):
            patches.enter_context(
                mock.patch.object(masking_utils, "find_packed_sequence_indices", _nothing)
            )
        shapes: Any = torch._meta_registrations
        if hasattr(shapes, "_meta_grouped_mm_common"):
            patches.enter_context(
                mock.patch.object(shapes, "_meta_grouped_mm_common", _grouped_shape)
            )
        yield
