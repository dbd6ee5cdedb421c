"""Which parameter gets which mask: names resolved, shapes and roles checked, before any change."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from torch import nn

from sparseft._text import human_bytes
from sparseft.diff import MaskLike, SparseDiff, SparsePattern, as_pattern
from sparseft.errors import AttachError, MaskError
from sparseft.modules.dequantise import is_opaque, logical_shape
from sparseft.modules.names import ParameterIndex
from sparseft.modules.refusals import check_maskable, check_overlaps
from sparseft.modules.weight_storage import is_sharded

__all__ = ["check_roles", "resolve_masks", "warn_if_dense"]

logger = logging.getLogger(__name__)

_DENSE = 0.2


def resolve_masks(
    index: ParameterIndex, masks: Mapping[str, MaskLike | SparseDiff]
) -> dict[str, SparsePattern]:
    """Return canonical name -> pattern on the parameter's device, in order of the model.

    Args:
        index: of the model.
        masks: any name of a parameter -> bool mask or pattern; those that keep nothing are left
            out.

    Raises:
        UnknownNameError: no such parameter.
        MaskError: a mask of another shape or type, or none keeps an entry.
        AttachError: two names of one weight, or one that cannot have a mask.
    """
    given: dict[str, str] = {}
    found: dict[str, SparsePattern] = {}
    for name, mask in masks.items():
        canonical = index.resolve(name)
        if canonical in given:
            raise AttachError(
                f"{given[canonical]!r} and {name!r} are one tied weight; give it one mask, the "
                "union of both."
            )
        given[canonical] = name
        parameter = index.get(canonical)
        check_maskable(canonical, parameter, index.owners(canonical))
        shape = logical_shape(*index.owners(canonical)[0])
        pattern = as_pattern(mask, name=name, shape=shape)
        if pattern.nnz:
            found[canonical] = pattern.to(parameter.device)
    if not found:
        raise MaskError(
            f"the {len(given)} masks keep no entry at all, so there is nothing to train. "
            "True means trainable; was a mask inverted?"
        )
    return {name: found[name] for name in index.names if name in found}


def check_roles(
    index: ParameterIndex, patterns: Mapping[str, SparsePattern], full: Sequence[str]
) -> None:
    """Raise AttachError if a weight would be trained twice, or not exactly.

    Args:
        index: of the model.
        patterns: what is masked.
        full: canonical names of what is trained densely.
    """
    both = [n for n in full if n in patterns]
    if both:
        raise AttachError(
            f"{both[0]!r} is in full_params and has a mask; a weight is trained one way or the "
            "other. Leave it out of one of them."
        )
    for name in full:
        parameter = index.get(name)
        if not (parameter.is_floating_point() or parameter.dtype.is_complex) or parameter.is_meta:
            raise AttachError(
                f"{name!r} is in full_params but is {parameter.dtype} on {parameter.device}, which "
                "cannot require grad. Narrow the glob."
            )
    check_overlaps(index, patterns)


def warn_if_dense(
    patterns: Mapping[str, SparsePattern], weights: Mapping[str, nn.Parameter]
) -> None:
    """Warn where masks keep so much that training the tensors whole is likely cheaper.

    Args:
        patterns: name -> where it is trained.
        weights: name -> its parameter.

    Trained state is counted as AdamW's: index, base, leaf, gradient and two moments an entry
    (24 bytes for an fp32 weight), against gradient and two moments a weight (12 bytes).
    """
    nnz = sum(pattern.nnz for pattern in patterns.values())
    size = sum(math.prod(pattern.shape) for pattern in patterns.values())
    if nnz <= _DENSE * size:
        return
    if any(is_opaque(w) and not is_sharded(w) for w in weights.values()):
        return  # a quantised weight cannot be trained whole: there is nothing to compare with
    sparse = dense = 0
    for name, pattern in patterns.items():
        item = weights[name].element_size()
        wide = max(item, 4)
        sparse += pattern.nnz * (pattern.indices.element_size() + item + 4 * wide)
        dense += weights[name].numel() * 3 * item
    logger.warning(
        "masks keep %.1f%% of the masked tensors (%s of %s entries). Above %.0f%% a dense run is "
        "likely the cheaper one: trained state with AdamW is %s here (%.0f bytes an entry) and %s "
        "with these tensors trained whole (%.0f bytes a weight), without a gather and a scatter in "
        "each step. `sparseft profile` compares both. Choose a lower density, or full_params.",
        100 * nnz / size, f"{nnz:,}", f"{size:,}", 100 * _DENSE,
        human_bytes(sparse), sparse / nnz, human_bytes(dense), dense / size,
    )  # fmt: skip
