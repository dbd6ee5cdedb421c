"""A sweep: several ways to choose masks, at several densities, on one dense phase a seed.

For every seed (and language) of a recipe the dense phase runs once; each method of its ``sweep``
section scores it once, and trains a mask of every density from the same start on the same batches.

On disk (``output_dir``)::

    phase1-seed0/  phase1-language-ban/     dense phases
    METHOD/seed0/  METHOD/language-ban/     a lottery ticket for every density
    METHOD/evaluate-seed0.json              scores
    full/evaluate-seed0.json                scores of the dense phases
    results/                                table, comparison, plots
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparseft.adapter import Adapter
from sparseft.errors import RecipeError
from sparseft.evaluation import Result, Results, load_tokenizer
from sparseft.evaluation.comparison import comparison_markdown
from sparseft.evaluation.density_plot import plot_densities
from sparseft.io.atomic import atomic_write_json, atomic_write_text
from sparseft.training.lottery import dense_phase, lottery_ticket
from sparseft.training.marks import finished, mark_finished, read_mark, section_settings
from sparseft.training.recipe import Recipe
from sparseft.training.sections import MethodSection, TrainSection
from sparseft.training.setups import Setup, base_of, language_setup, load_base, task_setup
from sparseft.training.study import StudyResult, results_of, run_units
from sparseft.training.units import LABELS, Unit, dense_path, put_dense, read_rows, score

__all__ = ["run_sweep", "sweep_units"]


def run_sweep(
    recipe: Recipe,
    *,
    only: Sequence[str] = (),
    progress: bool = False,
    on_unit: Callable[[Unit, int, int], None] | None = None,
) -> StudyResult:
    """Run what is missing of a sweep, and write its report once every unit is there.

    Args:
        recipe: with a ``sweep`` section.
        only: globs over unit names; run just these. Processes with disjoint ones share a sweep.
        progress: show progress bars.
        on_unit: called with (unit, its number, how many) before each that runs.

    Raises:
        RecipeError: nothing to sweep, a pattern of ``only`` that matches nothing, or a unit whose
            inputs have not been made and are not among those to run.
        ResumeError: a unit's folder holds a run with other settings, or another process is in it.
    """
    units = sweep_units(recipe, progress=progress)
    finished, missing = run_units(units, only=only, on_unit=on_unit)
    results = results_of(recipe, _rows(recipe))
    files: list[Path] = []
    if results is not None and not missing:
        files = _report(recipe, results)
    return StudyResult(Path(recipe.output_dir), finished, missing, results, files)


def _report(recipe: Recipe, results: Results) -> list[Path]:
    """Write table, comparison and plots."""
    folder = Path(recipe.output_dir).expanduser() / "results"
    files = results.save(folder)
    metric = recipe.evaluation.metric
    text = comparison_markdown(results, recipe.sweep.baseline, metric)
    atomic_write_text(folder / "comparison.md", f"# {results.title}\n\n{text}")
    plot_densities(results, folder / "densities.png", metric)
    return [*files, folder / "comparison.md", folder / "densities.png"]


def sweep_units(recipe: Recipe, *, progress: bool = False) -> list[Unit]:
    """Return the units of a recipe's sweep in the order they run.

    Raises:
        RecipeError: no task, or no ``sweep.methods``.
    """
    if recipe.task is None or not recipe.sweep.methods:
        raise RecipeError(
            "a sweep needs a task section and sweep.methods, e.g. sweep: {methods: {LT-SFT: {}, "
            "DeFT-X: {denoise: {rank: 64}}}, densities: [0.01, 0.05, 0.1]}."
        )
    sweep = _Sweep(recipe, progress)
    parts = [*(f"language-{code}" for code in recipe.language.texts)]
    parts += [f"seed{seed}" for seed in recipe.task.seeds]
    units = [sweep.phase1(part) for part in parts]
    for name in recipe.sweep.methods:
        units += [sweep.tickets(name, part) for part in parts]
    if recipe.evaluation.languages:
        for seed in recipe.task.seeds:
            if "full" in recipe.evaluation.settings:
                units.append(sweep.evaluate(None, seed))
            units += [sweep.evaluate(name, seed) for name in recipe.sweep.methods]
    return units


def _rows(recipe: Recipe) -> list[Result]:
    """Return the scores that are there, methods in the recipe's order."""
    sweep = _Sweep(recipe, progress=False)
    if recipe.task is None:
        return []
    names: list[str | None] = [*recipe.sweep.methods, None]
    return [
        row for name in names for seed in recipe.task.seeds
        for row in read_rows(sweep.rows_path(name, seed))
    ]  # fmt: skip


