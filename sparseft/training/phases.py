"""One phase of a lottery ticket: what the factory is told, how its trainer is run and resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import nn

from sparseft.errors import DataError
from sparseft.modules._collective import Ranks
from sparseft.training.hooks import (
    PhaseHooks,
    attach_hooks,
    complete_checkpoints,
    is_hf_trainer,
    remove_incomplete_checkpoints,
)
from sparseft.training.mask_choice import Batches
from sparseft.training.rng import seed_everything
from sparseft.training.state import RunState

if TYPE_CHECKING:
    from sparseft.attachment import Attachment

__all__ = [
    "MakeTrainer",
    "Phase",
    "TrainerLike",
    "run_phase",
    "trainer_batches",
    "trainer_settings",
]

logger = logging.getLogger(__name__)

# TrainingArguments that decide the numbers of a run. Paths, logging and saving may change when a
# run is resumed.
_HF_SETTINGS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "seed",
    "data_seed",
    "fp16",
    "bf16",
    "optim",
    "label_smoothing_factor",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "group_by_length",
    "load_best_model_at_end",
    "metric_for_best_model",
)


class TrainerLike(Protocol):
    """Whatever can train a phase: a Hugging Face ``Trainer``, `LoopTrainer`, or an object with this
    method.

    Without ``add_callback`` it cannot take an L1 penalty; without checkpoints an interrupted phase
    starts over.
    """

    def train(self, resume_from_checkpoint: Any = None) -> Any:
        """Train to the end, from a checkpoint if one is given."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a factory of trainers is told about the phase it builds one for.

    Args:
        name: "dense" (phase 1, every candidate is trained) or "sparse" (phase 2, the mask is).
        iteration: 0-based repetition of the two phases.
        index: 0-based number of the phase within the run.
        output_dir: where the trainer must keep its checkpoints.
        seed: derived from the run's seed and the phase; for the trainer's own generators.
        parameters: what is trained, by name: whole parameters, or compact leaves in the sparse
            phase.
        attachment: handle of the attached masks, None in the dense phase.
        nnz: entries in the mask, None in the dense phase.
    """

    name: Literal["dense", "sparse"]
    iteration: int
    index: int
    output_dir: Path
    seed: int
    parameters: Mapping[str, nn.Parameter] = field(repr=False)
    attachment: Attachment | None = field(default=None, repr=False)
    nnz: int | None = None


MakeTrainer = Callable[[nn.Module, Phase], TrainerLike]


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """Return the settings that decide the numbers of a phase, as far as the trainer shows them."""
    if is_hf_trainer(trainer):
        values = trainer.args.to_dict()
        out = {key: values[key] for key in _HF_SETTINGS if key in values}
        try:
            out["examples"] = len(trainer.train_dataset)
        except TypeError:  # streamed data sets have no length
            pass
        return {"kind": type(trainer).__name__, **out}
    settings = getattr(trainer, "settings", None)
    found = settings() if callable(settings) else {}
    return {"kind": type(trainer).__name__, **found}


def trainer_batches(trainer: Any, model: nn.Module) -> Batches:
    """Return a trainer's training batches, on the model's device, and its loss.

    Raises:
        TypeError: it shows no batches.
    """
    if is_hf_trainer(trainer):
        return Batches(trainer.get_train_dataloader(), None)
    batches = getattr(trainer, "batches", None)
    if not callable(batches):
        raise TypeError(
            f"a selector by gradients needs batches; {type(trainer).__name__} has no batches(). "
            "Use a Hugging Face Trainer, sparseft.training.LoopTrainer, or give "
            "selector_options={'batches': ...}."
        )
    model.to(trainer.device)
    return Batches(batches(), trainer.loss_fn)


def _resume_point(trainer: Any, folder: Path) -> Path | None:
    if is_hf_trainer(trainer):
        given = Path(trainer.args.output_dir)
        if given.resolve() != folder.resolve():
            raise ValueError(
                f"the Trainer writes to {given}, but this phase must keep its checkpoints in "
                f"{folder}. "
                "Pass TrainingArguments(output_dir=phase.output_dir, ...) in make_trainer."
            )
        remove_incomplete_checkpoints(folder)
        found = complete_checkpoints(folder)
        return found[-1] if found else None
    latest = getattr(trainer, "latest_checkpoint", None)
    return latest() if callable(latest) else None


def _refuse_empty(trainer: Any) -> None:
    try:
        empty = trainer.train_dataset is not None and len(trainer.train_dataset) == 0
    except (AttributeError, TypeError):
        return
    if empty:
        raise DataError(
            "the Trainer's train_dataset is empty; check the files and filters it was made from."
        )


def run_phase(
    make_trainer: MakeTrainer,
    model: nn.Module,
    phase: Phase,
    *,
    key: str,
    state: RunState,
    hooks: PhaseHooks,
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """Build the phase's trainer, run it from its last good checkpoint, and return its log.

    Raises:
        ResumeError: the phase was begun with other trainer settings.
        DataError: empty training data.
        NonFiniteLossError: NaN or infinite loss.
    """
    phase.output_dir.mkdir(parents=True, exist_ok=True)
    seed_everything(phase.seed)
    trainer: Any = make_trainer(model, phase)
    if not callable(getattr(trainer, "train", None)):
        raise TypeError(
            f"make_trainer returned {type(trainer).__name__}, wanted an object with "
            "train(resume_from_checkpoint=...): a Trainer or a sparseft.training.LoopTrainer."
        )
    _refuse_empty(trainer)
    with ranks.lead_first("checkpoints are looked through"):
        checkpoint = _resume_point(trainer, phase.output_dir)
    state.start(key, trainer_settings(trainer))
    disconnect = attach_hooks(hooks, trainer, model)
    if checkpoint is not None:
        logger.info("%s phase: going on from %s", phase.name, checkpoint)
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        disconnect()
        if is_hf_trainer(trainer):
            # Under mixed precision accelerate has replaced model.forward; without this every phase
            # wraps once more.
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if is_hf_trainer(trainer):
        return [dict(entry) for entry in trainer.state.log_history]
    return [dict(entry) for entry in getattr(result, "history", None) or []]
