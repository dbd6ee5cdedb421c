"""Diffs written into a layer's weight and taken off again: what PEFT calls merging.

Merged weights are always ``rn(base + sum of all merged adapters)``, made from the base's own
entries, which are kept: the order of merging does not count, and unmerging is a copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparseft._integrity import find_value_fault
from sparseft.errors import CompositionError
from sparseft.modules.separate import is_opaque
from sparseft.ops import gather_entries, sum_entries, write_entries_

if TYPE_CHECKING:
    from peft.tuners._buffer_dict import BufferDict

__all__ = ["ATTRS", "Merging"]

ATTRS = ("weight", "bias")


class Merging:
    """The part of `SparseFtLayer` that writes into the base layer."""

    name: str
    merged_adapters: list[str]
    # Of the merged adapters' entries: attribute -> positions, and what the base had there.
    _under: dict[str, tuple[Tensor, Tensor]]

    if TYPE_CHECKING:  # the layer's own

        @property
        def stock(self) -> Any: ...
        @property
        def merged(self) -> bool: ...
        def indices_of(self, attr: str) -> BufferDict: ...
        def summed(
            self, names: Sequence[str], attr: str
        ) -> tuple[Tensor | None, Callable[[], Tensor]]: ...
        def check_filled(self, names: Sequence[str]) -> None: ...

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the weight: ``rn(base + sum of all merged)``, in order of names.

        Args:
            safe_merge: refuse results that are not finite; the weight is then as before.
            adapter_names: which; default: the active ones.

        Raises:
            CompositionError: quantised storage; with ``safe_merge`` values that are not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [n for n in names if any(n in self.indices_of(attr) for attr in ATTRS)]
        if not names:
            return
        why = self.why_not_mergeable()
        if why is not None:
            raise CompositionError(why)
        self.check_filled(names)
        before = list(self.merged_adapters)
        self._restore()
        try:
            self._write([*before, *names], check=safe_merge)
        except CompositionError:
            self._write(before, check=False)
            raise

    def why_not_mergeable(self) -> str | None:
        """Return why nothing can be written into the weight, as a sentence with the way out."""
        base = self.stock
        for attr in ATTRS:
            weight: Any = getattr(base, attr, None)
            if not len(self.indices_of(attr)) or not is_opaque(weight):
                continue
            if isinstance(weight, DTensor):
                return (
                    f"{self.name}.{attr} is cut into shards by fully_shard, and PEFT merges whole "
                    "weights. Take adapter_of(model) on all ranks, and merge in a model that is "
                    "not sharded."
                )
            return (
                f"{self.name}.{attr} is quantised ({type(weight).__name__} of {weight.dtype}): "
                "nothing is merged into quantised storage, as entries would be rounded to its few "
                "values. Run unmerged; or export a dense model, "
                "sparseft.peft.merged_state_dict(model, dtype=torch.bfloat16); or load the base "
                "in bfloat16 and merge there."
            )
        return None

    def _write(self, names: list[str], *, check: bool) -> None:
        base, under, sums = self.stock, {}, {}
        for attr in ATTRS:
            indices, total = self.summed(names, attr)
            if indices is None:
                continue
            weight = getattr(base, attr)
            with torch.no_grad():
                here = indices.to(weight.device)
                held = gather_entries(weight.detach(), here)
                sums[attr] = sum_entries(held, total().to(weight.device), weight.dtype)
            fault = find_value_fault(sums[attr]) if check else None
            if fault is not None:
                raise CompositionError(
                    f"{self.name}.{attr} merged with {', '.join(names)} is not finite; {fault}. "
                    "Look for a loss that diverged; nothing was merged into this layer."
                )
            under[attr] = (here, held)
        for attr, (indices, _) in under.items():
            write_entries_(getattr(base, attr), indices, sums[attr])
        self._under, self.merged_adapters = under, list(names)

    def _restore(self) -> None:
        base = self.stock
        for attr, (indices, held) in self._under.items():
            weight = getattr(base, attr)
            # Cast where the model was cast since: rn(base), as the other entries are now.
            write_entries_(weight, indices.to(weight.device), held.to(weight.device, weight.dtype))
        self._under, self.merged_adapters = {}, []

    def unmerge(self) -> None:
        """Put back what the base had, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
