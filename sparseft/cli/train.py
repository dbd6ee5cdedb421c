"""``sparseft train``: a study from a recipe."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparseft.errors import RecipeError, ResumeError

if TYPE_CHECKING:
    from sparseft.training.recipe import Recipe
    from sparseft.training.study import StudyResult
    from sparseft.training.units import Unit

__all__ = ["HELP", "add_parser", "run"]

HELP = "task and language adapters from a recipe, and their evaluation"

_DESCRIPTION = """\
Runs a study: language adapters from raw text (masked language modelling), task adapters from
labelled text, one for each seed, all by the lottery-ticket algorithm (fine-tune densely, keep the
entries that moved most, rewind, train those); then scores the task adapter alone, task + language,
and full fine-tuning in every language of the recipe."""

_EPILOG = """\
examples:
  sparseft train nusax_senti                     a recipe that ships with sparseft
  sparseft train recipe.yaml task.lr=1e-4        your own, with a value changed
  sparseft train recipe.yaml density=0.05        short for task.density and language.density
  sparseft train recipe.yaml --list              its units, and which are finished
  sparseft train recipe.yaml --only 'task-*'     some of them: run others in another process

what comes out, in the recipe's output_dir:
  language-CODE/adapter/, task-seedN/adapter/    the adapters; see `sparseft inspect`
  results/results.{json,md,png}                  once every unit is there
Interrupted, or killed? The same command goes on where it stopped and gives the same bits. Resume
files (checkpoints) are your own: do not continue from a folder you do not trust."""

# Short names of an override -> the keys it sets.
_SHORT = {
    "model": ("model.base",),
    "device": ("model.device",),
    "density": ("task.density", "language.density"),
    "nnz": ("task.nnz", "language.nnz"),
    "seeds": ("task.seeds",),
}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "train",
        help=HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or a recipe that ships")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without it argparse calls them required
        metavar="KEY=VALUE",
        help="values to change, e.g. task.lr=1e-4",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="UNIT",
        help="run only these units (globs; may be repeated), e.g. task-seed0 or 'language-*'",
    )
    parser.add_argument(
        "--list", action="store_true", dest="list_units", help="list the units and stop"
    )


def expand_overrides(overrides: list[str], recipe: dict[str, Any]) -> list[str]:
    """Return overrides with short names written out, for the sections the recipe has."""
    out = []
    for override in overrides:
        key, equals, value = override.partition("=")
        for full in _SHORT.get(key, (key,)):
            section = full.partition(".")[0]
            if key in _SHORT and section in ("task", "language") and section not in recipe:
                continue
            if full.endswith(".density"):  # the two exclude each other
                out.append(f"{full.removesuffix('density')}nnz=null")
            elif full.endswith(".nnz"):
                out.append(f"{full.removesuffix('nnz')}density=null")
            out.append(f"{full}{equals}{value}")
    return out


def read_recipe(source: str, overrides: list[str]) -> Recipe:
    """Return the recipe of a command line."""
    from sparseft.training.recipe import load_recipe, read_recipe_file

    data = read_recipe_file(source)
    return load_recipe(data, expand_overrides(overrides, data))


def check_inputs(recipe: Recipe) -> None:
    """Refuse a study that has something left to do and no data folder to do it from."""
    from sparseft.training.study import study_units

    if not all(unit.done() for unit in study_units(recipe)):
        recipe.check_data_dir()


@contextmanager
def starting_over_by_hand() -> Iterator[None]:
    """Turn a refusal to go on with other settings into bad input, said for the command line.

    The library's message names an argument of Python that no command has.
    """
    from sparseft.training.state import START_OVER

    try:
        yield
    except ResumeError as error:
        if START_OVER not in str(error):  # another process is in the folder, say
            raise
        by_hand = "delete that folder to start over"
        raise RecipeError(str(error).replace(START_OVER, by_hand)) from error


def run(args: argparse.Namespace) -> int:
    """Run what is missing of the study."""
    from sparseft.cli._output import quiet_transformers
    from sparseft.training.study import run_study, study_units

    recipe = read_recipe(args.recipe, args.overrides)
    check_inputs(recipe)
    if args.list_units:
        for unit in study_units(recipe):
            print(f"{'done   ' if unit.done() else 'to do  '} {unit.name}")
        return 0
    quiet_transformers()
    in_terminal = sys.stderr.isatty()

    def announce(unit: Unit, number: int, of: int) -> None:
        print(f"[{number}/{of}] {unit.name}", file=sys.stderr, flush=True)

    with _log_to_stderr(), starting_over_by_hand():
        result = run_study(recipe, only=args.only, progress=in_terminal, on_unit=announce)
    _report(recipe, result)
    return 0


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show the training log (losses, resumed checkpoints, scores) while the command runs.

    Taken off again: a caller's process, a notebook's say, outlives the command and its stderr.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("sparseft")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _report(recipe: Recipe, result: StudyResult) -> None:
    from sparseft.cli._output import print_table

    for name in result.missing:
        print(f"still to do: {name}")
    if result.results is None:
        print(f"adapters in {result.output_dir}")
        return
    metric = recipe.evaluation.metric
    summary = result.results.summary(metric)
    languages = result.results.languages()
    rows = []
    for setting in summary:
        cells = [setting.label]
        for language in languages:
            cell = setting.languages.get(language)
            cells.append("" if cell is None else _cell(cell.mean, cell.sd))
        cells.append("" if setting.mean is None else _cell(setting.mean.mean, setting.mean.sd))
        rows.append(cells)
    title = f"{metric} x 100, {recipe.evaluation.split} (source language first; mean without it)"
    print_table(["setting", *languages, "mean"], rows, title=title)
    for path in result.files:
        print(path)


def _cell(mean: float, sd: float | None) -> str:
    return f"{100 * mean:.1f}" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f}"
