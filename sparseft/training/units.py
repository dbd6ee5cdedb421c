"""The pieces of a study that run on their own: one adapter, or the scores of one seed.

Each unit has its own folder, is finished once its result is there, and can run in its own process
beside others.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft.adapter import Adapter
from sparseft.errors import RecipeError
from sparseft.evaluation import (
    Result,
    evaluate_classifier,
    get_task,
    load_tokenizer,
)
from sparseft.io.atomic import atomic_write_json
from sparseft.modules import ParameterIndex
from sparseft.training.lottery import lottery_ticket
from sparseft.training.marks import finished, mark_finished, read_mark, section_settings
from sparseft.training.mask_choice import MaskChoice
from sparseft.training.recipe import Recipe
from sparseft.training.sections import LanguageSection, TaskSection, TrainSection
from sparseft.training.setups import Setup, base_of, language_setup, load_base, task_setup
from sparseft.training.state import TensorFile

__all__ = [
    "Unit",
    "dense_path",
    "evaluation_unit",
    "file_digest",
    "language_unit",
    "put_dense",
    "read_rows",
    "score",
    "task_unit",
]

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


def _train(
    setup: Setup,
    recipe: Recipe,
    section: TrainSection,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    result = lottery_ticket(
        setup.make_trainer,
        setup.model,
        nnz=section.nnz,
        density=section.density,
        output_dir=folder,
        iterations=section.iterations,
        selector=section.selector,
        scope=section.scope,
        selector_options=recipe.options_of(section),
        denoise=section.denoising(),
        l1=section.l1,
        adapter_name=setup.name,
        base_name=recipe.model.base,
        metadata={"data": setup.data},
        **setup.shared,
    )
    result.adapter.save(folder / "adapter")
    mark_finished(folder, settings)


def _trained(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a unit's adapter is there, made with these settings as far as the folder tells."""
    known = bool(read_mark(folder))  # not in folders of before `mark_finished`
    return adapter_path(folder).is_file() and (not known or finished(folder, settings))


def adapter_path(folder: Path) -> Path:
    """Return the file of a finished unit's adapter."""
    return folder / "adapter" / "adapter.safetensors"


def language_unit(recipe: Recipe, language: str, folder: Path, *, progress: bool) -> Unit:
    """Return the unit that trains a language adapter by masked language modelling."""
    section: LanguageSection = recipe.language
    settings = section_settings(recipe, section, texts=section.texts[language])

    def run() -> None:
        setup = language_setup(recipe, language, progress=progress)
        _train(setup, recipe, section, folder, settings)

    return Unit(f"language-{language}", run, lambda: _trained(folder, settings))


def task_unit(recipe: Recipe, seed: int, folder: Path, home: Path, *, progress: bool) -> Unit:
    """Return the unit that trains the task adapter of one seed."""
    section = recipe.task
    if section is None:
        raise RecipeError("the recipe has no task section.")
    task_section: TaskSection = section
    source_unit = f"language-{section.source}"
    settings = section_settings(recipe, section)

    def run() -> None:
        sources = []
        if task_section.source_language_adapter:
            sources.append(Adapter.load(adapter_path(home / source_unit)))
        setup = task_setup(recipe, seed, sources=sources, progress=progress)
        _train(setup, recipe, task_section, folder, settings)

    needs = (source_unit,) if section.source_language_adapter else ()
    return Unit(f"task-seed{seed}", run, lambda: _trained(folder, settings), needs)


# -- evaluation ---


