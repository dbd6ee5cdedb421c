"""``dare_linear`` and ``dare_ties``: drop entries at random, rescale the others."""

from __future__ import annotations

from sparseft.composition.preparation import check_seed, check_share, drop
from sparseft.composition.registry import Recipe, register_method
from sparseft.ops.combine import Mean, Rule, Vote

__all__ = ["compose_dare_linear", "compose_dare_ties"]

_DENSITY = "the probability with which an entry stays"


@register_method("dare_linear", reference="https://arxiv.org/abs/2311.03099")
def compose_dare_linear(*, density: float = 1.0, seed: int = 0) -> Recipe:
    """Drop entries at random and rescale the others, then sum.

    DARE (Yu et al. 2023, section 3) with task arithmetic: an entry is dropped with probability
    ``p = 1 - density``, the others are divided by ``1 - p``, so that expectations stay.

    Args:
        density: probability with which an entry of an adapter stays, in (0, 1]. The default drops
            nothing, which is `linear`; the paper drops 90 % of dense task vectors, and more.
        seed: any integer. An entry's fate follows from (seed, content of its adapter, name of its
            tensor, flat index) and from nothing else: not from other adapters, the order of calls,
            device, memory layout or any generator's state. Adapters of equal content lose the same
            entries.

    Differences to mergekit 0.1.5, on purpose:
        It draws from torch's global generator, so that a model's mask depends on what was drawn
        before; and with ``rescale: true`` it restores the L1 norm that the dropped values took
        away, by one factor per tensor that depends on the draw, instead of ``1 / density``.

    Raises:
        OptionError: an option out of range.
    """
    density, seed = check_share("density", density, what=_DENSITY), check_seed(seed)
    return Recipe(rule=Rule("sum"), prepare=drop(density, seed))


@register_method("dare_ties", reference="https://arxiv.org/abs/2311.03099")
def compose_dare_ties(
    *, density: float = 1.0, seed: int = 0, vote: Vote = "sum", mean: Mean = "count"
) -> Recipe:
    """Drop entries at random and rescale the others, then elect a sign per entry.

    DARE (Yu et al. 2023, section 3) before TIES-Merging, whose trimming it replaces.

    Args:
        density, seed: as in `dare_linear`.
        vote, mean: as in `ties`. mergekit's ``dare_ties`` does not normalise: ``mean="none"``.

    Differences to mergekit 0.1.5: those of `dare_linear` and of `ties`.

    Raises:
        OptionError: an option out of range.
    """
    density, seed = check_share("density", density, what=_DENSITY), check_seed(seed)
    return Recipe(rule=Rule("elect", vote=vote, mean=mean), prepare=drop(density, seed))
