"""A whole study from a recipe: language adapters, task adapters for each seed, scores, report.

Everything is done unit by unit (`sparseft.training.units`); what is finished is skipped, so the
same call goes on after an interruption, and several processes can share a study with ``only``.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft._text import did_you_mean
from sparseft.errors import RecipeError
from sparseft.evaluation import Result, Results, provenance
from sparseft.modules.ranks import refuse_several
from sparseft.training.recipe import Recipe
from sparseft.training.units import Unit, evaluation_unit, language_unit, read_rows, task_unit

__all__ = ["StudyResult", "choose_units", "results_of", "run_study", "run_units", "study_units"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyResult:
    """What a call of `run_study` leaves.

    Args:
        output_dir: the study's folder.
        finished: units whose results are there now.
        missing: units that have not run yet.
        results: the scores, None before the first.
        files: the report's files, empty while units are missing.
    """

    output_dir: Path
    finished: list[str]
    missing: list[str]
    results: Results | None = field(default=None, repr=False)
    files: list[Path] = field(default_factory=list)


def study_units(recipe: Recipe, *, progress: bool = False) -> list[Unit]:
    """Return the units of a recipe in the order they run."""
    home = Path(recipe.output_dir).expanduser()
    units = [
        language_unit(recipe, language, home / f"language-{language}", progress=progress)
        for language in recipe.language.texts
    ]
    if recipe.task is not None:
        units += [
            task_unit(recipe, seed, home / f"task-seed{seed}", home, progress=progress)
            for seed in recipe.task.seeds
        ]
        if recipe.evaluation.languages:
            units += [
                evaluation_unit(recipe, seed, _rows_path(home, seed), home)
                for seed in recipe.task.seeds
            ]
    return units


def _rows_path(home: Path, seed: int) -> Path:
    return home / f"evaluate-seed{seed}.json"


def run_study(
    recipe: Recipe,
    *,
    only: Sequence[str] = (),
    progress: bool = False,
    on_unit: Callable[[Unit, int, int], None] | None = None,
) -> StudyResult:
    """Run what is missing of a study, and write its report once every unit is there.

    Args:
        recipe: what to do.
        only: globs over unit names; run just these.
        progress: show progress bars.
        on_unit: called with (unit, its number, how many) before each that runs.

    Raises:
        RecipeError: a pattern of ``only`` that matches nothing, or a unit whose inputs have not
            been made and are not among those to run.
        ResumeError: a unit's folder holds a run with other settings, or another process is in it.
    """
    units = study_units(recipe, progress=progress)
    finished, missing = run_units(units, only=only, on_unit=on_unit)
    results = _collect(recipe)
    files: list[Path] = []
    if results is not None and not missing:
        files = results.save(Path(recipe.output_dir).expanduser() / "results")
    return StudyResult(Path(recipe.output_dir), finished, missing, results, files)


def run_units(
    units: Sequence[Unit],
    *,
    only: Sequence[str] = (),
    on_unit: Callable[[Unit, int, int], None] | None = None,
) -> tuple[list[str], list[str]]:
    """Run what is missing of some units; return the names of those done now and of the others.

    Args:
        units: in the order they run.
        only, on_unit: as in `run_study`.

    Raises:
        RecipeError: as `run_study`.
        SparseFtError: started as several processes.
    """
    refuse_several(
        "a study (sparseft train, sweep)",
        "Start it once, without the launcher. To share a sweep among GPUs, start one process for "
        "each with a pattern of its own: --only PATTERN.",
    )
    chosen = choose_units(units, only)
    by_name = {unit.name: unit for unit in units}
    for number, unit in enumerate(chosen, start=1):
        if unit.done():
            logger.info("%s: done before", unit.name)
            continue
        lacking = [n for n in unit.needs if not by_name[n].done()]
        if lacking:
            raise RecipeError(
                f"unit {unit.name} reads the results of {', '.join(lacking)}, which have not been "
                "made; "
                "run them first (or without --only)."
            )
        if on_unit is not None:
            on_unit(unit, number, len(chosen))
        unit.run()
    finished = [unit.name for unit in units if unit.done()]
    return finished, [unit.name for unit in units if unit.name not in finished]


def choose_units(units: Sequence[Unit], only: Sequence[str]) -> list[Unit]:
    """Return the units that globs match, all without globs.

    Raises:
        RecipeError: a pattern that matches nothing.
    """
    names = [unit.name for unit in units]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise RecipeError(
                f"no unit matches {pattern!r}.{did_you_mean(pattern, names)} "
                f"Units: {', '.join(names)}."
            )
    return [u for u in units if not only or any(fnmatch.fnmatch(u.name, p) for p in only)]


def _collect(recipe: Recipe) -> Results | None:
    if recipe.task is None:
        return None
    home = Path(recipe.output_dir).expanduser()
    rows = [row for seed in recipe.task.seeds for row in read_rows(_rows_path(home, seed))]
    return results_of(recipe, rows)


def results_of(recipe: Recipe, rows: list[Result]) -> Results | None:
    """Return scores as the results of a recipe, with what made them; None without a score."""
    if recipe.task is None or not rows:
        return None
    metric = recipe.evaluation.metric
    rows.sort(key=lambda row: row.metric != metric)  # the report's first metric is the recipe's
    return Results(
        rows=rows,
        source_language=recipe.task.source,
        provenance=provenance(recipe=_portable(recipe), processor=_processor()),
        title=recipe.description or recipe.name,
    )


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the folders of this machine."""
    content = recipe.as_dict()
    for key in ("data_dir", "output_dir"):
        content.pop(key)
    base = content["model"]["base"]
    if os.path.isabs(base):
        content["model"]["base"] = Path(base).name
    return content


def _processor() -> str:
    """Return the processor's model name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
