"""``breadcrumbs``: leave out the smallest entries and the largest ones, then sum."""

from __future__ import annotations

from sparseft.composition.preparation import check_share, trim
from sparseft.composition.registry import Recipe, register_method
from sparseft.errors import OptionError
from sparseft.ops.combine import Rule

__all__ = ["compose_breadcrumbs"]


@register_method("breadcrumbs", reference="https://arxiv.org/abs/2312.06795")
def compose_breadcrumbs(*, density: float = 1.0, gamma: float = 0.01) -> Recipe:
    """Leave out the largest and the smallest entries, then sum.

    Model Breadcrumbs (Davari & Belilovsky 2023, section 3): in every tensor the outliers and the
    negligible perturbations are masked, the rest is added with the adapter's coefficient.

    Args:
        density: share of each adapter's own entries of a tensor that stays, in (0, 1]; the nearest
            whole number, one at least. The default keeps all, which is `linear`.
        gamma: share of the entries, rounded down, that counts as outliers, in [0, 1). They go
            first, then the smallest until ``density`` remains; of equal magnitudes the lower flat
            index counts as the larger. Where both cannot be had (``density + gamma > 1``) density
            is kept and fewer outliers go, as in mergekit.

    Raises:
        OptionError: an option out of range.
    """
    density = check_share("density", density, what="the share of an adapter's entries that stays")
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 <= gamma < 1:
        raise OptionError(
            f"gamma is {gamma!r}, wanted a number in [0, 1): the share of an adapter's entries, "
            "the largest, that is left out."
        )
    return Recipe(rule=Rule("sum"), prepare=trim(density, outliers=float(gamma)))
