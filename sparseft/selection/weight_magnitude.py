"""``weight_magnitude``: the largest weights themselves, or the smallest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseft.errors import OptionError
from sparseft.modules.weight_storage import full_value
from sparseft.ops.score_keys import flat_part
from sparseft.selection.registry import Candidates, Piece, pieces_of, register_selector

__all__ = ["select_weight_magnitude"]


@register_selector("weight_magnitude", reference="https://arxiv.org/abs/2506.00772", zero="are 0")
def select_weight_magnitude(candidates: Candidates, *, largest: bool = True) -> Iterator[Piece]:
    """Keep the largest weights ``|theta|`` as they are now; needs no training and no base.

    Args:
        candidates: parameters.
        largest: False keeps the smallest instead; zeros first, ties to the first by name and index
            as ever.

    Raises:
        OptionError: ``largest`` is no bool.

    Numerics: magnitudes in fp32, of fp64 weights in fp64. The smallest are ranked by the bits of
    the magnitude counted down from infinity's: their order is exact, also among subnormal numbers,
    but sums of such scores mean nothing, and methods that sum scores refuse them.

    Example:
        >>> import sparseft
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.1, -0.3, 0.2]]))
        >>> sparseft.select(layer, "weight_magnitude", nnz=2)["weight"].indices.tolist()
        [1, 2]
        >>> sparseft.select(layer, "weight_magnitude", nnz=1, largest=False)["weight"].indices
        tensor([0], dtype=torch.int32)
    """
    if not isinstance(largest, bool):
        raise OptionError(f"largest is {largest!r}, wanted True or False.")
    return _scores(candidates, largest)


def _scores(candidates: Candidates, largest: bool) -> Iterator[Piece]:
    for name, parameter in candidates.parameters.items():
        weight = full_value(parameter)
        wide = torch.promote_types(weight.dtype, torch.float32)
        for part in pieces_of(weight.numel()):
            size = flat_part(weight, part).to(wide).abs()
            yield Piece(name, part.start, size if largest else _reversed(size))


def _reversed(size: Tensor) -> Tensor:
    """Return floats in the opposite order of non-negative ones, infinity for 0; NaN stays NaN."""
    whole = torch.int64 if size.dtype == torch.float64 else torch.int32
    infinity = torch.full((), torch.inf, dtype=size.dtype, device=size.device)
    down = (infinity.view(whole) - size.contiguous().view(whole)).view(size.dtype)
    return torch.where(size.isnan(), size, down)
