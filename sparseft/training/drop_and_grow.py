"""Which entries a reselection drops and which it grows: pure functions of diffs and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.diff import SparsePattern
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.transplant import Moves
from sparseft.ops import topk_patterns

__all__ = ["DROP", "RATES", "Found", "candidate_counts", "counts_to_move", "drop_and_grow"]

# How the share of entries that move falls from 1 at progress 0 to 0 at progress 1.
RATES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}

# How useful an entry of the mask is; the least useful ones are dropped.
DROP: dict[str, Callable[[MaskedParameter], Tensor]] = {
    "diff": lambda masked: masked.leaf.detach().abs(),
    "weight": lambda masked: (masked.base.to(masked.leaf.dtype) + masked.leaf.detach()).abs_(),
}


class Found(NamedTuple):
    """Candidates of one tensor: (n,) ascending flat indices, and the gradients there."""

    indices: Tensor
    scores: Tensor


def counts_to_move(nnz: Mapping[str, int], rate: float, scope: str) -> dict[str, int]:
    """Return how many entries of each tensor may move; for "global" all of them, by name "".

    At least one entry of each tensor stays.
    """
    if scope == "global":
        total = sum(nnz.values())
        return {"": min(int(rate * total), total - len(nnz))}
    return {name: min(int(rate * count), count - 1) for name, count in nnz.items()}


def candidate_counts(
    patterns: Mapping[str, SparsePattern], rate: float, scope: str, factor: float
) -> dict[str, int]:
    """Return how many candidates each tensor needs, tensors that need none left out.

    ``factor`` times the entries that it may grow; under "global" a tensor's part of all that grow
    is taken to be its part of the model's entries.
    """
    moving = counts_to_move({n: p.nnz for n, p in patterns.items()}, rate, scope)
    numel = sum(p.numel for p in patterns.values())
    out = {}
    for name, pattern in patterns.items():
        share = moving[""] * pattern.numel / numel if scope == "global" else moving[name]
        count = min(math.ceil(factor * share), pattern.numel - pattern.nnz)
        if count > 0:
            out[name] = count
    return out


def _outside(pattern: SparsePattern, found: Found) -> Found:
    """Leave out candidates that the mask has taken in since they were named."""
    inside = Moves.between(pattern.indices, found.indices.to(pattern.indices)).new
    if not inside.numel():
        return found
    keep = torch.ones(found.indices.numel(), dtype=torch.bool, device=inside.device)
    keep[inside] = False
    return Found(found.indices[keep], found.scores[keep])


def drop_and_grow(
    masks: Mapping[str, MaskedParameter],
    found: Mapping[str, Found],
    *,
    rate: float,
    scope: str,
    drop: str,
) -> dict[str, SparsePattern]:
    """Return the new patterns of the tensors that change.

    Args:
        masks: what is masked, in canonical order, which decides ties under "global".
        found: candidates; those in the mask, or whose gradient is 0, are never grown.
        rate: share of the entries that move, below 1; fewer where candidates lack.
        scope: "tensor" (each keeps its count) or "global" (the total is kept).
        drop: a name of `DROP`.

    Returns:
        name -> pattern. Exactly as many entries are grown as dropped. Ties, in both: the entry with
        the lower flat index is kept, or grown.
    """
    found = {n: _outside(masks[n].pattern, f) for n, f in found.items()}
    moving = counts_to_move({n: m.pattern.nnz for n, m in masks.items()}, rate, scope)
    groups = [list(masks)] if scope == "global" else [[name] for name in masks]
    new: dict[str, SparsePattern] = {}
    for names in groups:
        offered = [(n, found[n].scores.abs()) for n in names if n in found]
        useful = sum(int((scores > 0).sum()) for _, scores in offered)
        count = min(moving["" if scope == "global" else names[0]], useful)
        if count <= 0:
            continue
        scores = [(n, DROP[drop](masks[n])) for n in names]
        if scope == "global":
            for _, score in scores:
                score[score.argmax()] = math.inf  # the best entry of each tensor stays
        kept = topk_patterns(scores, sum(s.numel() for _, s in scores) - count)
        grown = topk_patterns(offered, count)
        for name in names:
            old = masks[name].pattern
            more = grown[name].indices.long() if name in grown else None
            if kept[name].nnz == old.nnz and (more is None or not more.numel()):
                continue
            parts = [old.indices[kept[name].indices.long()]]
            if more is not None:
                parts.append(found[name].indices[more].to(old.indices))
            new[name] = SparsePattern._trusted(torch.cat(parts).sort().values, old.shape)
    return new
