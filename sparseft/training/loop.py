"""A plain PyTorch training loop that can be killed at any moment and continued bit for bit.

Here: accumulation, clipping, a learning-rate schedule, autocast, checkpoints, the best checkpoint
by a metric. Not
here: anything about masks or adapters; whatever has ``requires_grad`` is trained. `lottery_ticket`
drives it through the same two calls as a Hugging Face ``Trainer``:
``train(resume_from_checkpoint=...)`` and ``add_callback(...)``.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.errors import DataError, NonFiniteLossError
from sparseft.modules.ranks import refuse_several
from sparseft.training.checkpoints import CheckpointFolder, load_trainable, trainable
from sparseft.training.rng import rng_state, seed_everything, set_rng_state
from sparseft.training.schedule import SCHEDULES, batch_order

__all__ = ["LoopCallback", "LoopResult", "LoopTrainer"]

logger = logging.getLogger(__name__)


class LoopCallback(Protocol):
    """What `LoopTrainer.add_callback` takes."""

    def on_pre_optimizer_step(
        self, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Called after clipping and right before each optimizer step (0-based)."""


@dataclass
class LoopResult:
    """What a finished loop reports.

    Args:
        global_step: optimizer steps done.
        training_loss: mean of the true loss (no regulariser) over all steps.
        history: one entry per log line: step, loss, lr, and the metric where it was evaluated.
        best_step: step whose parameters were kept, None unless ``load_best``.
    """

    global_step: int
    training_loss: float
    history: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_to_device(v, device) for v in batch)
    return batch


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch)
    loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise DataError(
            "the model returned no loss: the batches hold no 'labels', or it is no Hugging Face "
            "model. "
            "Pass loss_fn=lambda model, batch: ..."
        )
    return loss


