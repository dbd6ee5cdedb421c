"""``magnitude``: the entries that moved most (LT-SFT)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseft.errors import MaskError
from sparseft.selection.registry import Candidates, Piece, pieces_of, register_selector
from sparseft.selection.source import Source, TensorSource

__all__ = ["select_magnitude"]


@register_selector("magnitude", reference="https://arxiv.org/abs/2110.07560", zero="did not move")
def select_magnitude(
    candidates: Candidates, *, base: Source, tuned: Source | None = None
) -> Iterator[Piece]:
    """Keep the largest changes ``|theta1 - theta0|`` (Lottery Ticket Sparse Fine-Tuning).

    Args:
        candidates: parameters; theta1 unless ``tuned`` is given.
        base: theta0: a model, a mapping from name to tensor, or the path of a checkpoint, which is
            read lazily.
        tuned: theta1, in the same forms.

    Raises:
        MaskError: base and theta1 are one set of tensors in memory (``model.state_dict()`` makes no
            copies), so that no training could show.

    Numerics: differences are taken in fp32 (fp64 if either side is fp64), whatever the weights are.
    """
    before = TensorSource(base, candidates.model, "base")
    after = None if tuned is None else TensorSource(tuned, candidates.model, "tuned")
    shared = 0
    for name, parameter in candidates.parameters.items():
        shape = tuple(parameter.shape)
        theta1 = parameter.detach() if after is None else after.get(name, shape)
        theta0 = before.get(name, shape)
        shared += theta1.numel() == 0 or theta0.data_ptr() == theta1.data_ptr()
        # Not at the first: copies of a model may share what neither trains.
        if shared == len(candidates.parameters) and candidates.numel:
            raise MaskError(
                f"base holds the very tensors of the tuned model ({name!r} and all others share "
                "their memory), so nothing can have moved. model.state_dict() makes no copies: "
                "keep copy.deepcopy(model.state_dict()) before training."
            )
        wide = torch.promote_types(torch.promote_types(theta0.dtype, theta1.dtype), torch.float32)
        for part in pieces_of(theta1.numel()):
            new = flat_part(theta1, part).to(wide)
            old = flat_part(theta0, part).to(device=new.device, dtype=wide)
            yield Piece(name, part.start, (new - old).abs_())


def flat_part(tensor: Tensor, part: slice) -> Tensor:
    """Return entries ``part`` of a tensor in row-major order; only strided tensors are copied."""
    if tensor.is_contiguous() or tensor.ndim < 2:
        return tensor.reshape(-1)[part]
    # Whole rows around the part, so that no copy of the tensor is made.
    width = tensor.numel() // tensor.shape[0]
    first, last = part.start // width, -(-part.stop // width)
    rows = tensor[first:last].reshape(-1)
    return rows[part.start - first * width : part.stop - first * width]
