"""Choose the recipe on development languages: ``python -m sparseft.demo.tune --out DIR``.

The same code as `sparseft demo` runs, on languages and names that the demo never shows, with any
value of the recipe overridden: ``language.lr=1e-3 compose.language_coeff=0.8``. What counts is the
paired gain of ``task + language`` over ``task``, with its standard error over languages; for
``denoise.rule=rank denoise.level=32``, that of denoised over plain. Trials of ``denoise`` in one
DIR share its dense phases and plain diffs; each overwrites the results of the one before.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseft._text import did_you_mean
from sparseft.demo.names import DEV
from sparseft.demo.recipe import DemoRecipe, RunRecipe
from sparseft.demo.study import run_demo
from sparseft.errors import RecipeError


def override(recipe: DemoRecipe, settings: Sequence[str]) -> DemoRecipe:
    """Return the recipe with values replaced, each given as ``part.key=value``.

    Raises:
        RecipeError: a setting of another form, an unknown part or key.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        part, _, key = path.partition(".")
        parts = [name for name in ("task", "language", "denoise", "compose")]
        if not equals or part not in parts:
            raise RecipeError(
                f"{setting!r} is not part.key=value with a part of {', '.join(parts)}."
                f"{did_you_mean(part, parts)}"
            )
        old: Any = getattr(recipe, part)
        keys = [f.name for f in dataclasses.fields(old)]
        if key not in keys:
            raise RecipeError(f"{part} has no {key!r}.{did_you_mean(key, keys)}")
        kind = type(getattr(old, key))
        new = dataclasses.replace(old, **{key: text if kind is str else kind(float(text))})
        recipe = dataclasses.replace(recipe, **{part: new})
    return recipe


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m sparseft.demo.tune", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="part.key=value")
    parser.add_argument("--languages", nargs="+", default=list(DEV), choices=DEV)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    recipe = override(DemoRecipe.load(), args.settings)
    _ = recipe.denoise.how  # refused before anything is trained
    cover = RunRecipe(languages=tuple(args.languages), seeds=args.seeds)
    recipe = dataclasses.replace(recipe, quick=cover)
    run_demo(output_dir=args.out, recipe=recipe, split=args.split)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
