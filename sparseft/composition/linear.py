"""``linear``: the weighted sum of the diffs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseft.composition.registry import Term, register_method

__all__ = ["compose_linear"]


@register_method("linear", reference="https://arxiv.org/abs/2110.07560")
def compose_linear(terms: Sequence[Term], size: int) -> Tensor:
    """Sum of coefficient times diff.

    ``out[j] = sum over i of rn(coeff_i * value_ij)``, in canonical order.

    Args:
        terms: the adapters' shares, in canonical order.
        size: entries of the union.

    Returns:
        (size,) float32, or float64 if any values are.

    Numerics: coefficients are rounded to the accumulation dtype; product and sum are rounded
    separately (no fused multiply-add). The sum starts at -0.0, which leaves every addend as it is,
    zeros of either sign included.
    """
    wide = torch.float64 if any(t.values.dtype == torch.float64 for t in terms) else torch.float32
    out = torch.full((size,), -0.0, dtype=wide, device=terms[0].values.device)
    for term in terms:
        values = term.values.detach().to(wide)
        if term.coeff != 1:
            values = values * term.coeff
        if term.positions is None:
            out += values
        else:
            # Positions are unique within a term, so this is one addition per entry, in this order.
            out.index_add_(0, term.positions, values)
    return out
