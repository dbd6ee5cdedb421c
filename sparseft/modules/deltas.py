"""What compositions change, parameter by parameter and row by row: what `separate.Site` adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft.ops import RowGroups
from sparseft.ops._streams import Readers

if TYPE_CHECKING:
    from sparseft.modules.separate import Site

__all__ = ["Applied", "Blend", "Delta", "Group", "Pass", "spread"]


def _ordinary() -> torch.inference_mode:
    """Tensors made here are kept, and may be saved for backward by a later call."""
    return torch.inference_mode(False)


def spread(indices: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a diff of a one-dimensional parameter, dense."""
    return values.new_zeros(tuple(shape)).index_put((indices.long(),), values)


@dataclass(frozen=True, eq=False)
class Delta:
    """What one composition does to one parameter.

    Args:
        indices: (nnz,) flat positions, ascending.
        values: (nnz,) fp32 or fp64, added there; or a function that computes them anew, where they
            are being trained.
        shape: of the parameter.
        dtype: of the parameter.
        base: (nnz,) what the parameter held there, where ``values`` were made from that.
        replaced: the whole new tensor instead, with no ``indices`` and ``values``.
        spread: the change of all of a one-dimensional parameter, dense; made with the rest, because
            it needs one address (the kernels' tables are kept by address) on whatever stream.
        readers: streams that read these tensors.
    """

    indices: Tensor
    values: Tensor | Callable[[], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    base: Tensor | None = None
    replaced: Tensor | None = None
    spread: Tensor | None = None
    readers: Readers = field(default_factory=Readers, repr=False)

    def now(self) -> Tensor:
        """Return the values."""
        return self.values if isinstance(self.values, Tensor) else self.values()

    def vector(self, base: Tensor) -> Tensor:
        """Return all of a one-dimensional parameter's change, dense, in fp32 or fp64."""
        if self.replaced is not None:
            wide = torch.promote_types(base.dtype, torch.float32)
            return self.replaced.to(base.device, wide) - base.detach().to(wide)
        return spread(self.indices, self.now(), self.shape) if self.spread is None else self.spread

    def read(self) -> None:
        """Call on the stream that is about to read any of this."""
        values = self.values if isinstance(self.values, Tensor) else None
        tensors = self.indices, values, self.replaced, self.spread
        self.readers.note(self.indices.device, *tensors)


Blend = Mapping[str, Delta]  # one composition: canonical parameter name -> its delta


class Pass(NamedTuple):
    """What is known of a model's forward under way.

    Args:
        entry: the module whose forward it is.
        rows: of its batch; None: unknown.
        seen: ids of the sites that ran.
        sizes: how long dim 0 is where batch and positions are flattened into it.
    """

    entry: nn.Module
    rows: int | None
    seen: set[int]
    sizes: set[int]


class Group(NamedTuple):
    weight: Delta | None
    bias: Delta | None
    rows: tuple[int, ...]  # of the batch; () where the whole batch is one group


class Applied:
    """The compositions in force: one for the whole batch, or one per row.

    Args:
        blends: the distinct compositions.
        row_of: for each row of the batch, which; None: the first for all, however many there are.
        repeat: how many rows, one after another, stand for one of those where a layer's batch was
            repeated (beams). In ``(batch * repeat, L)`` they are ``(batch, repeat * L)``, so that
            rows below are always those of ``row_of``.
    """

    def __init__(
        self, blends: Sequence[Blend], row_of: Sequence[int] | None = None, repeat: int = 1
    ) -> None:
        self.blends = list(blends)
        self.row_of = None if row_of is None else tuple(row_of)
        self.repeat = repeat
        self.names = sorted({name for blend in blends for name in blend})
        self._groups: dict[Site, list[Group]] = {}
        self._orders: dict[tuple[Any, ...], tuple[RowGroups, list[Tensor], Readers]] = {}
        self._places: dict[tuple[Any, ...], tuple[Tensor, Readers]] = {}
        self._empty: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def batch(self) -> int | None:
        """Rows of the batch; None where any number will do."""
        return None if self.row_of is None else len(self.row_of)

    def takes(self, rows: int) -> bool:
        """Whether a batch may have so many rows."""
        return self.batch is None or rows in (self.batch, self.batch * self.repeat)

    def groups(self, site: Site) -> list[Group]:
        """Return the rows of a site by what they change there; rows that change nothing left out.

        One group with no rows listed is all of the batch.
        """
        found = self._groups.get(site)
        if found is None:
            found = self._groups[site] = self._group(site)
        return found

    def _group(self, site: Site) -> list[Group]:
        def of(blend: Blend, name: str | None) -> Delta | None:
            return None if name is None else blend.get(name)

        pairs = [(of(blend, site.weight), of(blend, site.bias)) for blend in self.blends]
        row_of = (0,) if self.row_of is None else self.row_of
        rows: dict[tuple[int, int], list[int]] = {}
        kept = {}
        for row, at in enumerate(row_of):
            key = id(pairs[at][0]), id(pairs[at][1])
            rows.setdefault(key, []).append(row)
            kept[key] = pairs[at]
        made = [
            Group(weight, bias, tuple(rows[key]))
            for key, (weight, bias) in kept.items()
            if weight is not None or bias is not None
        ]
        if len(made) == 1 and len(made[0].rows) == len(row_of):
            return [made[0]._replace(rows=())]
        return made

    def order(
        self, rows: tuple[tuple[int, ...], ...], device: torch.device
    ) -> tuple[RowGroups, list[Tensor]]:
        """Return groups of rows as the ops take them, and each group's rows, on a device."""
        key = (rows, device)
        if key not in self._orders:
            with _ordinary():
                made = RowGroups.of(rows, self.batch or 0, device)
                each = [torch.tensor(r, dtype=torch.long).to(device) for r in rows]
            self._orders[key] = made, each, Readers()
        made, each, readers = self._orders[key]
        readers.note(device, made.order, *each)
        return made, each

    def group_of(self, rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
        """Return (batch,) the group of each row; the number of groups for rows of none."""
        key = (rows, device)
        if key not in self._places:
            at = [len(rows)] * (self.batch or 0)
            for place, group in enumerate(rows):
                for row in group:
                    at[row] = place
            with _ordinary():
                self._places[key] = torch.tensor(at).to(device), Readers()
        places, readers = self._places[key]
        readers.note(device, places)
        return places

    def nothing(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return indices and values of a diff without entries, always the same tensors."""
        if device not in self._empty:
            with _ordinary():
                none = torch.empty(0, device=device)
                self._empty[device] = none.int(), none
        return self._empty[device]
