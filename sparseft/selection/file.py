"""``file``: masks that were saved before, or those of an adapter."""

from __future__ import annotations

import os

from sparseft._text import did_you_mean
from sparseft.diff import SparsePattern
from sparseft.errors import MaskError
from sparseft.modules import ParameterIndex
from sparseft.modules.prefixes import find_name
from sparseft.selection.masks import Masks
from sparseft.selection.registry import Candidates, register_selector

__all__ = ["select_file"]


@register_selector("file", reference="https://huggingface.co/docs/safetensors", kind="patterns")
def select_file(
    candidates: Candidates, *, path: str | os.PathLike[str]
) -> dict[str, SparsePattern]:
    """Take the masks of a file: `Masks.save`'s, or an adapter (the entries of its diffs).

    Args:
        candidates: parameters; masks of others are an error.
        path: file or adapter folder.

    Raises:
        FileNotFoundError: nothing there.
        MaskError: damaged; or it holds a mask of something that is no candidate.
    """
    index = ParameterIndex(candidates.model)
    found: dict[str, SparsePattern] = {}
    for own, pattern in Masks.load(path).items():
        form = find_name(candidates.model, own, index.__contains__)
        name = index.resolve(form) if form is not None else None
        if name not in candidates.parameters:
            why = (
                "the model has no such parameter" if name is None else "include/exclude rule it out"
            )
            raise MaskError(
                f"{path} has a mask of {own!r}, but {why}."
                f"{did_you_mean(own, candidates.parameters)}"
            )
        if name in found:
            raise MaskError(f"{path} has two masks of {name!r} (a tied parameter); keep one.")
        found[name] = pattern.to(candidates.parameters[name].device)
    return found
