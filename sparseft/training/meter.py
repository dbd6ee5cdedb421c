"""`TrainingMeter`: what a sparse run has in hand, for any loop.

Counting tokens and looking at gradients never waits for the device; `TrainingMeter.read` does.
Here: the numbers and the warnings they call for. Not here: who shows them (`SparseCallback`,
`track`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseft.attachment import Attachment
from sparseft.errors import AttachError
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.mask_report import MaskReports, report_masks
from sparseft.modules.seen_entries import watch_entries
from sparseft.training.trained_state import trained_state
from sparseft.training.underflow import Underflow
from sparseft.training.warn_once import named, warn_once

__all__ = ["Reading", "TrainingMeter", "tokens_in"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What `TrainingMeter.read` gives.

    Args:
        steps: optimizer steps looked at.
        nnz: trained entries, full parameters aside.
        density: nnz over all entries of the masked tensors.
        diff_norm: Euclidean norm of all diffs.
        l1: sum of their absolute values.
        trained_state_bytes: of everything kept for what trains (`TrainedState`).
        tokens_per_second: of this process since the last reading; None where none were counted.
        rounded_away: entries whose diff is not zero but too small to change their weight.
        never_touched: masked parameter -> entries that no gradient has reached, where there are
            any; None where nobody has looked.
        report: the rows behind it, tensor by tensor.
    """

    steps: int
    nnz: int
    density: float
    diff_norm: float
    l1: float
    trained_state_bytes: int
    tokens_per_second: float | None
    rounded_away: int
    never_touched: dict[str, int] | None
    report: MaskReports


def tokens_in(batch: Any) -> int:
    """Return the input tokens of a batch, padding included: shapes are read, no values.

    Of a mapping, the entries of ``input_ids``, or the positions of ``inputs_embeds``; of a tensor,
    a list or a tuple, the entries of the first integer tensor with two dimensions or more. Nothing
    of the kind (images, audio): 0.
    """
    if isinstance(batch, Tensor):
        return batch.numel() if batch.ndim > 1 and not batch.is_floating_point() else 0
    if isinstance(batch, Mapping):
        ids, embeds = batch.get("input_ids"), batch.get("inputs_embeds")
        if isinstance(ids, Tensor):
            return ids.numel()
        if isinstance(embeds, Tensor) and embeds.ndim > 1:
            return embeds.numel() // max(1, embeds.shape[-1])
        return 0
    if isinstance(batch, list | tuple):
        return next((n for n in map(tokens_in, batch) if n), 0)
    return 0


