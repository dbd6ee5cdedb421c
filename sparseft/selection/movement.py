"""``movement``: the entries that moved away from zero (movement pruning)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparseft.ops.score_keys import flat_part
from sparseft.selection.magnitude import pairs_of
from sparseft.selection.registry import Candidates, Piece, pieces_of, register_selector
from sparseft.selection.source import Source

__all__ = ["select_movement"]


@register_selector(
    "movement",
    reference="https://arxiv.org/abs/2005.07683",
    zero="did not move away from zero",
)
def select_movement(
    candidates: Candidates, *, base: Source, tuned: Source | None = None
) -> Iterator[Piece]:
    """Keep what training moved furthest away from zero: ``(theta1^2 - theta0^2) / 2``.

    Movement pruning (Sanh, Wolf, Rush 2020) adds up ``S = -sum g * theta`` over training, entry by
    entry. Under gradient flow, where ``d theta = -g dt``, that is the integral of
    ``theta d theta``, so ``(theta1^2 - theta0^2) / 2`` whatever the way between the two: it is
    computed from the two models, and no training loop has to be watched. With finite steps, or an
    optimizer that scales the gradient, it is the integral along the way that training took. Entries
    that moved towards zero (S < 0) have score 0 and rank last.

    Args:
        candidates: parameters; theta1 unless ``tuned`` is given.
        base: theta0, in the forms that ``magnitude`` takes.
        tuned: theta1, likewise.

    Raises:
        MaskError: as ``magnitude``.

    Numerics: ``(theta1 - theta0) * (theta1 + theta0) / 2`` in fp32 (fp64 if either side is fp64),
    so that small moves of large weights keep their digits.

    Example:
        >>> import sparseft, torch
        >>> before = {"weight": torch.tensor([[1.0, 1.0, 0.1]])}
        >>> after = {"weight": torch.tensor([[0.2, 1.3, 0.5]])}
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> masks = sparseft.select(layer, "movement", nnz=1, base=before, tuned=after)
        >>> masks["weight"].indices.tolist()
        [1]
    """
    for name, theta1, theta0 in pairs_of(candidates, base, tuned):
        double = torch.float64 in (theta1.dtype, theta0.dtype)
        wide = torch.float64 if double else torch.float32
        for part in pieces_of(theta1.numel()):
            new = flat_part(theta1, part).to(wide)
            old = flat_part(theta0, part).to(new)
            score = (new - old).mul_(new + old).mul_(0.5).clamp_(min=0)
            yield Piece(name, part.start, score)
