"""The running sums of one tensor's gradients, at all entries or at candidates chosen on the way."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.diff import SparsePattern, index_dtype_for
from sparseft.errors import MaskError
from sparseft.modules._collective import Ranks
from sparseft.modules._gradient_tiles import Gradient, Scratch, pieces
from sparseft.modules.weight_storage import full_value
from sparseft.ops import StreamingTopK
from sparseft.ops._common import accumulation_dtype
from sparseft.ops.score_keys import flat_part

__all__ = ["OVERFLOW", "Rule", "TensorSums"]

logger = logging.getLogger(__name__)

# What to do about gradients that are not finite though the loss is.
OVERFLOW = (
    "fp16 overflows above 65,504, squares of fp32 above 1.8e19: run the model in fp32 or bf16, or "
    "divide the loss by a constant, which changes no order."
)


class Rule(NamedTuple):
    """What is summed, the same for every tensor.

    Args:
        square: square each batch's gradient first.
        weighted: rank candidates by the sum times the weight.
        accumulate: several backward calls may make one batch.
        skip: choose no candidates by a gradient that is NaN or infinite, instead of raising.
    """

    square: bool
    weighted: bool
    accumulate: bool
    skip: bool


class TensorSums:
    """Sums over batches of one tensor's gradient, or of its square.

    Args:
        name: in messages.
        ordinal: a number of its own, for processes that choose together.
        weight: the tensor; only read.
        rule: what is summed.
        candidates: at these entries; or at so many, chosen by the first gradient; or at all (None).
        excluded: never among the candidates.
        ranks, scratch: shared by all tensors.

    Attributes:
        pattern: the candidates; None while they are not chosen, or if all entries are summed.
        reached: whether any gradient came.
    """

    def __init__(
        self,
        name: str,
        ordinal: int,
        weight: Tensor,
        rule: Rule,
        candidates: int | SparsePattern | None,
        excluded: SparsePattern | None,
        ranks: Ranks,
        scratch: Scratch,
    ) -> None:
        self.name, self.weight = name, weight
        self.wide = accumulation_dtype(weight.dtype)
        self.reached = False
        self.pattern: SparsePattern | None = None
        self._ordinal, self._rule, self._ranks, self._scratch = ordinal, rule, ranks, scratch
        self._excluded = excluded
        self._count: int | None = None
        if isinstance(candidates, SparsePattern):
            self.pattern = candidates
        elif candidates is not None:
            free = weight.numel() - (0 if excluded is None else excluded.nnz)
            self._count = min(candidates, free)
            if self._count == free:
                self.pattern = self.allowed()
            elif not self._count:
                self.give_up_choosing()
        self._total: Tensor | None = None  # at the pattern, or (numel,)
        self._batch: Tensor | None = None  # this batch's gradient, where it is needed whole
        self._uses = self._arrivals = 0
        self._squared = False  # this batch's gradient is in the total already

    @property
    def choosing(self) -> bool:
        """Whether the candidates are still to be chosen."""
        return self.pattern is None and self._count is not None

    @property
    def waiting(self) -> bool:
        """Whether gradients came that no `step` has counted."""
        return self._arrivals > 0

    def allowed(self) -> SparsePattern:
        """Return every entry that is not excluded."""
        shape, device = self.weight.shape, self.weight.device
        if self._excluded is None:
            dtype = index_dtype_for(math.prod(shape))
            every = torch.arange(math.prod(shape), dtype=dtype, device=device)
            return SparsePattern._trusted(every, shape)
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        mask.view(-1)[self._excluded.indices.long()] = False
        return SparsePattern.from_mask(mask)

    # -- one batch ---

    def used(self) -> None:
        """Count a use in forward, so that `arrived` knows whether it sees a whole gradient."""
        # Checkpointing runs a forward again inside backward: the same use, if it was counted.
        if not self._uses or torch._C._current_graph_task_id() == -1:
            self._uses += 1

    def arrived(self, gradient: Gradient, *, layer: bool, more: bool = False) -> None:
        """Take in the gradient of one use.

        Args:
            gradient: its part of the batch's gradient.
            layer: it comes from a use that `used` counted.
            more: the weight is also read in a way that `used` does not see.
        """
        self._arrivals += 1
        self.reached = True
        alone = self._arrivals == 1 and self._uses == int(layer) and not more
        if self.choosing:
            if not alone and not self._rule.accumulate:
                self._hold(gradient)
                return
            self._choose(gradient.tiles(self._scratch))
        if self.pattern is not None:
            into = self._batch_sum() if self._rule.square else self._total_sum()
            into += gradient.at(self.pattern)
        elif not self._rule.square:
            gradient.add_to(self._total_sum(), self._scratch)
        elif alone and not self._rule.accumulate:
            total = self._total_sum()
            for start, tile in gradient.tiles(self._scratch):
                total[start : start + tile.numel()].addcmul_(tile, tile)
            self._squared = True
        else:
            self._hold(gradient)

    def _hold(self, gradient: Gradient) -> None:
        if self._squared:
            raise MaskError(
                f"another gradient of {self.name!r} came in a batch whose gradient was squared "
                "already: several backward calls before step(), or reentrant checkpointing of a "
                "weight used twice. Pass accumulate=True, which keeps one dense gradient."
            )
        gradient.add_to(self._batch_sum(), self._scratch)

    def step(self) -> None:
        """Count the batch."""
        if self._batch is not None:
            if self.choosing:
                whole, self._batch = self._batch, None
                self._choose(pieces(whole, self._scratch))
                if self.pattern is None:
                    raise RuntimeError("candidates were just chosen.")
                chosen = whole[self.pattern.indices.long()]
                into = self._batch_sum() if self._rule.square else self._total_sum()
                into += chosen
            if self._batch is not None and self._rule.square:
                self._total_sum().addcmul_(self._batch, self._batch)
                self._batch.zero_()
        self._uses = self._arrivals = 0
        self._squared = False

    def give_up_choosing(self) -> None:
        """Have no candidates: no gradient came while they could be chosen."""
        empty = torch.empty(0, dtype=torch.int64, device=self.weight.device)
        self.pattern = SparsePattern.from_indices(empty, tuple(self.weight.shape))

    # -- sums ---

    def _size(self) -> int:
        return self.weight.numel() if self.pattern is None else self.pattern.nnz

    def _zeros(self) -> Tensor:
        return torch.zeros(self._size(), dtype=self.wide, device=self.weight.device)

    def _total_sum(self) -> Tensor:
        if self._total is None:
            self._total = self._zeros()
        return self._total

    def _batch_sum(self) -> Tensor:
        if self._batch is None:
            self._batch = self._zeros()
        return self._batch

    def finish(self) -> Tensor:
        """Return the sums, over all processes."""
        self._batch = None
        return self._ranks.sum_(self._total_sum())

    # -- candidates ---

    def _choose(self, tiles: Iterable[tuple[int, Tensor]]) -> None:
        """Keep the best entries of the first gradient, exactly; ties to the lowest flat index."""
        self._ranks.meet(self._ordinal, repr(self.name), self.weight.device)
        top = StreamingTopK(self._count or 0)
        ordinals: list[int] = []  # of each piece's first entry, among those not excluded
        seen = 0
        weight = full_value(self.weight) if self._rule.weighted else self.weight
        for start, tile in tiles:
            if self._rule.square:
                tile.square_()
            self._ranks.sum_(tile)
            if self._rule.weighted:
                part = flat_part(weight, slice(start, start + tile.numel()))
                tile.mul_(part)
            tile = self._without_excluded(start, tile)
            if not _is_finite(tile):  # over all processes, so each comes here
                said = f"the gradient of {self.name!r} is NaN or infinite in the first batch"
                if not self._rule.skip:
                    raise MaskError(
                        f"{said}; candidates cannot be ranked by it. Is the loss finite there in "
                        f"every row? {OVERFLOW}"
                    )
                logger.warning("%s: it has no candidates", said)
                self.give_up_choosing()
                return
            top.add(str(len(ordinals)), tile, abs=True)
            ordinals.append(seen)
            seen += tile.numel()
        found = zip(top.finish().values(), ordinals, strict=True)
        places = torch.cat([pattern.indices.long() + first for pattern, first in found])
        if self._excluded is not None:
            # Before the j-th excluded entry e_j lie e_j - j others.
            excluded = self._excluded.indices.long()
            before = excluded - torch.arange(excluded.numel(), device=excluded.device)
            places += torch.searchsorted(before, places, right=True)
        shape = self.weight.shape
        self.pattern = SparsePattern._trusted(places.to(index_dtype_for(math.prod(shape))), shape)

    def _without_excluded(self, start: int, tile: Tensor) -> Tensor:
        if self._excluded is None:
            return tile
        indices = self._excluded.indices
        ends = torch.tensor([start, start + tile.numel()], device=indices.device)
        lo, hi = torch.searchsorted(indices, ends.to(indices.dtype)).tolist()
        keep = torch.ones(tile.numel(), dtype=torch.bool, device=tile.device)
        keep[indices[lo:hi].long() - start] = False
        return tile[keep]


def _is_finite(tile: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one read and without a mask as long as the tile."""
    return not tile.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tile))).all())
