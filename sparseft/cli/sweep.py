"""``sparseft sweep``: ways to choose masks against each other, at several densities."""

from __future__ import annotations

import argparse
from typing import Any

from sparseft.cli._recipe import add_recipe_parser, read_recipe, run_recipe

__all__ = ["HELP", "add_parser", "run"]

HELP = "ways to choose masks (LT-SFT, DeFT-X, LIFT, ...) by density, on one dense phase a seed"

_DESCRIPTION = """\
Compares ways to choose a mask. The dense phase runs once for every seed (and language with text);
each method of the recipe's sweep section scores it once and trains a mask of every density from the
same start on the same batches. Ends in a table, paired tests against the baseline, and plots."""

_EPILOG = """\
examples:
  sparseft sweep nusax_deftx data_dir=DATA       the study that ships with sparseft
  sparseft sweep recipe.yaml 'sweep.densities=[0.01,0.05]'
  sparseft sweep recipe.yaml --list              its units, and which are finished
  sparseft sweep recipe.yaml --only '*-seed0'    some of them: run others in another process

what the recipe needs beside a task:
  sweep:
    densities: [0.01, 0.05, 0.1]
    methods:
      LT-SFT: {}
      DeFT-X: {denoise: {rank: 64}}
      LIFT: {selector: low_rank, selector_options: {rank: 64}}

what comes out, in the recipe's output_dir:
  METHOD/seedN/iteration-0/adapter-nnz-K/        the adapters
  results/comparison.md, results/densities.png   once every unit is there; results.* by language
Interrupted, or killed? The same command goes on where it stopped and gives the same bits. Resume
files (checkpoints) are your own: do not continue from a folder you do not trust."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    add_recipe_parser(subparsers, "sweep", HELP, _DESCRIPTION, _EPILOG)


def run(args: argparse.Namespace) -> int:
    """Run what is missing of the sweep."""
    from sparseft.training.sweep import run_sweep, sweep_units

    recipe = read_recipe(args.recipe, args.overrides, sweep=True)
    return run_recipe(args, recipe, sweep_units(recipe), run_sweep)
