"""What an attachment trains: its leaves and full parameters, in the forms that loops ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.diff import SparsePattern
from sparseft.modules.full_params import FullParameter
from sparseft.modules.leaves import MaskedParameter, leaf_attribute
from sparseft.modules.mask_report import MaskReports, report_masks
from sparseft.modules.weight_storage import full_value, is_sharded

__all__ = ["Trained"]


class Trained:
    """The part of an `Attachment` that hands out what is trained."""

    _masked: dict[str, MaskedParameter]
    _full: list[FullParameter]

    @property
    def names(self) -> list[str]:
        """Canonical names of the masked parameters, in order of the model."""
        return list(self._masked)

    @property
    def leaves(self) -> dict[str, nn.Parameter]:
        """Masked parameter name -> its compact leaf, (nnz,) fp32."""
        return {name: masked.leaf for name, masked in self._masked.items()}

    @property
    def patterns(self) -> dict[str, SparsePattern]:
        """Masked parameter name -> where it is trained."""
        return {name: masked.pattern for name, masked in self._masked.items()}

    @property
    def full_params(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained densely, by name."""
        return {f.name: f.parameter for f in self._full}

    @property
    def nnz(self) -> int:
        """Number of trained entries, full parameters aside."""
        return sum(masked.pattern.nnz for masked in self._masked.values())

    @property
    def density(self) -> float:
        """nnz over all entries of the masked tensors."""
        return self.nnz / sum(math.prod(m.pattern.shape) for m in self._masked.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of what an optimizer should get: leaves, then full parameters.

        Names are those of ``model.named_parameters()``: the leaf of ``up.weight`` is
        ``up.diff_weight``.
        """
        for name, masked in self._masked.items():
            yield leaf_attribute(name), masked.leaf
        for f in self._full:
            yield f.name, f.parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimizer should get: leaves, then full parameters."""
        for _, parameter in self.named_parameters():
            yield parameter

    def l1_norm(self) -> Tensor:
        """Return the sum of absolute diffs, a differentiable 0-d tensor (an L1 penalty)."""
        sums = [masked.leaf.abs().sum() for masked in self._masked.values()]
        return torch.stack([s.to(sums[0]) for s in sums]).sum()

    def report(self) -> MaskReports:
        """Describe each masked parameter: size, density, how far it has moved; prints as a table.

        A list of `MaskReport`, with ``total`` and ``to_markdown()``.
        """
        return report_masks(self._masked.values())

    def param_groups(self) -> list[dict[str, Any]]:
        """Return what an optimizer should get as groups of one kind of tensor each.

        One group; two where ``fully_shard`` has cut full parameters, which are DTensors: torch's
        optimizers with ``foreach`` or ``fused`` do not take both in one group.
        """
        whole = [p for p in self.parameters() if not is_sharded(p)]
        cut = [p for p in self.parameters() if is_sharded(p)]
        return [{"params": kind} for kind in (whole, cut) if kind]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that their norm together is at most ``max_norm``.

        As ``torch.nn.utils.clip_grad_norm_(sparse.parameters(), max_norm)``, which does not take
        full parameters that ``fully_shard`` has cut beside leaves. With those, a collective.

        Returns:
            The norm before, the same on every process.

        Numerics: without those torch's function, bit for bit.
        """
        kinds = [group["params"] for group in self.param_groups()]
        norms = []
        for kind in kinds:
            grads = [p.grad for p in kind if p.grad is not None]
            if grads:
                norms.append(full_value(torch.nn.utils.get_total_norm(grads, norm_type)))
        if not norms:
            return torch.zeros(())
        total = norms[0]
        if len(norms) > 1:
            total = torch.linalg.vector_norm(torch.stack([n.to(total) for n in norms]), norm_type)
        for kind in kinds:
            torch.nn.utils.clip_grads_with_norm_(kind, max_norm, total)
        return total
