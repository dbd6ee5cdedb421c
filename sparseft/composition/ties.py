"""``ties``: trim, elect a sign for each entry, average what agrees with it."""

from __future__ import annotations

from sparseft.composition.preparation import check_share, trim
from sparseft.composition.registry import Recipe, register_method
from sparseft.ops.combine import Mean, Rule, Vote

__all__ = ["compose_ties"]


@register_method("ties", reference="https://arxiv.org/abs/2306.01708")
def compose_ties(*, density: float = 1.0, vote: Vote = "sum", mean: Mean = "count") -> Recipe:
    """Trim, elect a sign per entry, mean of what agrees with it.

    TIES-Merging (Yadav et al. 2023, algorithm 1): each adapter keeps its largest entries; at every
    entry the sign of the larger total magnitude, ``sgn(sum_i coeff_i * diff_i)``, is elected; the
    disjoint mean is taken over the adapters that have that sign. Equal coefficients are the paper's
    lambda.

    Args:
        density: share of each adapter's *own* entries of a tensor that stays, in (0, 1]; the
            nearest whole number, one at least, and of equal magnitudes the lower flat index. The
            default keeps all: adapters were trimmed when they were made. The paper and mergekit
            trim dense task vectors, of which ``density * nnz / numel`` is the same (mergekit's
            density 0.2 on an adapter of 5 % changes nothing).
        vote: who elects: the weighted values ("sum", the paper's) or one vote each ("count").
        mean: what the agreeing values' sum is divided by: their number ("count", the paper's), the
            sum of their coefficients' magnitudes ("weights", mergekit's ``normalize: true``), or
            nothing ("none", its ``normalize: false``).

    Differences to mergekit 0.1.5, on purpose:
        A sum of zero elects no sign and leaves the base as it is; there it elects plus, so that of
        two opposite values the positive one comes through. ``mean="weights"`` divides by the sum of
        magnitudes; there the signed weights are added, so that one model with weight -1 is merged
        as with 1, and weights 1 and -0.9 divide by 0.1. Sums are kept in fp32 and rounded once;
        there differences, products and quotients are each rounded to the weights' dtype, so that in
        bf16 one model with weight 1 does not come back in every entry.

    Raises:
        OptionError: an option out of range.
    """
    density = check_share("density", density, what="the share of an adapter's entries that stays")
    return Recipe(rule=Rule("elect", vote=vote, mean=mean), prepare=trim(density))
