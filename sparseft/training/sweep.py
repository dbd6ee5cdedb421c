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
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparseft.adapter import Adapter
from sparseft.errors import RecipeError
from sparseft.evaluation import Result, Results, get_task, load_tokenizer
from sparseft.evaluation.comparison import comparison_markdown
from sparseft.evaluation.density_plot import plot_densities
from sparseft.io.atomic import atomic_write_json, atomic_write_text
from sparseft.selection import selectors
from sparseft.training.lottery import dense_phase, lottery_ticket
from sparseft.training.marks import finished, mark_finished, read_mark, section_settings
from sparseft.training.recipe import Recipe
from sparseft.training.sections import MethodSection, TaskSection, TrainSection
from sparseft.training.setups import Setup, base_of, language_setup, load_base, task_setup
from sparseft.training.study import StudyResult, results_of, run_units
from sparseft.training.units import (
    LABELS,
    Unit,
    dense_path,
    file_digest,
    put_dense,
    read_rows,
    score,
)

__all__ = ["run_sweep", "sweep_units"]

# Setting, density and language of a score.
Place = tuple[str, float | None, str]


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
    done, missing = run_units(units, only=only, on_unit=on_unit)
    results = results_of(recipe, _rows(recipe))
    files: list[Path] = []
    if results is not None and not missing:
        files = _report(recipe, results)
    return StudyResult(Path(recipe.output_dir), done, missing, results, files)


def _report(recipe: Recipe, results: Results) -> list[Path]:
    """Write table, comparison and plots."""
    folder = Path(recipe.output_dir).expanduser() / "results"
    # Too many settings for the plot by language; the one by density has a line a method.
    files = results.save(folder, plot=False)
    if all(row.density is None for row in results.rows):  # only phase 1 was asked for
        return files
    metric = recipe.evaluation.metric
    text = comparison_markdown(results, recipe.sweep.baseline, metric)
    atomic_write_text(folder / "comparison.md", f"# {results.title}\n\n{text}")
    plot_densities(results, folder / "densities.png", metric)
    return [*files, folder / "comparison.md", folder / "densities.png"]


def sweep_units(recipe: Recipe, *, progress: bool = False) -> list[Unit]:
    """Return the units of a recipe's sweep in the order they run.

    Raises:
        RecipeError: no task, no ``sweep.methods``, or keys that a sweep cannot follow.
    """
    sweep = _Sweep(recipe, progress)
    parts = [*(f"language-{code}" for code in recipe.language.texts)]
    parts += [f"seed{seed}" for seed in sweep.task.seeds]
    units = [sweep.phase1(part) for part in parts]
    for name in recipe.sweep.methods:
        units += [sweep.tickets(name, part) for part in parts]
    for seed in sweep.task.seeds:
        units += [
            sweep.evaluate(name, seed)
            for name in (None, *recipe.sweep.methods)
            if sweep.wanted(name)
        ]
    return units


def _rows(recipe: Recipe) -> list[Result]:
    """Return the scores that are there and that the recipe asks for, methods in its order."""
    sweep = _Sweep(recipe, progress=False)
    return [
        row
        for name in (*recipe.sweep.methods, None)
        for seed in sweep.task.seeds
        for row in read_rows(sweep.rows_path(name, seed))
        if _place(row) in sweep.wanted(name)
    ]


def _check(recipe: Recipe) -> TaskSection:
    """Return the task section of a recipe that can be swept."""
    if recipe.task is None or not recipe.sweep.methods:
        raise RecipeError(
            "a sweep needs a task section and sweep.methods, e.g. sweep: {methods: {LT-SFT: {}, "
            "DeFT-X: {denoise: {rank: 64}}}, densities: [0.01, 0.05, 0.1]}."
        )
    if recipe.task.source_language_adapter:
        raise RecipeError(
            "task.source_language_adapter is true, but a sweep trains the task on the base, as "
            "each method would need a source adapter of its own; set it to false, or use `sparseft "
            "train`."
        )
    for section in (recipe.task, recipe.language):
        for key, plain in (
            ("selector", "magnitude"), ("scope", "global"), ("selector_options", {}),
            ("denoise", None), ("iterations", 1),
        ):  # fmt: skip
            if getattr(section, key) != plain:
                raise RecipeError(
                    f"{section.where}.{key} is {getattr(section, key)!r}, but masks of a sweep are "
                    "chosen by sweep.methods; move it there, or leave it out."
                )
    for name, method in recipe.sweep.methods.items():
        if selectors()[method.selector].traits["kind"] == "patterns":
            raise RecipeError(
                f"sweep.methods.{name}.selector is {method.selector!r}, which keeps a number of "
                "entries of its own; a sweep needs methods that keep any density."
            )
    return recipe.task


