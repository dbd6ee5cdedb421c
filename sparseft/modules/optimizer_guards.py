"""Notice an optimizer that would step, and train nothing: built before attach, or for other masks.

Called before each step. With a GradScaler no step comes: torch has no hook before it looks for
gradients, finds none and says "No inf checks were recorded for this optimizer".
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from sparseft.errors import AttachError
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.placement import DETACHED, placements
from sparseft.modules.weight_storage import is_sharded

__all__ = [
    "check_groups",
    "check_places",
    "frozen_note",
    "note_without_leaves",
    "report_idle",
]

logger = logging.getLogger(__name__)

_FIX = (
    "Build it from attachment.parameters(), after attach, or call attach(model, masks, "
    "optimizer=optimizer), which puts the leaves into its groups."
)
_told_of_stale: weakref.WeakSet[Optimizer] = weakref.WeakSet()
# Steps of an optimizer without any leaf that trained full parameters of an attachment.
_without_leaves: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()


def check_groups(
    optimizer: Optimizer, leaves: Sequence[MaskedParameter], weights: Sequence[MaskedParameter]
) -> None:
    """Raise AttachError where no step of this optimizer would train a mask, though it should.

    Args:
        optimizer: about to step.
        leaves: masked parameters whose leaf it holds.
        weights: masked parameters whose weight it holds.
    """
    kind = type(optimizer).__name__
    if weights and not leaves:
        more = f" and {len(weights) - 1} more masked weights" if len(weights) > 1 else ""
        raise AttachError(
            f"this {kind} was built before attach: it holds {weights[0].name!r}{more} but none of "
            f"their leaves, so it would train nothing. {_FIX}"
        )
    if leaves:
        if weights:
            _note_partly(optimizer, leaves, weights)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stale = [name for p in parameters if (name := getattr(p, DETACHED, None))]
    if stale and all(p.grad is None for p in parameters):
        raise AttachError(
            f"this {kind} holds the leaf of {stale[0]!r}{_more(stale)} whose masks were detached, "
            f"and nothing else that has a gradient, so it would train nothing. {_FIX}"
        )
    if stale and optimizer not in _told_of_stale:
        _told_of_stale.add(optimizer)
        logger.warning(
            "this %s holds the leaf of %r%s whose masks were detached; its steps train only what "
            "else it holds. %s", kind, stale[0], _more(stale), _FIX,
        )  # fmt: skip


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _note_partly(
    optimizer: Optimizer, leaves: Sequence[MaskedParameter], weights: Sequence[MaskedParameter]
) -> None:
    """Warn, once, of masks that came after an optimizer that trains others."""
    held = {id(masked) for masked in leaves}
    left = [
        masked
        for masked in weights
        if id(masked) not in held and not (masked.placement and masked.placement.stepped)
    ]
    for placement in {id(m.placement): m.placement for m in left if m.placement}.values():
        if "partly" not in placement.warned:
            placement.warned.add("partly")
            names = [m.name for m in left if m.placement is placement]
            logger.warning(
                "this %s holds %r%s but not the leaves, as if it was built before they got their "
                "masks. Unless another optimizer trains them, nothing does. %s",
                type(optimizer).__name__, names[0], _more(names), _FIX,
            )  # fmt: skip


def note_without_leaves(optimizer: Optimizer) -> None:
    """Warn, once, where a second step trains full parameters of masks that nobody has stepped."""
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for placement in placements():
        if placement.stepped or "full" in placement.warned:
            continue
        if placement.holds_full(parameters):
            steps = _without_leaves.get(optimizer, 0) + 1
            _without_leaves[optimizer] = steps
            if steps > 1:
                placement.warned.add("full")
                logger.warning(
                    "%d steps of this %s trained full_params, and no optimizer has stepped a leaf "
                    "of the %d masks beside them. Was it built before attach? %s",
                    steps, type(optimizer).__name__, placement.count, _FIX,
                )  # fmt: skip


def check_places(optimizer: Optimizer, leaves: Iterable[MaskedParameter]) -> None:
    """Raise AttachError where a weight, a leaf or its state is not where the step needs it."""
    leaves = list(leaves)
    found = {id(masked.placement): masked.placement for masked in leaves}
    for placement in found.values():
        if placement is None:  # a module that was copied alone
            continue
        placement.check()
        placement.stepped = True
        if optimizer not in placement.settled:
            _check_kinds(optimizer, leaves)
            for masked in leaves:
                if masked.placement is placement:
                    _check_state_device(optimizer, masked)
            placement.settled.add(optimizer)


def _check_kinds(optimizer: Optimizer, leaves: Sequence[MaskedParameter]) -> None:
    """Raise AttachError for leaves and DTensors in one group that torch would step in one call."""
    if all(masked.shards is None for masked in leaves):
        return
    own = {id(masked.leaf) for masked in leaves}
    for group in optimizer.param_groups:
        held = [p for p in group["params"] if id(p) in own]
        together = group.get("foreach") or group.get("fused")
        if held and "foreach" in group and group["foreach"] is None and not together:
            together = held[0].device.type != "cpu"  # where torch chooses it
        if held and together and any(is_sharded(p) for p in group["params"]):
            raise AttachError(
                f"a group of this {type(optimizer).__name__} holds leaves, which are plain tensors,"
                " and full parameters that fully_shard has cut, which are DTensors; foreach and "
                "fused take one kind. Build it from sparse.param_groups(), a group for each kind, "
                "and clip with sparse.clip_grad_norm_; or leave heads whole: "
                "fully_shard(model, ignored_params=set(model.head.parameters()))."
            )


def _check_state_device(optimizer: Optimizer, masked: MaskedParameter) -> None:
    leaf = masked.leaf
    for key, value in optimizer.state.get(leaf, {}).items():
        # One number (a step count) may stay on the CPU.
        if isinstance(value, Tensor) and value.device != leaf.device and value.numel() > 1:
            raise AttachError(
                f"the {type(optimizer).__name__}'s {key!r} of {masked.name!r} is on {value.device},"
                f" its leaf on {leaf.device}: the model moved after the optimizer had state. Move "
                "the model before the first step, or bring the state along: "
                "optimizer.load_state_dict(optimizer.state_dict())."
            )


def report_idle(optimizer: Optimizer, leaves: Sequence[MaskedParameter]) -> None:
    """Warn, once, of a step before which no leaf at all had a gradient, though some had before."""
    if any(masked.leaf.grad is not None for masked in leaves):
        return
    placement = next((m.placement for m in leaves if m.placement is not None), None)
    if placement is None or "idle" in placement.warned or not all(m.reported for m in leaves):
        return
    placement.warned.add("idle")
    frozen = sum(not masked.leaf.requires_grad for masked in leaves)
    logger.warning(
        "this %s took a step, but no gradient had reached any of its %d masked tensors, %r first%s."
        " Does it belong to the model that is trained now? A deep copy has leaves of its own: "
        "attachments_of(copy)[-1].parameters().",
        type(optimizer).__name__, len(leaves), leaves[0].name, frozen_note(frozen),
    )  # fmt: skip


def frozen_note(frozen: int) -> str:
    """Return what to add to a warning where leaves do not require grad."""
    if not frozen:
        return ""
    return (
        f" ({frozen} of the leaves were frozen after attach, as get_peft_model and "
        "model.requires_grad_(False) do; leaf.requires_grad_() for each of "
        "attachment.parameters() trains them again)"
    )
