"""``della``: drop small entries more often than large ones, elect a sign, average."""

from __future__ import annotations

from typing import get_args

from sparseft.composition.preparation import (
    Ranks,
    check_choice,
    check_seed,
    check_share,
    drop_by_rank,
)
from sparseft.composition.registry import Recipe, register_method
from sparseft.errors import OptionError
from sparseft.ops.combine import Mean, Rule, Vote

__all__ = ["compose_della"]


@register_method("della", reference="https://arxiv.org/abs/2406.11617")
def compose_della(
    *,
    density: float = 1.0,
    epsilon: float = 0.07,
    ranks: Ranks = "row",
    seed: int = 0,
    vote: Vote = "sum",
    mean: Mean = "count",
) -> Recipe:
    """Drop by rank of magnitude and rescale, then elect a sign per entry.

    DELLA-Merging (Deep et al. 2024): MAGPRUNE drops an entry with a probability ``p_i`` that falls
    with the rank of its magnitude and divides the others by ``1 - p_i``; then signs are elected and
    the agreeing values averaged, as in `ties`.

    Args:
        density: mean probability with which an entry stays, in (0, 1]. The default drops nothing.
        epsilon: half the width of the window of probabilities: the smallest entry stays with
            ``density - epsilon``, the largest with ``density + epsilon``, evenly by rank. Both must
            lie in (0, 1] unless density is 1. The default is half of the window of 0.14 in the
            authors' example; 0 makes it `dare_ties`.
        ranks: entries are ranked among those of the adapter in the same "row" (first dimension; the
            paper's better choice, and mergekit's way for matrices) or in the whole "tensor".
        seed: as in `dare_linear`.
        vote, mean: as in `ties`; mergekit's normalised default is ``mean="weights"``.

    Differences to mergekit 0.1.5, on purpose:
        There one factor per tensor restores the L1 norm of what was dropped, not ``1 / (1 - p_i)``;
        a row of one entry has no rank and stops the merge; numbers come from torch's global
        generator. Those of `ties` too.

    Raises:
        OptionError: an option out of range.
    """
    density = check_share("density", density, what="the mean probability with which entries stay")
    wide = 0.0 if density == 1 else 1.0
    if (
        isinstance(epsilon, bool)
        or not isinstance(epsilon, int | float)
        or not 0 <= epsilon < float("inf")
        or density - epsilon * wide <= 0
        or density + epsilon * wide > 1
    ):
        raise OptionError(
            f"epsilon is {epsilon!r} at density {density}, wanted a number >= 0 with density - "
            "epsilon > 0 and density + epsilon <= 1, between which the probabilities lie."
        )
    check_choice("ranks", ranks, get_args(Ranks))
    prepare = drop_by_rank(density, float(epsilon), ranks, check_seed(seed))
    return Recipe(rule=Rule("elect", vote=vote, mean=mean), prepare=prepare)