def evaluation_unit(recipe: Recipe, seed: int, path: Path, home: Path) -> Unit:
    """Return the unit that scores one seed in every setting and language into the file ``path``."""
    section, task_section = recipe.evaluation, recipe.task
    if task_section is None:
        raise RecipeError("the recipe has no task section to evaluate.")
    task_unit_name = f"task-seed{seed}"
    adapted = [lang for lang in section.languages if lang in recipe.language.texts]
    settings = list(section.settings)
    if not _has_dense(task_section) and "full" in settings:
        logger.info("selector %s runs no dense phase: no full setting", task_section.selector)
        settings.remove("full")
    wanted = [
        (setting, language)
        for setting in settings
        for language in (adapted if setting == "task+language" else section.languages)
    ]
    needs = (task_unit_name, *(f"language-{lang}" for lang in adapted))

    def key() -> dict[str, Any]:
        """What the scores depend on, as far as it can differ between runs in one folder."""
        digests = {n: file_digest(adapter_path(home / n)) for n in needs}
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


def _has_dense(section: TaskSection) -> bool:
    """Whether a section's lottery tickets begin with full fine-tuning."""
    choice = MaskChoice.of(
        section.selector, section.scope, section.selector_options, section.denoising()
    )
    return choice.needs_dense


def _is(row: Result, setting: str, language: str) -> bool:
    return row.setting == LABELS[setting] and row.language == language


def file_digest(path: Path) -> str:
    """Return 32 hex digits over a file's bytes."""
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
    tokenizer = load_tokenizer(base_of(recipe))
    model, _ = load_base(recipe, "sequence-classification", num_labels=len(task.labels))
    folder = home / f"task-seed{seed}"
    adapter = Adapter.load(adapter_path(folder))
    composer = Composer(model)
    composer.add("task", adapter)
    languages = {lang for setting, lang in missing if setting == "task+language"}
    for language in sorted(languages):
        composer.add(language, Adapter.load(adapter_path(home / f"language-{language}")))
    if task_section.source_language_adapter:
        composer.add("source", Adapter.load(adapter_path(home / f"language-{task_section.source}")))

    for setting, language in sorted(missing, key=lambda pair: pair[0] == "full"):
        if setting == "full":
            composer.revert()
            put_dense(model, dense_path(folder, task_section.iterations))
        elif setting == "task":
            coeffs = {"task": section.task_coeff}
            if task_section.source_language_adapter:
                coeffs["source"] = 1.0  # the diff is relative to it
            composer.switch(coeffs)
        else:
            composer.switch({"task": section.task_coeff, language: section.language_coeff})
        density = None if setting == "full" else adapter.metadata.density
        rows = score(
            recipe, model, tokenizer, language, setting=LABELS[setting], seed=seed, density=density
        )
        yield setting, language, rows


def score(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    language: str,
    *,
    setting: str,
    seed: int,
    density: float | None,
) -> list[Result]:
    """Return the scores of a model as it is now on one language, one row a metric."""
    section, task_section = recipe.evaluation, recipe.task
    if task_section is None or section.data is None:
        raise RecipeError("the recipe has no task and evaluation.data to score on.")
    task = get_task(task_section.name)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=section.autocast):
        found = evaluate_classifier(
            model,
            tokenizer,
            task,
            language,
            section.split,
            root=section.data if section.data.startswith("hf:") else recipe.path(section.data),
            batch_size=section.batch_size,
            max_length=section.max_length,
        )
    value = found[section.metric]
    logger.info("seed %d, %s, %s: %s %.4f", seed, setting, language, section.metric, value)
    return [
        Result(
            setting=setting,
            language=language,
            seed=seed,
            metric=metric,
            value=value,
            split=section.split,
            task=task.name,
            n=len(found),
            density=density,
        )
        for metric, value in found.metrics.items()
    ]


def dense_path(folder: Path, iterations: int = 1) -> Path:
    """Return the file with the result of a run's last dense phase."""
    return folder / f"iteration-{iterations - 1}" / "dense.safetensors"


def put_dense(model: nn.Module, path: Path) -> None:
    """Load the result of a dense phase into the model."""
    values = TensorFile(path)
    index = ParameterIndex(model)
    with torch.no_grad():
        for name in values:
            index.get(name).copy_(values[name])
