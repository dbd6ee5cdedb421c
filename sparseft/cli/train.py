"""``sparseft train``: a study from a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from sparseft.cli._recipe import add_recipe_parser, read_recipe, run_recipe

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


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    add_recipe_parser(subparsers, "train", HELP, _DESCRIPTION, _EPILOG)


def run(args: argparse.Namespace) -> int:
    """Run what is missing of the study."""
    from sparseft.training.study import run_study, study_units

    recipe = read_recipe(args.recipe, args.overrides)
    return run_recipe(args, recipe, study_units(recipe), run_study)
