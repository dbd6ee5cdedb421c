"""Refuse ``resize_token_embeddings`` of a transformers model whose embeddings have a mask.

It replaces the memory of one tensor, then the module around another, and ties them by assigning
what it reads: half done, it stops at torch's "Cannot assign non-leaf Tensor". So it is asked first.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from sparseft.errors import AttachError
from sparseft.modules.class_swap import masked_attributes
from sparseft.modules.names import end_embeddings

__all__ = ["guard_resizing", "unguard_resizing"]

_METHOD = "resize_token_embeddings"


def _resize(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    for embeddings in end_embeddings(model):
        masked = masked_attributes(embeddings).get("weight")
        if masked is not None and new_num_tokens not in (None, masked.weight.shape[0]):
            raise AttachError(
                f"cannot resize {masked.name!r} from {masked.weight.shape[0]} to {new_num_tokens} "
                "rows: it has a mask attached. Resize before attach; or keep attachment.adapter(), "
                "detach(), resize and attach masks of the new shape."
            )
    return getattr(type(model), _METHOD)(model, new_num_tokens, *args, **kwargs)


def guard_resizing(model: nn.Module) -> None:
    """Put the question in front of the method, in every model inside."""
    for module in model.modules():
        if callable(getattr(type(module), _METHOD, None)):
            module.__dict__[_METHOD] = functools.partial(_resize, module)


def unguard_resizing(model: nn.Module) -> None:
    """Undo `guard_resizing`; in a deep copy, too, where it is a copy."""
    for module in model.modules():
        if getattr(module.__dict__.get(_METHOD), "func", None) is _resize:
            del module.__dict__[_METHOD]
