"""The pieces of a study that run on their own: one adapter, or the scores of one seed.

Each unit has its own folder, is finished once its result is there, and can run in its own process
beside others.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft.adapter import Adapter
from sparseft.data import Example, encode, load_classification, load_mlm_texts
from sparseft.errors import RecipeError, UnknownNameError
from sparseft.evaluation import (
    Result,
    Task,
    evaluate_classifier,
    get_task,
    load_model,
    load_tokenizer,
)
from sparseft.io.atomic import atomic_write_json
from sparseft.modules import ParameterIndex
from sparseft.selection.patterns import match_names
from sparseft.training.loop import LoopTrainer
from sparseft.training.lottery import LotteryTicketResult, SourceAdapter, lottery_ticket
from sparseft.training.objectives import masked_lm_loss, untie_output_embeddings
from sparseft.training.phases import MakeTrainer, Phase
from sparseft.training.recipe import (
    DEVICE_NAMES,
    LanguageSection,
    Recipe,
    TaskSection,
    TrainSection,
    is_device_name,
)
from sparseft.training.rng import derive_seed, seed_everything
from sparseft.training.state import TensorFile

__all__ = ["Unit", "device_named", "evaluation_unit", "language_unit", "read_rows", "task_unit"]

logger = logging.getLogger(__name__)

# Setting of a recipe -> what it is called in the report.
LABELS = {"full": "full fine-tuning", "task": "task", "task+language": "task + language"}


@dataclass(frozen=True)
class Unit:
    """A piece of a study.

    Args:
        name: as ``--only`` takes it: ``language-ban``, ``task-seed0``, ``evaluate-seed0``.
        run: does the work; what is on disk already is not done again.
        done: whether the result is there.
        needs: names of units whose results it reads.
    """

    name: str
    run: Callable[[], None] = field(repr=False)
    done: Callable[[], bool] = field(repr=False)
    needs: tuple[str, ...] = ()


# -- training ---


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


def _base(recipe: Recipe) -> str:
    """Return the base as a path where it is one, also below ``data_dir``."""
    recipe.check_data_dir()  # without it a folder's name would be looked for on the hub
    below = recipe.path(recipe.model.base)
    return str(below) if below.is_dir() else recipe.model.base


def _load(recipe: Recipe, kind: str, **options: Any) -> tuple[Any, list[str]]:
    """Return the model, and the names of parameters that the base does not have (a new head)."""
    dtype = getattr(torch, recipe.model.dtype)
    new: list[str] = []
    model = load_model(_base(recipe), kind, missing=new, dtype=dtype, **options)
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


def _train(
    recipe: Recipe,
    section: TrainSection,
    model: Any,
    make_trainer: MakeTrainer,
    folder: Path,
    *,
    name: str,
    seed: int,
    full_params: Sequence[str],
    sources: Sequence[SourceAdapter] = (),
    data: dict[str, Any],
) -> LotteryTicketResult:
    _check_patterns(section, model)
    if section.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    result = lottery_ticket(
        make_trainer,
        model,
        nnz=section.nnz,
        density=section.density,
        output_dir=folder,
        iterations=section.iterations,
        selector=section.selector,
        scope=section.scope,
        exclude=section.exclude,
        full_params=full_params,
        l1=section.l1,
        source_adapters=sources,
        seed=seed,
        adapter_name=name,
        base_name=recipe.model.base,
        metadata={"data": data},
    )
    # Last, because its presence says that the unit is finished.
    result.adapter.save(folder / "adapter")
    return result


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


def adapter_path(folder: Path) -> Path:
    """Return the file of a finished unit's adapter."""
    return folder / "adapter" / "adapter.safetensors"


def language_unit(recipe: Recipe, language: str, folder: Path, *, progress: bool) -> Unit:
    """Return the unit that trains a language adapter by masked language modelling."""
    section: LanguageSection = recipe.language

    def run() -> None:
        tokenizer = load_tokenizer(_base(recipe))
        files = [recipe.path(p) for p in section.texts[language]]
        seed = derive_seed(section.seed, "language", language)
        dataset, collate = load_mlm_texts(
            files, tokenizer, section.max_length, seed, mask_rate=section.mask_rate
        )
        seed_everything(seed)
        model, _ = _load(recipe, "masked-lm")
        if section.untie_embeddings:
            untie_output_embeddings(model)
        make = _factory(recipe, section, dataset, collate, masked_lm_loss(model), progress)
        _train(
            recipe,
            section,
            model,
            make,
            folder,
            name=language,
            seed=seed,
            full_params=section.full_params,
            data={"examples": len(dataset), "digest": _digest_rows(dataset)},
        )

    return Unit(f"language-{language}", run, lambda: adapter_path(folder).is_file())


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