class TrainingMeter:
    """Reads nnz, norms, trained-state memory, tokens/s and untouched entries of a run.

    In a loop of one's own, call `before_step` and `see`; a `sparseft.training.LoopTrainer` takes it
    as a callback.

    Args:
        attachment: what is trained.
        optimizer: the one (or several) that trains it, for its state's size; None: whichever has
            stepped the leaves.
        watch_entries: note, before each optimizer step, which entries get gradient: one byte an
            entry, and nothing more for a tensor of which all have got some.

    Raises:
        AttachError: no attachment, or one that was detached.

    Example:
        >>> import torch, sparseft
        >>> model = torch.nn.Linear(4, 3)
        >>> sparse = sparseft.attach(model, {"weight": torch.eye(3, 4) > 0})
        >>> optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=0.1)
        >>> meter = TrainingMeter(sparse, optimizer)
        >>> _ = model(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).sum().backward()
        >>> meter.before_step()
        >>> optimizer.step()
        >>> reading = meter.read()
        >>> reading.nnz, reading.never_touched, reading.trained_state_bytes
        (3, {'weight': 1}, 72)
    """

    def __init__(
        self, attachment: Attachment, optimizer: Any = None, *, watch_entries: bool = True
    ) -> None:
        if not isinstance(attachment, Attachment):
            raise AttachError(
                f"a TrainingMeter reads an Attachment, got {type(attachment).__name__}. It is what "
                "sparseft.attach() returns."
            )
        attachment._check_active("TrainingMeter")
        self.attachment = attachment
        self.optimizer = optimizer
        self.watch_entries = watch_entries
        self.steps = 0
        self._underflow = Underflow(attachment)
        self.restart()

    # -- every step: nothing here waits for the device ---

    def tokens(self, count: int) -> None:
        """Count input tokens."""
        self.counted += count

    def see(self, batch: Any) -> None:
        """Count the input tokens of a batch, see `tokens_in`."""
        self.counted += tokens_in(batch)

    def restart(self, counted: int = 0) -> None:
        """Begin the window of tokens/s now, with so many tokens counted before."""
        self.counted = self._before = counted
        self._since = time.perf_counter()

    def before_step(self) -> None:
        """Look at the gradients, right before ``optimizer.step()``; counts a step."""
        self.steps += 1
        for masked in self._masks():
            if self.watch_entries:
                watch_entries(masked).look(masked)
        self._underflow.look()

    def on_pre_optimizer_step(self, **others: Any) -> None:
        """`sparseft.training.LoopTrainer`'s event of this name: `before_step`."""
        self.before_step()

    def _masks(self) -> list[MaskedParameter]:
        """Return what is looked at: a frozen leaf gets no gradient, by intention."""
        return [m for m in self.attachment._masked.values() if m.leaf.requires_grad]

    # -- now and then ---

    @property
    def trained_state_bytes(self) -> int:
        """Bytes kept for what trains, from shapes alone (`TrainedState`)."""
        return trained_state(self.attachment, self.optimizer).total

    @property
    def tokens_per_second(self) -> float | None:
        """Input tokens a second since the last `read`, by wall clock; None where none came."""
        count = self.counted - self._before
        return count / max(time.perf_counter() - self._since, 1e-9) if count else None

    def read(self) -> Reading:
        """Read everything; waits for the device once."""
        report = report_masks(self.attachment._masked.values())
        total = report.total
        rate = self.tokens_per_second
        self._before, self._since = self.counted, time.perf_counter()
        never = None
        if total.no_gradient is not None:
            never = {row.name: row.no_gradient for row in report if row.no_gradient}
        return Reading(
            steps=self.steps,
            nnz=total.nnz,
            density=total.density,
            diff_norm=total.l2,
            l1=total.l1,
            trained_state_bytes=self.trained_state_bytes,
            tokens_per_second=rate,
            rounded_away=total.rounded_away,
            never_touched=never,
            report=report,
        )

    def warn(self, reading: Reading, *, last: bool = False) -> None:
        """Log what a reading gives cause for, each once for an attachment.

        Args:
            reading: from `read`.
            last: training has ended: entries without a gradient will stay so.
        """
        self._underflow.warn(reading.report, self.optimizer, steps=self.steps, last=last)
        # Nor where it diverged: NaN is no gradient.
        if last and reading.never_touched and self.steps and math.isfinite(reading.l1):
            _warn_never_touched(self.attachment, reading.report, self._looks())

    def _looks(self) -> int:
        return max((watch_entries(m).looks for m in self._masks()), default=0)


def _warn_never_touched(attachment: Attachment, report: MaskReports, steps: int) -> None:
    rows = [row for row in report if row.no_gradient]
    total = report.total
    warn_once(
        logger,
        attachment,
        "never_touched",
        "%d of %d trained entries never got a gradient in %d steps: %s. They stay at their base, "
        "which does no harm but wastes their share of the budget: rows of tokens or positions that "
        "do not occur, units that are always off, experts nobody chose. A few are usual where "
        "masks are random. To use them: masks by gradient or by what moved "
        "(sparseft.select(method='gradient' or 'magnitude')), without these tensors (exclude=), or "
        "moved in training (sparseft.Reselection).",
        total.no_gradient,
        total.nnz,
        steps,
        named((row.name, row.no_gradient or 0, row.nnz) for row in rows),
    )
