"""``function``: scores or masks from the user's own function."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sparseft.errors import MaskError
from sparseft.modules.dense_view import DenseView
from sparseft.modules.weight_storage import full_value, is_sharded
from sparseft.selection.registry import Candidates, Piece, register_selector

__all__ = ["select_function"]


@register_selector("function", reference="https://arxiv.org/abs/2406.13175", kind="either")
def select_function(
    candidates: Candidates, *, fn: Callable[[str, nn.Parameter], Tensor]
) -> Iterator[Piece]:
    """Rank by ``fn(name, parameter)``: scores (larger is better), or a bool mask (True = keep).

    With a bool mask for every parameter, nnz and density may be left out: exactly the True entries
    are kept. With scores, or a count below the True entries, the best are kept, the earliest first.

    Args:
        candidates: parameters.
        fn: called once for each candidate, in order of names, without gradients; must return a
            tensor of the parameter's shape and leave the parameter as it is (a sharded one comes
            whole, a quantised one dense: copies).

    Raises:
        MaskError: another type, shape or dtype; negative scores.
    """
    for name, parameter in candidates.parameters.items():
        if is_sharded(parameter) or isinstance(parameter, DenseView):
            parameter = nn.Parameter(full_value(parameter), requires_grad=False)
        version = parameter._version
        with torch.no_grad():
            scores = fn(name, parameter)
        if parameter._version != version:
            raise MaskError(f"fn changed parameter {name!r}; it should only read it.")
        if not isinstance(scores, Tensor) or scores.shape != parameter.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise MaskError(
                f"fn({name!r}, ...) returned {got}, wanted a tensor of the parameter's shape "
                f"{tuple(parameter.shape)}: scores (larger is better) or a bool mask."
            )
        if scores.dtype != torch.bool and not scores.is_floating_point():
            raise MaskError(
                f"fn({name!r}, ...) returned {scores.dtype}, wanted floating scores or a bool mask."
            )
        yield Piece(name, 0, scores.detach().reshape(-1))
