"""`SparseCallback`: adapters beside checkpoints, figures in the logs and warnings, for
``transformers.Trainer``.

Through public events alone. Here: when what happens. Not here: the figures and warnings
(`sparseft.training.meter`), and how masks move (`sparseft.training.reselection`).
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sparseft.attachment import Attachment, attachments_of
from sparseft.errors import AttachError, DiffError
from sparseft.modules.agreement import check_attached
from sparseft.training.meter import Reading, TrainingMeter
from sparseft.training.saved_entries import begin_watching, saved_entries
from sparseft.training.token_hook import count_tokens

if TYPE_CHECKING:
    from transformers import TrainerCallback as _Base
else:
    _Base = object  # Trainer's class is put in when one is made: importing it takes seconds

__all__ = ["SparseCallback"]

logger = logging.getLogger(__name__)

_PREFIX = "sparse/"


class SparseCallback(_Base):
    """Watches and saves the masks of a model that ``transformers.Trainer`` trains.

    ``SparseCallback().add_to(trainer)``, or ``Trainer(callbacks=[SparseCallback()])``: Trainer
    calls its reporters (TensorBoard, W&B) before the callbacks that it is given, so figures get
    into their logs with `add_to` only; into ``state.log_history`` and
    ``trainer_state.json`` with both.

    **Adapters.** ``checkpoint-N/adapter/`` beside each complete checkpoint, with the masks of that
    moment, and ``output_dir/adapter/`` when training ends: after ``load_best_model_at_end`` that is
    the best model's; in a hyper-parameter search ``run-N/adapter/`` of each trial with a
    checkpoint. Written whole or not at all, by the first process; `sparseft.Adapter.load` reads
    them. They are deleted with their checkpoint (``save_total_limit``).

    **Figures**, in each training log and in the metrics of the run:

    =============================== ================================================================
    ``sparse/nnz``                  trained entries, full parameters aside
    ``sparse/density``              nnz over all entries of the masked tensors
    ``sparse/diff_norm``            Euclidean norm of all diffs
    ``sparse/l1``                   sum of their absolute values
    ``sparse/trained_state_bytes``  indices, bases, leaves, gradients, optimizer state, and the same
                                    of full parameters
    ``sparse/rounded_away``         entries whose diff is too small to change their weight
    ``sparse/no_gradient_yet``      entries that no gradient has reached (``watch_entries``)
    ``sparse/tokens_per_second``    input tokens since the last log, padding included, of all
                                    processes; evaluation and saving count as time
    =============================== ================================================================

    **Warnings**, each once: entries that never got a gradient, diffs rounded away and gradients of
    zero in fp16.

    Args:
        attachment: whose masks; default the last one on the trainer's model when training begins.
        adapter: name of the folder, and of the adapter; None: write none.
        compact: checkpoints hold leaves, full parameters and buffers only, as with
            ``attach(..., compact_state_dict=True)``. A resumed run attaches the same masks to the
            same base. After training, or after an interruption within a step, ``save_model()``
            writes the whole model.
        watch_entries: note before each optimizer step which entries get gradient: one byte an
            entry; `Attachment.report` shows it.
        log: add the figures.

    Raises:
        AttachError: an attachment of another type; when training begins, a model without masks,
            or without those given, or processes with others.

    Numerics: training is not touched. Nothing waits for the device between logs and saves. Tokens
        are the entries of ``input_ids`` (shapes alone, the attention mask is not read), or
        Trainer's own count where ``include_num_input_tokens_seen`` is set; those of a model that
        Trainer compiles are counted in that way, or after `add_to`.

    Example:
        >>> import tempfile, torch, transformers, sparseft
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.out = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 2)
        ...     def forward(self, input_ids, labels):
        ...         logits = self.out(self.embed(input_ids).mean(1))
        ...         return {"loss": torch.nn.functional.cross_entropy(logits, labels)}
        >>> model, folder = Classifier(), tempfile.mkdtemp()
        >>> sparse = sparseft.attach(model, sparseft.select(model, "random", density=0.1))
        >>> args = transformers.TrainingArguments(
        ...     folder, max_steps=4, save_steps=2, report_to="none", disable_tqdm=True
        ... )
        >>> rows = [{"input_ids": [i, i + 1, 5], "labels": i % 2} for i in range(16)]
        >>> trainer = transformers.Trainer(model, args, train_dataset=rows)
        >>> trainer.remove_callback(transformers.PrinterCallback)
        >>> _ = SparseCallback().add_to(trainer)
        >>> trainer.train().metrics["sparse/nnz"]
        18
        >>> sparseft.Adapter.load(f"{folder}/checkpoint-2/adapter").nnz
        18
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> SparseCallback:
        # What Trainer gets derives from its own classes, which are imported here and no earlier.
        kind: Any = cls
        return super().__new__(_as_callback(kind))

    def __init__(
        self,
        attachment: Attachment | None = None,
        *,
        adapter: str | None = "adapter",
        compact: bool = False,
        watch_entries: bool = True,
        log: bool = True,
    ) -> None:
        if attachment is not None and not isinstance(attachment, Attachment):
            raise AttachError(
                f"SparseCallback(attachment) got {type(attachment).__name__}, wanted what "
                "sparseft.attach() returned, or nothing: it finds the masks of the trainer's model."
            )
        self._given = attachment
        self.attachment = attachment  # of the run; known from its beginning on
        self.adapter, self.compact = adapter, compact
        self.watch_entries, self.log = watch_entries, log
        self.meter: TrainingMeter | None = None
        self._saved: dict[str, Any] = {}  # put here by Trainer, from a checkpoint's trainer state
        self._place: int | None = None  # of the given attachment; put here by Trainer, too
        self._folder: Path | None = None  # of the adapter at the end
        self._trainer: Callable[[], Any] = lambda: None
        self._undo: list[Callable[[], None]] = []
        self._whole: Callable[[], None] | None = None  # ends compact state dicts

    def add_to(self, trainer: Any) -> SparseCallback:
        """Add this to a trainer so that its reporters get the figures, too; returns this.

        Raises:
            TypeError: not a transformers Trainer.
        """
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(
                f"SparseCallback is for transformers.Trainer, got {type(trainer).__name__}. A "
                "LoopTrainer takes a sparseft.TrainingMeter(attachment) as a callback; for a loop "
                "of your own there is sparseft.track."
            )
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            trainer.add_callback(self)
        kind = _forerunner()
        if not any(isinstance(callback, kind) for callback in callbacks):
            callbacks.insert(0, kind(weakref.ref(trainer)))
        return self

    # -- events ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the masks; take back what a checkpoint says of their entries."""
        self._end()
        model = kwargs["model"]
        self.attachment = attachment = self._find(model)
        # Trainer makes the process group, so masks may have been attached before there was one.
        check_attached(attachment._masked.values(), attachment.full_params, attachment._group)
        self._folder = None if state.is_hyper_param_search else Path(args.output_dir)
        self.meter = meter = TrainingMeter(
            attachment, kwargs.get("optimizer"), watch_entries=self.watch_entries
        )
        meter.steps = state.global_step
        # Trainer wants the key when it saves; a checkpoint without this callback has none.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if self.watch_entries:
            begin_watching(attachment, saved, state.global_step)
        if not state.global_step:
            self._forget_saved(state)
        if _counts_tokens(args):
            meter.restart(state.num_input_tokens_seen)
        else:
            outer = getattr(self._trainer(), "model_wrapped", None)
            self._undo.append(count_tokens(outer if outer is not None else model, meter))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the model save whole, in case that this step is interrupted."""
        self._save_whole()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have checkpoints be compact: they are written between here and the next step."""
        if self.compact and self.attachment is not None and self._whole is None:
            self._whole = _made_compact(self.attachment)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As after a step: an epoch may end with a checkpoint."""
        self.on_step_end(args, state, control)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients."""
        if self.meter is not None:
            self.meter.before_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the figures to a training log, and warn where they give cause to."""
        meter = self.meter
        if logs is None or meter is None or not state.is_world_process_zero:
            return
        if not ("loss" in logs or "train_loss" in logs) or f"{_PREFIX}nnz" in logs:
            return  # of an evaluation; or the forerunner has been here
        others = args.world_size
        if _counts_tokens(args):
            meter.counted, others = state.num_input_tokens_seen, 1
        reading = meter.read()
        if self.log:
            figures = _figures(reading, others)
            logs.update(figures)
            if state.log_history:
                state.log_history[-1].update(figures)
        meter.warn(reading)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the adapter into the checkpoint, which is complete but for it."""
        if state.is_world_process_zero:
            self._forget_saved(state)
            folder = _checkpoint(args, state)
            if folder is not None:
                self._folder = folder.parent
                self._write(folder, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the adapter of the model as it is now: the best one, where that was loaded."""
        meter = self.meter
        if meter is not None and state.is_world_process_zero:
            best = args.load_best_model_at_end and state.best_model_checkpoint is not None
            step = getattr(state, "best_global_step", None) if best else state.global_step
            if self._folder is not None:
                self._write(self._folder, step)
            meter.warn(meter.read(), last=True)
        self._end()

    def state(self) -> dict[str, Any]:
        """Return what Trainer keeps in a checkpoint's ``trainer_state.json``."""
        options = ("adapter", "compact", "watch_entries", "log")
        seen = {}
        if self.meter is not None and self.watch_entries:
            seen = saved_entries(self.meter.attachment)
        return {
            "args": {name: getattr(self, name) for name in options},
            "attributes": {"_saved": seen, "_place": self._place},
        }

    # -- work ---

    def _find(self, model: nn.Module) -> Attachment:
        found = [a for module in model.modules() for a in attachments_of(module)]
        if self._given is not None:
            _check_on(model, self._given)
            self._place = next((i for i, a in enumerate(found) if a is self._given), None)
            return self._given
        if not found:
            raise AttachError(
                f"SparseCallback: no masks are attached to this {type(model).__name__}. Call "
                "sparseft.attach(model, masks) before train(); in lottery_ticket, add the callback "
                "where phase.attachment is not None."
            )
        # Made anew by Trainer, it knows but the place of what it was given.
        return found[-1 if self._place is None or self._place >= len(found) else self._place]

    def _forget_saved(self, state: Any) -> None:
        """Drop what Trainer has saved of several callbacks: each save adds to the list."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            saved.clear()

    def _save_whole(self) -> None:
        if self._whole is not None:
            self._whole()
            self._whole = None

    def _write(self, folder: Path, step: int | None) -> None:
        if self.adapter is None or self.attachment is None:
            return
        extra = {} if step is None else {"global_step": step}
        try:
            self.attachment.adapter(self.adapter, extra=extra).save(folder / self.adapter)
        except DiffError as bad:
            logger.warning("no adapter in %s: %s", folder, bad)

    def _end(self) -> None:
        self._save_whole()
        while self._undo:
            self._undo.pop()()


def _figures(reading: Reading, processes: int) -> dict[str, float]:
    """Return the figures by their keys in a log."""
    figures: dict[str, float] = {
        "nnz": reading.nnz,
        "density": reading.density,
        "diff_norm": reading.diff_norm,
        "l1": reading.l1,
        "trained_state_bytes": reading.trained_state_bytes,
        "rounded_away": reading.rounded_away,
    }
    if reading.never_touched is not None:
        figures["no_gradient_yet"] = sum(reading.never_touched.values())
    if reading.tokens_per_second is not None:
        figures["tokens_per_second"] = reading.tokens_per_second * processes
    return {_PREFIX + key: value for key, value in figures.items()}


def _counts_tokens(args: Any) -> bool:
    """Whether Trainer counts input tokens itself, over all processes."""
    return getattr(args, "include_num_input_tokens_seen", False) not in (False, "no")


def _check_on(model: nn.Module, attachment: Attachment) -> None:
    """Raise AttachError unless leaves of these masks are parameters of the trainer's model."""
    trained = {id(parameter) for parameter in model.parameters()}
    if not any(id(leaf) in trained for leaf in attachment.leaves.values()):
        raise AttachError(
            f"SparseCallback(attachment) got {attachment!r}, none of whose masks is on the "
            f"{type(model).__name__} that this Trainer trains: it would train something else. "
            "Detached masks are attached again; masks of a copy or of another model are found by "
            "themselves where SparseCallback gets no attachment."
        )


def _made_compact(attachment: Attachment) -> Callable[[], None]:
    """Make state dicts compact; returns what makes them as they were."""
    masks = list(attachment._masked.values())
    before = attachment.compact_state_dict, [masked.compact for masked in masks]

    def put(whole: bool, each: list[bool]) -> None:
        attachment.compact_state_dict = whole
        for masked, compact in zip(masks, each, strict=True):
            masked.compact = compact

    put(True, [True] * len(masks))
    return functools.partial(put, *before)


def _checkpoint(args: Any, state: Any) -> Path | None:
    """Return the folder of the checkpoint that has just been written."""
    folder, name = Path(args.output_dir), f"checkpoint-{state.global_step}"
    if not state.is_hyper_param_search:
        return folder / name if (folder / name).is_dir() else None
    # One folder for each trial; the newest is this one's.
    found = [path for path in folder.glob(f"*/{name}") if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


@functools.cache
def _as_callback(cls: type) -> type:
    """Return ``cls`` as a class of Trainer's callbacks that are saved with checkpoints."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    if issubclass(cls, TrainerCallback):
        return cls
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, TrainerCallback, ExportableState), body)


@functools.cache
def _forerunner() -> Any:
    """Return the class of what is called before the reporters."""
    from transformers import TrainerCallback

    class SparseForerunner(TrainerCallback):
        """Calls on_log of a trainer's `SparseCallback`, whichever object that is now: Trainer makes
        new ones with ``restore_callback_states_from_checkpoint``.
        """

        def __init__(self, trainer: Callable[[], Any]) -> None:
            self.trainer = trainer

        def __getstate__(self) -> dict[str, Any]:  # a search pickles the trainer, and all it has
            return {"of": self.trainer()}

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.trainer = weakref.ref(state["of"])

        def _found(self) -> list[SparseCallback]:
            trainer = self.trainer()
            callbacks = [] if trainer is None else trainer.callback_handler.callbacks
            return [callback for callback in callbacks if isinstance(callback, SparseCallback)]

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for callback in self._found():
                callback._trainer = self.trainer

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for callback in self._found():
                callback.on_log(args, state, control, **kwargs)

    return SparseForerunner
