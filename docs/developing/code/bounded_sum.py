"""``bounded_sum``: the sum, held to the largest single contribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseft.composition import Recipe, Term, register_method

__all__ = ["compose_bounded_sum"]


@register_method("bounded_sum", reference="https://arxiv.org/abs/2212.04089")
def compose_bounded_sum(*, slack: float = 1.0) -> Recipe:
    """The sum, of at most the largest single magnitude at an entry.

    Where adapters agree, the plain sum moves an entry further than any of them was trained to. Here
    ``sum_i w_i`` is clipped to ``slack * max_i |w_i|``, with ``w_i = coeff_i * diff_i``.

    Args:
        slack: how far past the largest magnitude a sum may go; 1 or more.
    """
    return Recipe(rule=lambda terms, size: _bounded(terms, size, slack))


def _bounded(terms: Sequence[Term], size: int, slack: float) -> Tensor:
    wide = torch.promote_types(terms[0].values.dtype, torch.float32)
    total = torch.full((size,), -0.0, dtype=wide, device=terms[0].values.device)
    most = torch.zeros_like(total)
    for term in terms:  # in canonical order: the same bits whoever asks
        weighted = term.values.to(wide) * term.coeff
        at = slice(None) if term.positions is None else term.positions.long()
        total[at] += weighted
        most[at] = torch.maximum(most[at], weighted.abs())
    return torch.where(total.abs() > slack * most, (slack * most).copysign(total), total)
