"""Which parameter gets which mask: names resolved, shapes and roles checked, before any change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparseft.diff import MaskLike, SparseDiff, SparsePattern, as_pattern
from sparseft.errors import AttachError, MaskError
from sparseft.modules.names import ParameterIndex
from sparseft.modules.refusals import check_maskable, check_overlaps

__all__ = ["check_roles", "resolve_masks"]


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
        pattern = as_pattern(mask, name=name, shape=parameter.shape)
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
