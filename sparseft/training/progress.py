"""`track`: a progress line of a sparse run for plain loops."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

import torch

from sparseft._text import human_bytes
from sparseft.attachment import Attachment
from sparseft.errors import AttachError
from sparseft.modules.transplant import check_optimizer
from sparseft.training.meter import TrainingMeter

__all__ = ["track"]

Batch = TypeVar("Batch")
_REFRESH = 0.5  # seconds between two looks at the figures


def track(
    batches: Iterable[Batch],
    attachment: Attachment,
    optimizer: Any = None,
    *,
    description: str = "training",
    total: int | None = None,
    final: bool = False,
    meter: TrainingMeter | None = None,
    file: TextIO | None = None,
) -> Iterator[Batch]:
    """Yield the batches, with a progress line: nnz, density, trained-state memory, tokens/s.

    Nothing is shown where ``file`` is no terminal, but for the final line, if asked for. After the
    last batch, entries that never got a gradient and diffs that were rounded away are logged as
    warnings, each once, if an optimizer is given.

    Args:
        batches: a DataLoader, or anything to iterate over.
        attachment: what is trained.
        optimizer: the one that trains it; it is hooked, to look at gradients before each step (not
            inside of ``torch.compile``).
        description: in front of the line.
        total: number of batches; default ``len(batches)``, where it has one.
        final: after the last batch, write one line with the figures, terminal or not.
        meter: one to go on with; default a new one.
        file: where to; default standard error.

    Raises:
        AttachError: no attachment, or one that was detached; no optimizer, or several.

    Numerics: none of the figures waits for the device; on a GPU, tokens/s is right once its queue
        is full. Tokens are those of `sparseft.training.meter.tokens_in`, padding included.

    Example:
        >>> import sys, torch, sparseft
        >>> model = torch.nn.Embedding(10, 4)
        >>> sparse = sparseft.attach(model, {"weight": torch.ones(10, 4) > 0})
        >>> optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=0.1)
        >>> loader = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])]
        >>> for ids in track(loader, sparse, optimizer, final=True, file=sys.stdout):
        ...     model(ids).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()  # doctest: +ELLIPSIS
        training: 2 batches, nnz 40 (100%), trained state 960 B, ... tokens/s
    """
    if isinstance(optimizer, list | tuple):
        raise AttachError(
            f"track: optimizer is a {type(optimizer).__name__}, and one is looked at. Pass the "
            "one that steps once a batch."
        )
    if optimizer is not None:
        check_optimizer(optimizer)
    meter = meter or TrainingMeter(attachment, optimizer)
    file = file or sys.stderr or io.StringIO()  # a program without a console has no standard error
    if total is None and isinstance(batches, Sized):
        total = _length(batches)
    return _tracked(batches, meter, optimizer, description, total, final, file)


def _length(batches: Sized) -> int | None:
    try:
        return len(batches)
    except TypeError:  # a DataLoader of an IterableDataset has a __len__ that raises
        return None


def _tracked(
    batches: Iterable[Batch],
    meter: TrainingMeter,
    optimizer: Any,
    description: str,
    total: int | None,
    final: bool,
    file: TextIO,
) -> Iterator[Batch]:
    hook = _hooked(optimizer, meter)
    began, first, done = time.perf_counter(), meter.counted, 0

    def figures() -> str:
        seconds = max(time.perf_counter() - began, 1e-9)
        tokens = meter.counted - first
        attachment = meter.attachment
        parts = [
            f"nnz {attachment.nnz:,} ({100 * attachment.density:.3g}%)",
            f"trained state {human_bytes(meter.trained_state_bytes)}",
        ]
        return ", ".join(parts + [f"{tokens / seconds:,.0f} tokens/s"] * bool(tokens))

    try:
        with _line(file, description, total, figures) as advance:
            for batch in batches:
                meter.see(batch)
                yield batch
                done += 1
                advance()
        if final:
            print(f"{description}: {done:,} batches, {figures()}", file=file, flush=True)
        if hook is not None:
            meter.warn(meter.read(), last=True)
    finally:
        if hook is not None:
            hook.remove()


def _hooked(optimizer: Any, meter: TrainingMeter) -> Any:
    """Look at gradients before each step of the optimizer; returns what ends it."""
    if optimizer is None:
        return None
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer  # accelerate's, Lightning's

    def look(*_: Any) -> None:
        if not torch.compiler.is_compiling():  # a compiled step is not looked at
            meter.before_step()

    return inner.register_step_pre_hook(look)


@contextmanager
def _line(
    file: TextIO, description: str, total: int | None, figures: Callable[[], str]
) -> Iterator[Callable[[], None]]:
    """Give a function to call after each batch; the line is there in a terminal only."""
    if not getattr(file, "isatty", bool)():  # what is no more than writable has none
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(file=file), transient=True) as bars:
        task = bars.add_task(description, total=total, figures="")
        shown = 0.0

        def advance() -> None:
            nonlocal shown
            now = time.perf_counter()
            if now - shown > _REFRESH:
                # Here and not in a column: rich draws in a thread of its own.
                shown = now
                bars.update(task, figures=figures())
            bars.advance(task)

        yield advance
