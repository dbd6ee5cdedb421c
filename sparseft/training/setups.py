"""What the training units of a recipe begin with: model, trainer factory, data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparseft.data import Example, encode, load_classification, load_mlm_texts
from sparseft.errors import RecipeError, UnknownNameError
from sparseft.evaluation import Task, get_task, load_model, load_tokenizer
from sparseft.modules import ParameterIndex
from sparseft.selection.patterns import match_names
from sparseft.training.loop import LoopTrainer
from sparseft.training.lottery import SourceAdapter
from sparseft.training.objectives import masked_lm_loss, untie_output_embeddings
from sparseft.training.phases import MakeTrainer, Phase
from sparseft.training.recipe import Recipe
from sparseft.training.rng import derive_seed, seed_everything
from sparseft.training.sections import DEVICE_NAMES, TaskSection, TrainSection, is_device_name

__all__ = ["Setup", "base_of", "device_named", "language_setup", "load_base", "task_setup"]


@dataclass(frozen=True)
class Setup:
    """One adapter's training, ready for `lottery_ticket` or `dense_phase`.

    Args:
        model, make_trainer: their first arguments.
        shared: keywords that both take.
        name: of the adapter.
        data: size and digest of the training data, for the adapter's metadata.
    """

    model: nn.Module = field(repr=False)
    make_trainer: MakeTrainer = field(repr=False)
    shared: dict[str, Any] = field(repr=False)
    name: str
    data: dict[str, Any]


def language_setup(recipe: Recipe, language: str, *, progress: bool) -> Setup:
    """Return what trains a language adapter by masked language modelling."""
    section = recipe.language
    tokenizer = load_tokenizer(base_of(recipe))
    files = [recipe.path(p) for p in section.texts[language]]
    seed = derive_seed(section.seed, "language", language)
    dataset, collate = load_mlm_texts(
        files, tokenizer, section.max_length, seed, mask_rate=section.mask_rate
    )
    seed_everything(seed)
    model, _ = load_base(recipe, "masked-lm")
    if section.untie_embeddings:
        untie_output_embeddings(model)
    make = _factory(recipe, section, dataset, collate, masked_lm_loss(model), progress)
    return _setup(section, model, make, dataset, language, seed, section.full_params)


def task_setup(
    recipe: Recipe, seed: int, *, sources: Sequence[SourceAdapter] = (), progress: bool
) -> Setup:
    """Return what trains the task adapter of one seed, ``sources`` beneath."""
    from transformers import DataCollatorWithPadding

    section = recipe.task
    if section is None:
        raise RecipeError("the recipe has no task section.")
    task = get_task(section.name)
    tokenizer = load_tokenizer(base_of(recipe))
    dataset = encode(tokenizer, _task_examples(recipe, section, task), section.max_length)
    seed_everything(derive_seed(seed, "head"))
    model, new = load_base(recipe, "sequence-classification", num_labels=len(task.labels))
    make = _factory(recipe, section, dataset, DataCollatorWithPadding(tokenizer), None, progress)
    # Whatever the base lacks begins at random, so only whole values mean anything.
    full = [*section.full_params, *new]
    name = f"{task.name}-seed{seed}"
    return _setup(section, model, make, dataset, name, seed, full, sources)


def _setup(
    section: TrainSection,
    model: Any,
    make: MakeTrainer,
    dataset: Any,
    name: str,
    seed: int,
    full_params: Sequence[str],
    sources: Sequence[SourceAdapter] = (),
) -> Setup:
    _check_patterns(section, model)
    if section.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shared = {
        "exclude": section.exclude,
        "full_params": full_params,
        "source_adapters": sources,
        "seed": seed,
    }
    data = {"examples": len(dataset), "digest": _digest_rows(dataset)}
    return Setup(model, make, shared, name, data)


def device_named(name: str, key: str = "model.device") -> torch.device:
    """Return the device that a recipe or a command line names.

    Args:
        name: auto (cuda where there is one), cpu, cuda or cuda:N.
        key: what the user set, for the message.

    Raises:
        RecipeError: another name, or a device that torch does not see here.
    """
    if not is_device_name(name):
        raise RecipeError(f"{key} is {name!r}, wanted {DEVICE_NAMES}.")
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if available else 0
        if (device.index or 0) >= count:
            seen = f"only {count} (cuda:0 to cuda:{count - 1})" if count else "no such device"
            raise RecipeError(f"{key} is {name!r}, but torch sees {seen}; use cpu or auto.")
    return device


def base_of(recipe: Recipe) -> str:
    """Return the base as a path where it is one, also below ``data_dir``."""
    recipe.check_data_dir()  # without it a folder's name would be looked for on the hub
    below = recipe.path(recipe.model.base)
    return str(below) if below.is_dir() else recipe.model.base


def load_base(recipe: Recipe, kind: str, **options: Any) -> tuple[Any, list[str]]:
    """Return the model, and the names of parameters that the base does not have (a new head)."""
    dtype = getattr(torch, recipe.model.dtype)
    new: list[str] = []
    model = load_model(base_of(recipe), kind, missing=new, dtype=dtype, **options)
    return model.to(device_named(recipe.model.device)), new


def _factory(
    recipe: Recipe,
    section: TrainSection,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    loss_fn: Any,
    progress: bool,
) -> MakeTrainer:
    def make(model: nn.Module, phase: Phase) -> LoopTrainer:
        number = 0 if phase.name == "dense" else 1
        lr = section.lr[number]

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            decay = section.weight_decay
            if phase.name == "dense":
                return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)
            from sparseft.optim import SparseAdamW

            return SparseAdamW(parameters, lr=lr, weight_decay=decay)

        return LoopTrainer(
            model,
            dataset,
            collate=collate,
            loss_fn=loss_fn,
            optimizer=optimizer,
            steps=section.steps[number],
            output_dir=phase.output_dir,
            batch_size=section.batch_size,
            accumulate=section.accumulate,
            lr=lr,
            weight_decay=section.weight_decay,
            schedule=section.schedule,
            warmup_steps=section.warmup_steps,
            max_grad_norm=section.max_grad_norm,
            autocast=torch.bfloat16 if section.autocast else None,
            device=device_named(recipe.model.device),
            save_every=section.save_every,
            log_every=section.log_every,
            seed=phase.seed,
            progress=progress,
        )

    return make


def _check_patterns(section: TrainSection, model: nn.Module) -> None:
    """Check the globs of a section here, where the recipe's own key can be named."""
    index = ParameterIndex(model)
    for key in ("exclude", "full_params"):
        try:
            match_names(index, getattr(section, key), f"{section.where}.{key}")
        except UnknownNameError as bad:
            raise RecipeError(str(bad)) from None


def _digest_rows(rows: Any) -> str:
    """Return 16 hex digits over the token ids and labels of a data set, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for i in range(len(rows)):
        row = rows[i]
        digest.update(repr((row["input_ids"], row.get("labels"))).encode())
    return digest.hexdigest()


def _task_examples(recipe: Recipe, section: TaskSection, task: Task) -> list[Example]:
    if section.train_file is not None:
        examples = load_classification(
            recipe.path(section.train_file),
            task.labels,
            text_fields=section.text_fields,
            label_field=section.label_field,
            columns=section.columns,
        )
    elif recipe.evaluation.data is not None:
        root = recipe.evaluation.data
        where = root if root.startswith("hf:") else recipe.path(root)
        examples = task.load(where, section.source, "train")
    else:
        raise RecipeError(
            "the task has no training data: set task.train_file, or evaluation.data to the task's "
            "folder."
        )
    return examples[: section.max_examples]