def task_unit(recipe: Recipe, seed: int, folder: Path, home: Path, *, progress: bool) -> Unit:
    """Return the unit that trains the task adapter of one seed."""
    section = recipe.task
    if section is None:
        raise RecipeError("the recipe has no task section.")
    task_section: TaskSection = section
    source_unit = f"language-{section.source}"

    def run() -> None:
        from transformers import DataCollatorWithPadding

        task = get_task(task_section.name)
        tokenizer = load_tokenizer(_base(recipe))
        dataset = encode(
            tokenizer, _task_examples(recipe, task_section, task), task_section.max_length
        )
        seed_everything(derive_seed(seed, "head"))
        model, new = _load(recipe, "sequence-classification", num_labels=len(task.labels))
        sources: list[SourceAdapter] = []
        if task_section.source_language_adapter:
            sources.append(Adapter.load(adapter_path(home / source_unit)))
        make = _factory(
            recipe, task_section, dataset, DataCollatorWithPadding(tokenizer), None, progress
        )
        _train(
            recipe,
            task_section,
            model,
            make,
            folder,
            name=f"{task.name}-seed{seed}",
            seed=seed,
            # Whatever the base lacks begins at random, so only whole values mean anything.
            full_params=[*task_section.full_params, *new],
            sources=sources,
            data={"examples": len(dataset), "digest": _digest_rows(dataset)},
        )

    needs = (source_unit,) if section.source_language_adapter else ()
    return Unit(f"task-seed{seed}", run, lambda: adapter_path(folder).is_file(), needs)


# -- evaluation ---


def evaluation_unit(recipe: Recipe, seed: int, path: Path, home: Path) -> Unit:
    """Return the unit that scores one seed in every setting and language into the file ``path``."""
    section, task_section = recipe.evaluation, recipe.task
    if task_section is None:
        raise RecipeError("the recipe has no task section to evaluate.")
    task_unit_name = f"task-seed{seed}"
    adapted = [lang for lang in section.languages if lang in recipe.language.texts]
    wanted = [
        (setting, language)
        for setting in section.settings
        for language in (adapted if setting == "task+language" else section.languages)
    ]
    needs = (task_unit_name, *(f"language-{lang}" for lang in adapted))

    def key() -> dict[str, Any]:
        """What the scores depend on, as far as it can differ between runs in one folder."""
        digests = {n: _file_digest(adapter_path(home / n)) for n in needs}
        about = {k: v for k, v in vars(section).items() if k not in ("languages", "settings")}
        return {"evaluation": about, "adapters": digests}

    def done() -> bool:
        if not all(adapter_path(home / n).is_file() for n in needs):
            return False
        rows = read_rows(path, key())
        return all(any(_is(r, s, lang) for r in rows) for s, lang in wanted)

    def run() -> None:
        rows = read_rows(path, key())
        missing = [(s, lang) for s, lang in wanted if not any(_is(r, s, lang) for r in rows)]
        for setting, language, scores in _scores(recipe, seed, home, missing):
            rows = [r for r in rows if not _is(r, setting, language)] + scores
            atomic_write_json(path, {"key": key(), "rows": [vars(r) for r in rows]})

    return Unit(f"evaluate-seed{seed}", run, done, needs)


def _is(row: Result, setting: str, language: str) -> bool:
    return row.setting == LABELS[setting] and row.language == language


def _file_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def read_rows(path: Path, key: dict[str, Any] | None = None) -> list[Result]:
    """Return the scores in a unit's file; none if there is no file or it has another key."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if key is not None and content["key"] != json.loads(json.dumps(key)):
        return []
    return [Result(**row) for row in content["rows"]]


def _scores(recipe: Recipe, seed: int, home: Path, missing: list[tuple[str, str]]) -> Any:
    """Yield (setting, language, rows) for each missing pair."""
    from sparseft.composition import Composer

    section, task_section = recipe.evaluation, recipe.task
    if task_section is None or section.data is None or not missing:
        return
    task = get_task(task_section.name)
    tokenizer = load_tokenizer(_base(recipe))
    model, _ = _load(recipe, "sequence-classification", num_labels=len(task.labels))
    folder = home / f"task-seed{seed}"
    adapter = Adapter.load(adapter_path(folder))
    composer = Composer(model)
    composer.add("task", adapter)
    languages = {lang for setting, lang in missing if setting == "task+language"}
    for language in sorted(languages):
        composer.add(language, Adapter.load(adapter_path(home / f"language-{language}")))
    if task_section.source_language_adapter:
        composer.add("source", Adapter.load(adapter_path(home / f"language-{task_section.source}")))

    root = section.data if section.data.startswith("hf:") else recipe.path(section.data)
    for setting, language in sorted(missing, key=lambda pair: pair[0] == "full"):
        if setting == "full":
            composer.revert()
            _put_dense(task_section, model, folder)
        elif setting == "task":
            coeffs = {"task": section.task_coeff}
            if task_section.source_language_adapter:
                coeffs["source"] = 1.0  # the diff is relative to it
            composer.switch(coeffs)
        else:
            composer.switch({"task": section.task_coeff, language: section.language_coeff})
        found = evaluate_classifier(
            model,
            tokenizer,
            task,
            language,
            section.split,
            root=root,
            batch_size=section.batch_size,
            max_length=section.max_length,
        )
        rows = [
            Result(
                setting=LABELS[setting],
                language=language,
                seed=seed,
                metric=metric,
                value=value,
                split=section.split,
                task=task.name,
                n=len(found),
                density=None if setting == "full" else adapter.metadata.density,
            )
            for metric, value in found.metrics.items()
        ]
        logger.info(
            "seed %d, %s, %s: %s %.4f",
            seed,
            setting,
            language,
            section.metric,
            found[section.metric],
        )
        yield setting, language, rows


def _put_dense(task: TaskSection, model: nn.Module, folder: Path) -> None:
    """Load the result of phase 1 into the model."""
    values = TensorFile(folder / f"iteration-{task.iterations - 1}" / "dense.safetensors")
    index = ParameterIndex(model)
    with torch.no_grad():
        for name in values:
            index.get(name).copy_(values[name])