def slug(name: str) -> str:
    """Return a method's name as part of a path and of a unit's name.

    >>> slug("DeFT-X, 90 %")
    'deft-x-90'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "method"


class _Sweep:
    """Makes the units; all paths are decided here."""

    def __init__(self, recipe: Recipe, progress: bool) -> None:
        self.recipe = recipe
        self.progress = progress
        self.home = Path(recipe.output_dir).expanduser()
        taken: dict[str, str] = {"full": "full fine-tuning"}
        for name in recipe.sweep.methods:
            other = taken.setdefault(slug(name), name)
            if other != name:
                raise RecipeError(
                    f"sweep.methods {name!r} and {other!r} would share the folder "
                    f"{slug(name)!r}; rename one."
                )

    def rows_path(self, method: str | None, seed: int) -> Path:
        folder = "full" if method is None else slug(method)
        return self.home / folder / f"evaluate-seed{seed}.json"

    def _setup(self, part: str) -> Setup:
        kind, _, which = part.partition("-")
        if kind == "language":
            return language_setup(self.recipe, which, progress=self.progress)
        return task_setup(self.recipe, int(part.removeprefix("seed")), progress=self.progress)

    def _section(self, part: str) -> TrainSection:
        section = self.recipe.language if part.startswith("language") else self.recipe.task
        if section is None:
            raise RecipeError("the recipe has no task section.")
        return section

    def _has(self, folder: Path) -> bool:
        """Whether a folder of tickets has an adapter for every density."""
        files = _adapters(folder)
        wanted = map(repr, self.recipe.sweep.densities)
        return all(d in files and (folder / files[d]).is_file() for d in wanted)

    def phase1(self, part: str) -> Unit:
        folder = self.home / f"phase1-{part}"
        settings = section_settings(self.recipe, self._section(part), masks=False)

        def run() -> None:
            setup = self._setup(part)
            dense_phase(
                setup.make_trainer,
                setup.model,
                output_dir=folder,
                l1=self._section(part).l1[0],
                **setup.shared,
            )

            mark_finished(folder, settings)

        def done() -> bool:
            return finished(folder, settings) and dense_path(folder).is_file()

        return Unit(f"phase1-{part}", run, done)

    def tickets(self, name: str, part: str) -> Unit:
        method: MethodSection = self.recipe.sweep.methods[name]
        densities = self.recipe.sweep.densities
        folder = self.home / slug(name) / part
        settings = section_settings(self.recipe, self._section(part), masks=False)
        settings["sweep"] = {"methods": {name: dataclasses.asdict(method)}}

        def run() -> None:
            setup = self._setup(part)
            results = lottery_ticket(
                setup.make_trainer,
                setup.model,
                density=densities,
                output_dir=folder,
                phase1=self.home / f"phase1-{part}",
                selector=method.selector,
                scope=method.scope,
                selector_options=method.selector_options,
                denoise=method.denoising(),
                l1=self._section(part).l1,
                adapter_name=setup.name,
                base_name=self.recipe.model.base,
                metadata={"data": setup.data, "sweep": name},
                **setup.shared,
            )
            found = {
                repr(density): result.path.relative_to(folder).as_posix()
                for density, result in zip(densities, results, strict=True)
            }
            mark_finished(folder, settings, adapters=found)

        def done() -> bool:
            return finished(folder, settings) and self._has(folder)

        return Unit(f"{slug(name)}-{part}", run, done, (f"phase1-{part}",))

    def evaluate(self, name: str | None, seed: int) -> Unit:
        section = self.recipe.evaluation
        path = self.rows_path(name, seed)
        adapted = [code for code in section.languages if code in self.recipe.language.texts]
        if name is None:
            needs = [f"phase1-seed{seed}"]
        else:
            needs = [f"{slug(name)}-{part}" for part in self._parts(seed, adapted)]

        def key() -> dict[str, Any]:
            about = {k: v for k, v in vars(section).items() if k != "settings"}
            return {"evaluation": about, "inputs": self._digests(name, seed, adapted)}

        def done() -> bool:
            return path.is_file() and self._ready(name, seed, adapted) and bool(
                read_rows(path, key())
            )  # fmt: skip

        def run() -> None:
            made = self._full(seed) if name is None else self._composed(name, seed, adapted)
            rows = [vars(row) for row in made]
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(path, {"key": key(), "rows": rows})

        unit_name = f"evaluate-{'full' if name is None else slug(name)}-seed{seed}"
        return Unit(unit_name, run, done, tuple(needs))

    def _parts(self, seed: int, adapted: list[str]) -> list[str]:
        composed = "task+language" in self.recipe.evaluation.settings
        return [f"seed{seed}", *(f"language-{code}" for code in adapted if composed)]

    def _ready(self, name: str | None, seed: int, adapted: list[str]) -> bool:
        if name is None:
            return bool(read_mark(self.home / f"phase1-seed{seed}"))
        home = self.home / slug(name)
        return all(self._has(home / part) for part in self._parts(seed, adapted))

    def _digests(self, name: str | None, seed: int, adapted: list[str]) -> dict[str, str]:
        """Return digests of the files that scores are made from."""
        if name is None:
            return {"dense": _digest(dense_path(self.home / f"phase1-seed{seed}"))}
        home = self.home / slug(name)
        return {
            f"{part}/{density}": _digest(home / part / file)
            for part in self._parts(seed, adapted)
            for density, file in _adapters(home / part).items()
        }

    def _model(self) -> tuple[Any, Any]:
        from sparseft.evaluation import get_task

        if self.recipe.task is None:
            raise RecipeError("the recipe has no task section.")
        labels = get_task(self.recipe.task.name).labels
        model, _ = load_base(self.recipe, "sequence-classification", num_labels=len(labels))
        return model, load_tokenizer(base_of(self.recipe))

    def _full(self, seed: int) -> Iterator[Result]:
        model, tokenizer = self._model()
        put_dense(model, dense_path(self.home / f"phase1-seed{seed}"))
        for code in self.recipe.evaluation.languages:
            yield from score(
                self.recipe, model, tokenizer, code, setting=LABELS["full"], seed=seed, density=None
            )

    def _composed(self, name: str, seed: int, adapted: list[str]) -> Iterator[Result]:
        from sparseft.composition import Composer

        section = self.recipe.evaluation
        model, tokenizer = self._model()
        composer = Composer(model)
        home = self.home / slug(name)
        for density in self.recipe.sweep.densities:
            for part in self._parts(seed, adapted):
                file = home / part / _adapters(home / part)[repr(density)]
                composer.add(f"{part} {density}", Adapter.load(file))
            task = {f"seed{seed} {density}": section.task_coeff}
            for code in section.languages:
                if "task" in section.settings:
                    composer.switch(task)
                    yield from score(
                        self.recipe, model, tokenizer, code,
                        setting=name, seed=seed, density=density,
                    )  # fmt: skip
                if "task+language" in section.settings and code in adapted:
                    composer.switch({**task, f"language-{code} {density}": section.language_coeff})
                    yield from score(
                        self.recipe, model, tokenizer, code,
                        setting=f"{name} + language", seed=seed, density=density,
                    )  # fmt: skip


def _adapters(folder: Path) -> dict[str, str]:
    """Return density -> adapter file of a finished unit of tickets."""
    return read_mark(folder).get("adapters", {})


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
