"""What a training step's memory is made of: one definition for predicted and measured figures.

All figures are bytes of tensor storages on one device, at t*: the moment of highest use within a
steady step (the second or a later one, so that the optimizer's state exists).

======================= ==========================================================================
``weights``             unique storages of the model's parameters and buffers, without what the way
                        of training added to the model
``diff``                what the way of training added and keeps between steps: for an attached mask
                        leaves, indices, bases and whatever else attach holds (row tables, kept
                        plans); for LoRA, SHiRA and a gradient mask their parameters and masks
``gradients``           ``.grad`` tensors that exist at t*
``optimizer``           the optimizer's state
``activations``         of the rest at t*, what was held for the backward pass when the forward pass
                        ended: ``min(rest, held)``; batch inputs and the loss count as held
``temporary``           the rest of the rest: what lives within one operation or between two
======================= ==========================================================================

The peak is the sum of the six. "Allocated" is meant, not what an allocator holds in reserve, and
not the process: code, threads and the interpreter are outside.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

__all__ = ["PARTS", "MemoryUse", "split"]

PARTS = ("weights", "diff", "gradients", "optimizer", "activations", "temporary")


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes at the peak of a steady step, by part (the module's text defines them).

    Example:
        >>> use = MemoryUse(
        ...     weights=400, diff=12, gradients=4, optimizer=8, activations=60, temporary=16
        ... )
        >>> use.peak
        500
    """

    weights: int
    diff: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise ValueError(f"{field.name} is a number of bytes, got {value}")

    @property
    def peak(self) -> int:
        """All six parts together."""
        return sum(asdict(self).values())

    def parts(self) -> dict[str, int]:
        """Return the six parts by name, in the order of ``PARTS``."""
        return {name: getattr(self, name) for name in PARTS}


def split(
    peak: int,
    *,
    weights: int,
    diff: int,
    gradients: int,
    optimizer: int,
    held_for_backward: int,
) -> MemoryUse:
    """Return a peak by part: what is left after the first four is activations, then temporary.

    Args:
        peak: highest bytes alive within the step.
        weights: see the module's text; so ``diff``, ``gradients`` (alive at the peak),
            ``optimizer``.
        held_for_backward: bytes alive when the forward pass ended, less the four parts then.

    Raises:
        ValueError: the four parts are more than the peak.
    """
    rest = peak - weights - diff - gradients - optimizer
    if rest < 0:
        raise ValueError(
            f"a peak of {peak} bytes is less than its parts: weights {weights}, diff {diff}, "
            f"gradients {gradients}, optimizer {optimizer}"
        )
    activations = min(rest, max(held_for_backward, 0))
    return MemoryUse(
        weights=weights,
        diff=diff,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        temporary=rest - activations,
    )