class _Pass:
    """The batches of a trainer's first epoch, on its device."""

    def __init__(self, trainer: LoopTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return -(-len(self._trainer.dataset) // self._trainer.batch_size)

    def __iter__(self) -> Iterator[Any]:
        of = self._trainer
        order = batch_order(len(of.dataset), of.batch_size, seed=of.seed, shuffle=of.shuffle)
        for _ in range(len(self)):
            yield _to_device(of.collate([of.dataset[i] for i in next(order)]), of.device)


class LoopTrainer:
    """Minimise ``loss_fn(model, batch)`` over ``steps`` optimizer steps.

    Args:
        model: trained in place; parameters with ``requires_grad``.
        dataset: map-style; ``collate`` makes a batch from a list of its rows.
        steps: optimizer steps.
        output_dir: where checkpoints go (``checkpoint-<step>.pt``).
        collate: list of rows -> batch; it may draw from torch's, Python's or numpy's global
            generators.
        loss_fn: (model, batch) -> scalar mean loss; default ``model(**batch).loss``.
        optimizer: list of parameters -> optimizer; default ``AdamW(lr, weight_decay)``, fused.
        batch_size, accumulate: rows of a micro-batch, micro-batches of a step (their mean losses
            are averaged).
        lr, weight_decay: of the default optimizer.
        schedule, warmup_steps: a name of `SCHEDULES`, or a function (step, steps, warmup) ->
            factor.
        max_grad_norm: clip the global gradient norm to this; 0 turns clipping off.
        autocast: torch.bfloat16 to run the forward in it, None for the model's own dtype. fp16
            needs a GradScaler: a loop of one's own, or the Trainer's ``fp16=True``.
        device: where to train; default where the model is.
        save_every: write a checkpoint every so many steps, 0 for none.
        keep_checkpoints: newest checkpoints kept.
        log_every: steps between entries of the history.
        evaluate: model -> metric (called in eval mode, gradients off), every ``eval_every`` steps
            and at the end.
        load_best: end with the trainable parameters that had the best metric.
        greater_is_better: direction of the metric.
        seed: of dropout, the data order and everything else drawn while training.
        shuffle: another order each epoch; False keeps the data set's order.
        progress: show a progress bar.

    Raises:
        DataError: empty data set.
        ValueError: a number out of range; autocast to fp16.
        NonFiniteLossError: NaN or infinite loss or gradient; names the step and the last good
            checkpoint.
        SparseFtError: started as several processes.

    Numerics: a resumed run equals the uninterrupted one bit for bit on one machine, thread count
        and set of versions. The loss that is logged is the mean of the micro-batch losses, in the
        dtype of the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        *,
        steps: int,
        output_dir: str | Path,
        collate: Callable[[list[Any]], Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        batch_size: int = 8,
        accumulate: int = 1,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        schedule: str | Callable[[int, int, int], float] = "linear",
        warmup_steps: int = 0,
        max_grad_norm: float = 1.0,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        save_every: int = 0,
        keep_checkpoints: int = 1,
        log_every: int = 50,
        evaluate: Callable[[nn.Module], float] | None = None,
        eval_every: int = 0,
        load_best: bool = False,
        greater_is_better: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        progress: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise DataError(
                "the training data set is empty; check the files and filters it was made from."
            )
        for name, value, low in (
            ("steps", steps, 1),
            ("batch_size", batch_size, 1),
            ("accumulate", accumulate, 1),
            ("save_every", save_every, 0),
            ("keep_checkpoints", keep_checkpoints, 1),
            ("log_every", log_every, 1),
            ("eval_every", eval_every, 0),
            ("warmup_steps", warmup_steps, 0),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}.")
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(
                f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}."
                f"{did_you_mean(schedule, SCHEDULES)}"
            )
        if autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast={autocast}; it should be torch.bfloat16 or None. This loop has no "
                "GradScaler, without which small gradients of float16 become zero: use bfloat16, "
                "transformers.Trainer with fp16=True, or a loop of your own with "
                "torch.amp.GradScaler."
            )
        if load_best and evaluate is None:
            raise ValueError("load_best needs evaluate: a function from the model to a metric.")
        self.model, self.dataset, self.steps = model, dataset, steps
        self.output_dir = Path(output_dir)
        self.collate = collate or (lambda rows: rows)
        self.loss_fn = loss_fn or _model_loss
        self._make_optimizer = optimizer
        self.batch_size, self.accumulate = batch_size, accumulate
        self.lr, self.weight_decay = lr, weight_decay
        self.schedule = schedule
        self._factor = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        self.warmup_steps, self.max_grad_norm = warmup_steps, max_grad_norm
        self.autocast = autocast
        self.device = torch.device(device) if device is not None else _device_of(model)
        self.save_every, self.log_every = save_every, log_every
        self._folder = CheckpointFolder(self.output_dir, keep_checkpoints)
        self.evaluate, self.eval_every = evaluate, eval_every
        self.load_best, self.greater_is_better = load_best, greater_is_better
        self.seed, self.shuffle, self.progress = seed, shuffle, progress
        self._callbacks: list[LoopCallback] = []

    # -- the protocol lottery_ticket drives ---

    def add_callback(self, callback: LoopCallback) -> None:
        """Call ``callback`` at the points of `LoopCallback`."""
        self._callbacks.append(callback)

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers of a run; resuming with others is refused."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "schedule": self.schedule if isinstance(self.schedule, str) else "custom",
            "warmup_steps": self.warmup_steps,
            "max_grad_norm": self.max_grad_norm,
            "autocast": str(self.autocast),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "examples": len(self.dataset),
            "eval_every": self.eval_every,
            "load_best": self.load_best,
            "device": self.device.type,
        }

    def latest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint; each is written whole or not at all."""
        return self._folder.latest()

    def clear_checkpoints(self) -> None:
        """Delete all checkpoints, the best one's copy included."""
        self._folder.clear()

    def batches(self) -> Iterable[Any]:
        """Return the batches of one pass as training would see them, to be read again and again."""
        return _Pass(self)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> LoopResult:
        """Run the loop to its end, from a checkpoint if one is given (True: the newest, if any)."""
        refuse_several(
            "LoopTrainer",
            "Use transformers.Trainer, accelerate, or a loop with DistributedDataParallel as in "
            "docs/examples/ddp_loop.py.",
        )
        self.model.to(self.device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("no parameter has requires_grad: there is nothing to train.")
        optimizer = self._build_optimizer(parameters)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        was_training = self.model.training
        self.model.train()
        checkpoint = (
            self.latest_checkpoint() if resume_from_checkpoint is True else resume_from_checkpoint
        )
        if checkpoint:
            state = self._load(Path(checkpoint), optimizer)
        else:
            seed_everything(self.seed)
            state = {"step": 0, "loss_sum": 0.0, "window": [], "history": [], "best": None}
        try:
            with self._bar(state["step"]) as advance:
                self._run(state, parameters, optimizer, advance)
            if self.load_best and state["best"] is not None:
                best = torch.load(self._folder.best, weights_only=True, map_location="cpu")
                load_trainable(self.model, best["model"], where=self._folder.best)
        finally:
            self.model.train(was_training)
        return LoopResult(
            global_step=state["step"],
            training_loss=state["loss_sum"] / max(1, state["step"]),
            history=state["history"],
            best_step=state["best"]["step"] if self.load_best and state["best"] else None,
        )

    # -- the loop ---

    def _run(
        self,
        state: dict[str, Any],
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        advance: Callable[..., None],
    ) -> None:
        batches = batch_order(
            len(self.dataset),
            self.batch_size,
            seed=self.seed,
            shuffle=self.shuffle,
            start=state["step"] * self.accumulate,
        )
        # Reading the loss costs a GPU a synchronisation, so there it is read in groups of steps.
        eager = self.device.type == "cpu"
        pending: list[Tensor] = []
        while state["step"] < self.steps:
            step = state["step"]
            factor = self._factor(step, self.steps, self.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            loss = self._accumulated_loss(batches)
            if eager:
                self._check_finite(float(loss), step)
            if self.max_grad_norm:
                norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                if eager and not math.isfinite(float(norm)):
                    self._stop(f"the gradient norm is {float(norm)}", step)
            for callback in self._callbacks:
                callback.on_pre_optimizer_step(step=step, model=self.model, optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            pending.append(loss)
            state["step"] = step = step + 1
            last = step == self.steps
            log = last or step % self.log_every == 0
            save = self.save_every > 0 and step % self.save_every == 0 and not last
            evaluate = self.evaluate is not None and (
                last or (self.eval_every > 0 and step % self.eval_every == 0)
            )
            if eager or log or save or evaluate:
                first = step - len(pending)
                for i, value in enumerate(torch.stack(pending).tolist()):
                    self._check_finite(value, first + i)
                    state["loss_sum"] += value
                    state["window"].append(value)
                pending.clear()
                advance(state["window"][-1])
            if evaluate:
                self._evaluate(state)
            if log:
                window = state["window"]
                entry = {
                    "step": step,
                    "loss": sum(window) / len(window),
                    "lr": optimizer.param_groups[0]["lr"],
                }
                state["history"].append(entry)
                state["window"] = []
                logger.info("step %d of %d: loss %.4f", step, self.steps, entry["loss"])
            if save:
                self._save(state, optimizer)

    def _accumulated_loss(self, batches: Iterator[list[int]]) -> Tensor:
        total: Tensor | None = None
        for _ in range(self.accumulate):
            rows = [self.dataset[i] for i in next(batches)]
            batch = _to_device(self.collate(rows), self.device)
            context = (
                torch.autocast(self.device.type, self.autocast)
                if self.autocast is not None
                else contextlib.nullcontext()
            )
            with context:
                loss = self.loss_fn(self.model, batch) / self.accumulate
            loss.backward()
            loss = loss.detach()
            total = loss if total is None else total + loss
        if total is None:
            raise RuntimeError("accumulate is at least 1.")
        return total

    def _evaluate(self, state: dict[str, Any]) -> None:
        if self.evaluate is None:
            return
        # What the metric draws must not move the run: evaluating more often would change the
        # result.
        saved = rng_state(self.device)
        self.model.eval()
        try:
            with torch.no_grad():
                metric = float(self.evaluate(self.model))
        finally:
            self.model.train()
            set_rng_state(saved, self.device)
        state["history"].append({"step": state["step"], "metric": metric})
        logger.info("step %d: metric %.4f", state["step"], metric)
        best = state["best"]
        sign = 1.0 if self.greater_is_better else -1.0
        if not math.isnan(metric) and (best is None or sign * metric > sign * best["metric"]):
            state["best"] = {"step": state["step"], "metric": metric}
            if self.load_best:
                self._folder.write(
                    self._folder.best, {"model": trainable(self.model), **state["best"]}
                )

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            self._stop(f"the loss is {loss}", step)

    def _stop(self, what: str, step: int) -> None:
        checkpoint = self.latest_checkpoint()
        kept = (
            f"The last good checkpoint is {checkpoint}"
            if checkpoint
            else f"No checkpoint had been written (save_every={self.save_every})"
        )
        raise NonFiniteLossError(
            f"training stopped: {what} at step {step} of {self.steps}. {kept}. "
            "Lower the learning rate, or look at the batch of this step."
        )

    # -- checkpoints ---

    def _save(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        content = {
            "state": state,
            "model": trainable(self.model),
            "optimizer": optimizer.state_dict(),
            "rng": rng_state(self.device),
        }
        self._folder.save(state["step"], content)

    def _load(self, path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        content = self._folder.read(path)
        load_trainable(self.model, content["model"], where=path)
        optimizer.load_state_dict(content["optimizer"])
        set_rng_state(content["rng"], self.device)
        logger.info("resumed at step %d of %d from %s", content["state"]["step"], self.steps, path)
        return content["state"]

    # -- small things ---

    def _build_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if self._make_optimizer is not None:
            return self._make_optimizer(list(parameters))
        # fused: 2.3 times as fast as the for-loop, 3.4 times as foreach (31 M parameters, one
        # CPU thread).
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    @contextlib.contextmanager
    def _bar(self, done: int) -> Iterator[Callable[..., None]]:
        if not self.progress:
            yield lambda loss: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns: Iterable[Any] = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("loss {task.fields[loss]:.3f}"),
        )
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(self.output_dir.name, total=self.steps, completed=done, loss=0.0)

            def advance(loss: float) -> None:
                bar.update(task, advance=1, loss=loss)

            yield advance


def _device_of(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        return parameter.device
    return torch.device("cpu")
