"""What `lottery_ticket` does inside somebody else's trainer, through public callbacks only.

Three things: the L1 gradient right before each optimizer step, stopping at a NaN or infinite loss,
and a marker inside each finished checkpoint. `PhaseHooks` is the work; `attach_hooks` connects it
to a Hugging Face Trainer (``TrainerCallback``) or to `LoopTrainer`.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import NonFiniteLossError
from sparseft.io.atomic import atomic_write_json

__all__ = [
    "COMPLETE_MARKER",
    "PhaseHooks",
    "attach_hooks",
    "complete_checkpoints",
    "is_hf_trainer",
    "remove_incomplete_checkpoints",
]

logger = logging.getLogger(__name__)

COMPLETE_MARKER = "sparseft_complete.json"


def is_hf_trainer(trainer: object) -> bool:
    """Whether ``trainer`` is a transformers Trainer, without importing transformers to find out."""
    module = sys.modules.get("transformers")
    return module is not None and isinstance(trainer, module.Trainer)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the ``checkpoint-<step>`` folders that carry the completion marker, oldest first."""
    return [path for _, path in sorted(_checkpoints(folder)) if (path / COMPLETE_MARKER).is_file()]


def remove_incomplete_checkpoints(folder: Path) -> list[Path]:
    """Delete the checkpoint folders without a marker (their writer was killed) and return them."""
    partial = [p for _, p in _checkpoints(folder) if not (p / COMPLETE_MARKER).is_file()]
    for path in partial:
        logger.info("removing the incomplete checkpoint %s", path)
        shutil.rmtree(path)
    return partial


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    return found


class PhaseHooks:
    """The work done inside one phase.

    Args:
        phase: what to call it in messages.
        deltas: pairs of a trained parameter and a function giving its change since the base (same
            shape), or the parameter itself where it is the change. The L1 penalty is over these.
        l1: strength of the penalty ``l1 * mean(|delta|)`` over all entries of ``deltas``.

    Numerics: the gradient of the penalty, ``l1 * sign(delta) / entries`` with sign(0) = 0, is added
        once a step, after accumulation, averaging over processes, unscaling and clipping. So it
        depends on none of them, and the loss that is logged stays the true loss.
    """

    def __init__(
        self, phase: str, deltas: list[tuple[nn.Parameter, Callable[[], Tensor]]], l1: float
    ) -> None:
        self.phase = phase
        self.l1 = float(l1)
        self._deltas = deltas
        self._entries = sum(p.numel() for p, _ in deltas)
        self._first_bad: Tensor | None = None  # on the loss's device: step, or -1
        self.saw_loss = False

    @torch.no_grad()
    def add_l1(self) -> None:
        """Add the penalty's gradient to ``grad`` of each parameter."""
        if not self.l1 or not self._entries:
            return
        scale = self.l1 / self._entries
        for parameter, delta in self._deltas:
            push = delta().sign().mul_(scale).to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = push
            else:
                parameter.grad.add_(push)

    # -- the loss ---

    def watch(self, model: nn.Module, step: Callable[[], int]) -> Any:
        """Look at the loss of every training forward of ``model``; returns the handle that removes
        the hook.

        The Trainer's log cannot tell: by default it leaves NaN out of the mean it logs.
        """

        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not module.training or not torch.is_grad_enabled():
                return
            loss = output.get("loss") if isinstance(output, Mapping) else None
            if not isinstance(loss, Tensor):
                return
            self.saw_loss = True
            value = loss.detach()
            if self._first_bad is None:
                self._first_bad = torch.full((), -1, dtype=torch.int64, device=value.device)
            bad = ~torch.isfinite(value).all() & (self._first_bad < 0)
            self._first_bad = torch.where(bad, step(), self._first_bad)

        return model.register_forward_hook(look)

    def bad_step(self) -> int | None:
        """Return the first step with a NaN or infinite loss, if any (waits for the device)."""
        if self._first_bad is None:
            return None
        step = int(self._first_bad)
        return step if step >= 0 else None

    def gradients_finite(self) -> bool:
        """Whether all gradients are finite; asked only where the loss is not visible."""
        grads = [p.grad for p, _ in self._deltas if p.grad is not None]
        return not grads or math.isfinite(float(torch.nn.utils.get_total_norm(grads)))

    def stop(self, what: str, step: int, kept: Path | None) -> None:
        """Raise with the step and the last good checkpoint."""
        where = (
            f"The last good checkpoint is {kept}"
            if kept
            else "No checkpoint had been written, and the base is unchanged"
        )
        raise NonFiniteLossError(
            f"training stopped: {what} at step {step} of the {self.phase} phase. {where}. "
            "Lower the learning rate, or look at the batch of this step."
        )


class _LoopHooks:
    """`PhaseHooks` for `LoopTrainer`, which watches its own loss and writes checkpoints whole."""

    def __init__(self, hooks: PhaseHooks) -> None:
        self.hooks = hooks

    def on_pre_optimizer_step(
        self, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.hooks.add_l1()


def _hf_callback(hooks: PhaseHooks, trainer: Any) -> Any:
    """`PhaseHooks` as a TrainerCallback (public events only)."""
    from transformers import TrainerCallback

    class LotteryTicketCallback(TrainerCallback):
        """L1 before the step, stop at a bad loss, mark finished checkpoints."""

        def _check(self, args: Any, step: int) -> None:
            bad = hooks.bad_step()
            if bad is not None:
                kept = complete_checkpoints(Path(args.output_dir))
                hooks.stop("the loss is NaN or infinite", bad, kept[-1] if kept else None)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Reading the flag costs a GPU a synchronisation, so there it is read at logs and
            # checkpoints.
            if args.device.type == "cpu":
                self._check(args, state.global_step)
            scaler = getattr(trainer.accelerator, "scaler", None)
            if scaler is not None and scaler.is_enabled():
                # Gradients are still multiplied by the loss scale unless clipping has divided them
                # already; a second unscale_ of one step is refused, which is the only public way to
                # know.
                try:
                    trainer.accelerator.unscale_gradients(kwargs.get("optimizer"))
                except RuntimeError as error:
                    if "already been called" not in str(error):
                        raise
            elif not hooks.saw_loss and not hooks.gradients_finite():
                kept = complete_checkpoints(Path(args.output_dir))
                hooks.stop(
                    "a gradient is NaN or infinite", state.global_step, kept[-1] if kept else None
                )
            hooks.add_l1()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._check(args, state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._check(args, state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._check(
                args, state.global_step
            )  # raises before the marker: such a checkpoint is not good
            if not state.is_world_process_zero:
                return
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                atomic_write_json(folder / COMPLETE_MARKER, {"global_step": state.global_step})

    return LotteryTicketCallback()


def attach_hooks(hooks: PhaseHooks, trainer: Any, model: nn.Module) -> Callable[[], None]:
    """Connect ``hooks`` to a trainer; returns what disconnects them from the model.

    Raises:
        TypeError: the trainer has no ``add_callback`` but the penalty needs one.
    """
    if is_hf_trainer(trainer):
        trainer.add_callback(_hf_callback(hooks, trainer))
        handle = hooks.watch(model, lambda: int(trainer.state.global_step))
        return handle.remove
    add = getattr(trainer, "add_callback", None)
    if add is not None:
        add(_LoopHooks(hooks))
    elif hooks.l1:
        raise TypeError(
            f"l1={hooks.l1} needs a trainer that calls back before each optimizer step; "
            f"{type(trainer).__name__} has no add_callback(). Use a Hugging Face Trainer, "
            "sparseft.training.LoopTrainer, or l1=0."
        )
    return lambda: None
