"""One optimizer step of an attached model against dense fine-tuning with a gradient mask.

The competitor is what composable-sft does: each weight's gradient is multiplied by its 0/1 mask,
and a dense ``torch.optim.AdamW`` steps. Its masks are kept in the weights' dtype, which is faster
than its own bool masks, and are not counted as its trained state: both choices favour the
competitor. Both sides are those of `sparseft.profiling.sides`; `cases.training_step` has the other
ways to train beside them.

Its table says what the other has not: the bytes of trained state on both sides, for several
optimizers; committed results and the README quote it.

Biases and LayerNorms are frozen on both sides. Of the key biases that matters: a softmax does not
see them, so their gradient is all rounding noise, which Adam turns into full steps: two sides would
never hold the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.benchmarking.cases.training_gates import TOLERANCE, largest_difference
from sparseft.benchmarking.rotation import Clock, rotate, spread
from sparseft.profiling.sides import Built, build
from sparseft.profiling.workload import Way, Workload
from sparseft.training.trained_state import trained_state

__all__ = ["MODEL", "StepCase", "measure_step"]

# The encoder of the committed results: 12 layers of width 384 as multilingual-e5-small has, with a
# vocabulary of 25,000.
MODEL = "encoder:12x384x25000"


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """One row of the table.

    Args:
        task: ``"classification"`` (a head trained densely on both sides), ``"mlm"`` (tied output
            embedding), or another that the model has.
        batch: sequences per step.
        length: tokens per sequence.
        density: fraction of the masked matrices' entries that train.
        optimizer: ours: ``"torch"`` is ``torch.optim.AdamW`` over the leaves, ``"sparse"`` is
            ``SparseAdamW``.
        fused: both sides use ``torch.optim.AdamW(fused=True)``, the Trainer's default.
        seed: of weights, masks and data.
    """

    task: str = "classification"
    batch: int = 16
    length: int = 64
    density: float = 0.01
    optimizer: str = "torch"
    fused: bool = False
    seed: int = 0

    def workload(self, model: str | Path | None, *, ours: bool) -> Workload:
        """Return the step of one side, in fp32."""
        name = "adamw" if self.fused else "adamw_torch"
        return Workload(
            model=MODEL if model is None else str(model),
            task=self.task,
            batch=self.batch,
            length=self.length,
            optimizer="sparse_adamw" if ours and self.optimizer == "sparse" else name,
            seed=self.seed,
        )


def measure_step(
    case: StepCase,
    *,
    model: str | Path | None = None,
    rounds: int = 10,
    warmup: int = 2,
    clock: Clock = "wall",
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Check that both sides train the same weights, then time them in turns.

    Args:
        case: what to run.
        model: a folder, a name on the hub or a size; None: `MODEL`, with random weights.
        rounds: timed rounds.
        warmup: untimed rounds first.
        clock: as in `rotate`: ``"wall"``, or ``"cpu"`` on a busy machine.
        tolerance: largest allowed difference of any weight after three steps without dropout, at lr
            1e-4.

    Returns:
        The case, the check, times, ratios, trained bytes and their ratio, ready for JSON.
    """
    dense, ours = (
        build(case.workload(model, ours=kind == "attached"), Way(kind, case.density), "cpu")
        for kind in ("gradient_mask", "attached")
    )
    for side in (dense.model, ours.model):
        side.eval()  # no dropout: both sides must see the same network
    for _ in range(3):
        dense.step()
        ours.step()
    difference = largest_difference(dense.model, ours.model)
    for side in (dense.model, ours.model):
        side.train()
    timing = rotate(
        {"baseline": lambda: float(dense.step()), "ours": lambda: float(ours.step())},
        clock=clock,
        rounds=rounds,
        warmup=warmup,
    )
    if ours.attachment is None:
        raise RuntimeError("the attached side has no attachment")
    theirs_bytes, our_bytes = _dense_state(dense), _attached_state(ours)
    nnz = ours.attachment.nnz
    return {
        "case": {**case.__dict__, "model": "random weights" if model is None else Path(model).name},
        "clock": clock,
        "passed": difference <= tolerance,
        "largest_weight_difference": difference,
        "trained_entries": nnz,
        "candidate_entries": sum(mask.numel() for mask in dense.masks.values()),
        "baseline_state_bytes": theirs_bytes,
        "ours_state_bytes": our_bytes,
        "state_ratio": our_bytes / theirs_bytes,
        "bytes_per_trained_entry": our_bytes / nnz,
        "rounds": len(timing.seconds["ours"]),
        "baseline_seconds": spread(timing.seconds["baseline"]),
        "ours_seconds": spread(timing.seconds["ours"]),
        "ratio": spread(timing.ratios("ours", "baseline")),
        "samples": timing.seconds,
    }


def _dense_state(side: Built) -> int:
    """Gradients and optimizer state of the masked weights."""
    masked: list[Any] = [side.model.get_parameter(name) for name in side.masks]
    return _bytes(p.grad for p in masked) + _optimizer_bytes(side.optimizer, masked)


def _attached_state(side: Built) -> int:
    """Index, base, diff, gradient and optimizer state: everything kept per trained entry."""
    if side.attachment is None:
        return 0
    return trained_state(side.attachment, side.optimizer, full_params=False).total


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _optimizer_bytes(
    optimizer: torch.optim.Optimizer | None, parameters: list[nn.Parameter]
) -> int:
    if optimizer is None:
        return 0
    return _bytes(
        value
        for parameter in parameters
        for value in optimizer.state[parameter].values()
        if isinstance(value, Tensor) and value.ndim > 0
    )
