"""``consensus``: the sum, where enough adapters recognise it as theirs."""

from __future__ import annotations

from sparseft.composition.preparation import check_whole
from sparseft.composition.registry import Recipe, register_method
from sparseft.errors import OptionError
from sparseft.ops.combine import Rule

__all__ = ["compose_consensus"]


@register_method("consensus", reference="https://arxiv.org/abs/2405.07813")
def compose_consensus(*, least: int = 2, strength: float = 0.4) -> Recipe:
    """The sum where at least so many adapters recognise it as theirs, elsewhere the base.

    Consensus Merging over task arithmetic (Wang et al. 2024): adapter i's TALL mask holds the
    entries with ``|w_i| >= strength * |t - w_i|``, where ``w_i = coeff_i * diff_i`` and ``t`` is
    the sum of all; the sum stays where at least ``least`` masks agree.

    Args:
        least: masks that must agree. 2, the paper's, removes what no adapter needs ("catastrophic")
            and what one alone needs ("selfish"): of adapters that share no entry nothing is left,
            so disjoint ones want 1, which removes only the first. At most the number of adapters
            with a coefficient other than 0 is asked for; one adapter is left as it is.
        strength: the mask's lambda; the larger, the fewer entries are recognised. The paper chooses
            it by validation, per task, among 0.2, 0.3, 0.4, 0.5 and 0.6; the default is the middle.

    Raises:
        OptionError: an option out of range.
    """
    least = check_whole("least", least, least=1, what="how many adapters must agree")
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise OptionError(f"strength is {strength!r}, wanted a finite number >= 0.")
    return Recipe(rule=Rule("consensus", least=least, strength=float(strength)))
