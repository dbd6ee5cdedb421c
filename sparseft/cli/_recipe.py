"""What the commands that run a recipe share: arguments, overrides, log, the table at the end."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparseft.errors import RecipeError, ResumeError

if TYPE_CHECKING:
    from sparseft.training.recipe import Recipe
    from sparseft.training.study import StudyResult
    from sparseft.training.units import Unit

__all__ = [
    "add_recipe_parser",
    "check_inputs",
    "expand_overrides",
    "read_recipe",
    "run_recipe",
    "starting_over_by_hand",
]

# Short names of an override -> the keys it sets.
_SHORT = {
    "model": ("model.base",),
    "device": ("model.device",),
    "density": ("task.density", "language.density"),
    "nnz": ("task.nnz", "language.nnz"),
    "seeds": ("task.seeds",),
}


_MASK_SIZES = ("density", "nnz", "task.density", "task.nnz", "language.density", "language.nnz")


def add_recipe_parser(subparsers: Any, name: str, help: str, description: str, epilog: str) -> None:
    """Add a command that runs a recipe, with RECIPE, KEY=VALUE, --only and --list."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
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
        help="run (or list) only these units (globs; may be repeated); --list names them",
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


def read_recipe(source: str, overrides: list[str], *, sweep: bool = False) -> Recipe:
    """Return the recipe of a command line; ``sweep``: density and nnz are those of the sweep."""
    from sparseft.training.recipe import load_recipe, read_recipe_file

    data = read_recipe_file(source)
    if sweep:
        for override in overrides:
            if override.partition("=")[0] in _MASK_SIZES:
                raise RecipeError(
                    f"{override!r}: the sizes of a sweep's masks are sweep.densities, e.g. "
                    "'sweep.densities=[0.01, 0.1]'."
                )
    return load_recipe(data, expand_overrides(overrides, data))


def check_inputs(recipe: Recipe, units: Sequence[Unit]) -> None:
    """Refuse a study that has something left to do and no data folder to do it from."""
    if not all(unit.done() for unit in units):
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
        changed = START_OVER in str(error) or "a finished unit with" in str(error)
        if not changed:  # another process is in the folder, say
            raise
        by_hand = "delete that folder to start over"
        raise RecipeError(str(error).replace(START_OVER, by_hand)) from error


def run_recipe(
    args: argparse.Namespace, recipe: Recipe, units: Sequence[Unit], run: Callable[..., StudyResult]
) -> int:
    """Run what is missing of a recipe's units by ``run``, or list them."""
    from sparseft.cli._output import quiet_transformers
    from sparseft.training.study import choose_units

    with starting_over_by_hand():
        check_inputs(recipe, units)
    if args.list_units:
        for unit in choose_units(units, args.only):
            print(f"{'done   ' if unit.done() else 'to do  '} {unit.name}")
        return 0
    quiet_transformers()
    in_terminal = sys.stderr.isatty()

    def announce(unit: Unit, number: int, of: int) -> None:
        print(f"[{number}/{of}] {unit.name}", file=sys.stderr, flush=True)

    with _log_to_stderr(), starting_over_by_hand():
        result = run(recipe, only=args.only, progress=in_terminal, on_unit=announce)
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
        print(f"adapters in {result.output_dir.expanduser()}")
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