def slug(name: str) -> str:
    """Return a method's name as part of a path and of a unit's name.

    >>> slug("DeFT-X, 90 %")
    'deft-x-90'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "method"


# What stands beside the methods' folders and units.
_TAKEN = ("full", "results", "phase1", "evaluate")


class _Sweep:
    """Makes the units; all paths are decided here."""

    def __init__(self, recipe: Recipe, progress: bool) -> None:
        self.recipe = recipe
        self.task = _check(recipe)
        self.progress = progress
        self.home = Path(recipe.output_dir).expanduser()
        taken: dict[str, str] = {}
        for name in recipe.sweep.methods:
            own = slug(name)
            if own.partition("-")[0] in _TAKEN or name in LABELS.values():
                raise RecipeError(
                    f"sweep.methods has the name {name!r}, which a sweep uses itself; rename it."
                )
            other = taken.setdefault(own, name)
            if other != name:
                raise RecipeError(
                    f"sweep.methods {name!r} and {other!r} would share the folder {own!r}; rename "
                    "one."
                )

    def wanted(self, method: str | None) -> set[Place]:
        """Return (setting, density, language) of every score of a method, None: of phase 1."""
        section = self.recipe.evaluation
        if method is None:
            full = section.languages if "full" in section.settings else []
            return {(LABELS["full"], None, code) for code in full}
        out: set[Place] = set()
        for density in self.recipe.sweep.densities:
            for code in section.languages:
                if "task" in section.settings:
                    out.add((method, density, code))
                if "task+language" in section.settings and code in self.recipe.language.texts:
                    out.add((f"{method} + language", density, code))
        return out

    def rows_path(self, method: str | None, seed: int) -> Path:
        folder = "full" if method is None else slug(method)
        return self.home / folder / f"evaluate-seed{seed}.json"

    def _setup(self, part: str) -> Setup:
        kind, _, which = part.partition("-")
        if kind == "language":
            return language_setup(self.recipe, which, progress=self.progress)
        return task_setup(self.recipe, int(part.removeprefix("seed")), progress=self.progress)

    def _section(self, part: str) -> TrainSection:
        return self.recipe.language if part.startswith("language") else self.task

    def _settings(self, part: str) -> dict[str, Any]:
        kind, _, which = part.partition("-")
        texts = self.recipe.language.texts[which] if kind == "language" else ()
        return section_settings(self.recipe, self._section(part), masks=False, texts=texts)

    def _has(self, folder: Path) -> bool:
        """Whether a folder of tickets has an adapter for every density."""
        files = _adapters(folder)
        wanted = map(repr, self.recipe.sweep.densities)
        return all(d in files and (folder / files[d]).is_file() for d in wanted)

    def phase1(self, part: str) -> Unit:
        folder = self.home / f"phase1-{part}"
        settings = self._settings(part)

        def run() -> None:
            setup = self._setup(part)
            dense_phase(
                setup.make_trainer,
                setup.model,
                output_dir=folder,
                l1=self._section(part).l1[0],
                metadata={"data": setup.data},
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
        settings = self._settings(part)
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
                selector_options=self.recipe.options_of(method),
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
        wanted = self.wanted(name)
        adapted = [code for code in section.languages if code in self.recipe.language.texts]
        if name is None:
            needs = [f"phase1-seed{seed}"]
        else:
            needs = [f"{slug(name)}-{part}" for part in self._parts(seed, adapted)]

        def key() -> dict[str, Any]:
            aside = ("settings", "languages", "metric")  # they choose among the scores
            about = {k: v for k, v in vars(section).items() if k not in aside}
            return {"evaluation": about, "inputs": self._digests(name, seed, adapted)}

        def there() -> list[Result]:
            return [r for r in read_rows(path, key()) if _place(r) in wanted]

        def done() -> bool:
            return self._ready(name, seed, adapted) and {_place(r) for r in there()} == wanted

        def run() -> None:
            rows = there()
            missing = wanted - {_place(row) for row in rows}
            rows += self._full(seed, missing) if name is None else self._composed(
                name, seed, missing
            )  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(path, {"key": key(), "rows": [vars(row) for row in rows]})

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
            return {"dense": file_digest(dense_path(self.home / f"phase1-seed{seed}"))}
        home = self.home / slug(name)
        densities = list(map(repr, self.recipe.sweep.densities))
        return {
            f"{part}/{density}": file_digest(home / part / file)
            for part in self._parts(seed, adapted)
            for density, file in _adapters(home / part).items()
            if density in densities
        }

    def _model(self) -> tuple[Any, Any]:
        labels = get_task(self.task.name).labels
        model, _ = load_base(self.recipe, "sequence-classification", num_labels=len(labels))
        return model, load_tokenizer(base_of(self.recipe))

    def _full(self, seed: int, missing: Collection[Place]) -> Iterator[Result]:
        model, tokenizer = self._model()
        put_dense(model, dense_path(self.home / f"phase1-seed{seed}"))
        for setting, density, code in self._in_order(missing):
            yield from score(
                self.recipe, model, tokenizer, code, setting=setting, seed=seed, density=density
            )

    def _composed(self, name: str, seed: int, missing: Collection[Place]) -> Iterator[Result]:
        from sparseft.composition import Composer

        section = self.recipe.evaluation
        model, tokenizer = self._model()
        composer = Composer(model)
        home = self.home / slug(name)
        for setting, density, code in self._in_order(missing):
            parts = {f"seed{seed}": section.task_coeff}
            if setting != name:
                parts[f"language-{code}"] = section.language_coeff
            for part in parts:
                if f"{part} {density}" not in composer.names():
                    file = home / part / _adapters(home / part)[repr(density)]
                    composer.add(f"{part} {density}", Adapter.load(file))
            composer.switch({f"{part} {density}": coeff for part, coeff in parts.items()})
            yield from score(
                self.recipe, model, tokenizer, code, setting=setting, seed=seed, density=density
            )

    def _in_order(self, places: Collection[Place]) -> list[Place]:
        codes = self.recipe.evaluation.languages
        return sorted(places, key=lambda p: (p[1] or 0.0, codes.index(p[2]), p[0]))


def _place(row: Result) -> Place:
    return (row.setting, row.density, row.language)


def _adapters(folder: Path) -> dict[str, str]:
    """Return density -> adapter file of a finished unit of tickets."""
    return read_mark(folder).get("adapters", {})
