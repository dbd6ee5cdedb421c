"""``low_rank``: the principal weights, largest in the low-rank approximation of a weight (LIFT)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sparseft.denoise import Denoise, Treated, treat
from sparseft.selection.deltas_svd import scores_of, weights_of
from sparseft.selection.experts import ExpertByExpert
from sparseft.selection.registry import Candidates, Piece, pieces_of, register_selector

__all__ = ["DEFAULT_RANK", "select_low_rank"]

DEFAULT_RANK = 32


@register_selector(
    "low_rank",
    reference="https://arxiv.org/abs/2506.00772",
    zero="have score 0 (all entries of vectors and other tensors that are no matrices do)",
)
def select_low_rank(
    candidates: Candidates,
    *,
    rank: int | None = None,
    energy: float | None = None,
    hard: float | Literal["median"] | None = None,
    memory: int | str = "1GiB",
) -> Iterator[Piece]:
    """Keep the largest entries of each weight's best low-rank approximation (LIFT); no training.

    ``|W_r|`` is ranked, W_r the truncated SVD of the matrix W: the largest are kept. (The code that
    was released with LIFT keeps the *smallest* under the names its scripts use; only names that
    contain "largest" select as the paper says.)

    Only matrices are scored, those of stacked experts one by one. Entries of vectors and of other
    tensors of more dimensions score 0, so that they are kept last, which is logged; the paper takes
    linear layers alone: leave embeddings out with ``exclude``.

    Args:
        candidates: parameters.
        rank: of the approximation; 32 if neither ``energy`` nor ``hard`` is given.
        energy: or the fewest singular values with this share of the sum of all squares.
        hard: or those above the Gavish-Donoho threshold: ``"median"``, or the noise's standard
            deviation.
        memory: for the decomposition, as in `sparseft.Denoise`.

    Raises:
        DecompositionError: a NaN or infinite weight; names the tensor.
        OptionError: two rules, or a value out of range.

    Numerics: as `sparseft.ops.truncated_svd`: entries whose ``|W_r|`` agree to fp32 rounding may
        change places.
    """
    if rank is None and energy is None and hard is None:
        rank = DEFAULT_RANK
    how = Denoise.of_method(
        "low_rank", rank=rank, energy=energy, hard=hard, residual=0, target="weight", memory=memory
    )
    experts = ExpertByExpert(candidates)
    return experts.together(_pieces(treat(experts.apart(weights_of(candidates, None)), how)))


def _pieces(stream: Iterator[Treated]) -> Iterator[Piece]:
    for item in stream:
        if item.theta1.ndim == 2:
            yield from scores_of(item, "weight")
            continue
        for part in pieces_of(item.theta1.numel()):
            nothing = item.theta1.new_zeros(part.stop - part.start)
            yield Piece(item.name, part.start, nothing)
