"""``magnitude_max``: at every entry the adapter that moves it most."""

from __future__ import annotations

from sparseft.composition.registry import Recipe, register_method
from sparseft.ops.combine import Rule

__all__ = ["compose_magnitude_max"]


@register_method("magnitude_max", reference="https://arxiv.org/abs/2407.06322")
def compose_magnitude_max() -> Recipe:
    """At every entry the largest weighted value.

    MagMax's maximum magnitude selection (Marczak et al. 2024): ``coeff_k * diff_k`` with ``k =
    argmax_i |coeff_i * diff_i|``, of equals the first in the canonical order of the adapters.
    Nothing is averaged, so entries that one adapter alone has come through whole. Equal
    coefficients are the paper's lambda.
    """
    return Recipe(rule=Rule("largest"))
