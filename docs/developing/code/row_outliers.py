"""``row_outliers``: the weights that stand out in their rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparseft.selection import Candidates, Piece, register_selector

__all__ = ["select_row_outliers"]


@register_selector("row_outliers", reference="https://arxiv.org/abs/2306.11695", zero="are 0")
def select_row_outliers(candidates: Candidates, *, power: float = 1.0) -> Iterator[Piece]:
    """Keep the weights that are largest against the others of their row.

    The score is ``(|w| / rms(row)) ** power``, so that a row of small weights has as good a chance
    as one of large weights. Rows run along the last dimension.

    Args:
        candidates: parameters.
        power: of the ratio; changes scores, not their order within a tensor.
    """
    for name, parameter in candidates.parameters.items():
        weight = parameter.detach()
        size = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
        if size.ndim:
            rms = size.square().mean(-1, keepdim=True).sqrt()
            size = size / rms.clamp_min(torch.finfo(size.dtype).tiny)
        yield Piece(name, 0, (size**power).reshape(-1))
