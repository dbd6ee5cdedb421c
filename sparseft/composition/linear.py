"""``linear``: the weighted sum of the diffs."""

from __future__ import annotations

from sparseft.composition.registry import Recipe, register_method
from sparseft.ops.combine import Rule

__all__ = ["compose_linear"]


@register_method("linear", reference="https://arxiv.org/abs/2110.07560")
def compose_linear() -> Recipe:
    """Sum of coefficient times diff.

    ``base + sum_i coeff_i * diff_i``: task arithmetic (Ilharco et al. 2023, section 2) with
    coefficients, LT-SFT's composition (Ansell et al. 2022, equation 2) with 1.
    """
    return Recipe(rule=Rule("sum"))
