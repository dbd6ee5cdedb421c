"""``magnitude``: the entries that moved most (LT-SFT)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sparseft.errors import MaskError
from sparseft.modules.weight_storage import full_value, is_sharded
from sparseft.selection.differences import Differences
from sparseft.selection.registry import Candidates, Piece, register_selector
from sparseft.selection.source import Source, TensorSource

__all__ = ["pairs_of", "select_magnitude"]


@register_selector("magnitude", reference="https://arxiv.org/abs/2110.07560", zero="did not move")
def select_magnitude(
    candidates: Candidates, *, base: Source, tuned: Source | None = None
) -> Iterator[Piece] | Differences:
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
    On one GPU kernels take them as they read (`sparseft.ops.topk_differences`), for the scopes
    "global" and "tensor"; the masks are the same.
    """
    differences = Differences(pairs_of(candidates, base, tuned))
    # Gathered tensors come and go one by one; a launch over all would hold them together.
    gathered = any(map(is_sharded, candidates.parameters.values()))
    return iter(differences) if gathered else differences


def pairs_of(
    candidates: Candidates, base: Source, tuned: Source | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    before = TensorSource(base, candidates.model, "base")
    after = None if tuned is None else TensorSource(tuned, candidates.model, "tuned")
    shared = 0
    for name, parameter in candidates.parameters.items():
        shape = tuple(parameter.shape)
        theta1 = full_value(parameter) if after is None else after.get(name, shape)
        theta0 = before.get(name, shape)
        shared += theta1.numel() == 0 or theta0.data_ptr() == theta1.data_ptr()
        # Not at the first: copies of a model may share what neither trains.
        if shared == len(candidates.parameters) and candidates.numel:
            raise MaskError(
                f"base holds the very tensors of the tuned model ({name!r} and all others share "
                "their memory), so nothing can have moved. model.state_dict() makes no copies: "
                "keep copy.deepcopy(model.state_dict()) before training."
            )
        yield name, theta1, theta0
