"""What lies beside a merged checkpoint to say how it was made: the recipe, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseft.adapter import library_versions
from sparseft.composition.fit import Loaded
from sparseft.composition.registry import REGISTRY, filled_options
from sparseft.errors import CompositionError
from sparseft.io import atomic_write_json, atomic_write_text

__all__ = ["CARD_FILE", "RECIPE_FILE", "make_recipe", "write_recipe"]

RECIPE_FILE = "sparseft_composition.json"
CARD_FILE = "README.md"


def make_recipe(
    base: str | None,
    loaded: Sequence[Loaded],
    coeffs: Mapping[str, float],
    method: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a checkpoint is made of, as plain data; it holds no time and no path.

    Args:
        base: name of the base.
        loaded: the adapters.
        coeffs: by the adapters' names.
        method, options: composition method.

    Raises:
        CompositionError: an option that has no JSON form.
    """
    try:
        plain = json.loads(json.dumps(filled_options(method, options), allow_nan=False))
    except (TypeError, ValueError) as bad:
        raise CompositionError(
            f"the options of {method!r} have no JSON form, so no recipe can hold them: {bad}"
        ) from None
    return {
        "base": base,
        "method": method,
        "options": plain,
        "adapters": [
            {"name": x.name, "digest": x.digest, "coeff": coeffs[x.name]}
            for x in sorted(loaded, key=lambda x: x.name)
        ],
        "versions": library_versions(),
    }


def write_recipe(
    folder: Path,
    recipe: Mapping[str, Any],
    architecture: str,
    skipped: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write the recipe and the card into a checkpoint's folder.

    Args:
        folder: of the checkpoint.
        recipe: from `make_recipe`.
        architecture: class to load it with.
        skipped: adapter -> its tensors that have no place in the model.
    """
    left_out = {name: list(names) for name, names in (skipped or {}).items()}
    atomic_write_json(folder / RECIPE_FILE, {**recipe, "skipped": left_out})
    atomic_write_text(folder / CARD_FILE, make_card(recipe, architecture, left_out))


def make_card(
    recipe: Mapping[str, Any], architecture: str, skipped: Mapping[str, Sequence[str]]
) -> str:
    """Return the model card: what the hub shows, and what a reader of the folder wants to know."""
    base, method = recipe["base"], recipe["method"]
    names = [a["name"] for a in recipe["adapters"]]
    head = ["---", "library_name: transformers", "tags:", "- sparseft", "- merge"]
    if base and base.count("/") == 1:  # a name on the hub; of a folder only the last part is kept
        head += ["base_model:", f"- {json.dumps(base, ensure_ascii=False)}"]
    lines = [
        *head,
        "---",
        "",
        f"# {_cell(base or 'base')} + {' + '.join(map(_cell, names)) or 'nothing'}",
        "",
        f"Sparse adapters put on {_code(base or 'a model in memory')} by sparseft, method "
        f"{_code(method)} ([paper]({REGISTRY.get(method).reference})): combined in fp32, in an "
        "order that does not depend on how they were given, rounded once to the base's dtype.",
        "",
        "| adapter | coefficient | content digest |",
        "|---|---:|---|",
        *(
            f"| {_cell(a['name'])} | {a['coeff']:g} | {_code(a['digest'])} |"
            for a in recipe["adapters"]
        ),
        "",
    ]
    if recipe["options"]:
        lines += ["| option | value |", "|---|---|"]
        lines += [
            f"| {_cell(k)} | {_code(json.dumps(v, ensure_ascii=False))} |"
            for k, v in sorted(recipe["options"].items())
        ]
        lines.append("")
    for name, tensors in sorted(skipped.items()):
        lines += [
            f"Left out of {_code(name)}, for want of a place in the model: "
            f"{', '.join(map(_code, tensors))}.",
            "",
        ]
    lines += [
        "```python",
        f"from transformers import {architecture}",
        "",
        f'model = {architecture}.from_pretrained("path/to/this/folder")',
        "```",
        "",
        f"The same in a form for programs: `{RECIPE_FILE}`. Made with "
        f"{', '.join(f'{k} {v}' for k, v in sorted(recipe['versions'].items()))}.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: object) -> str:
    """Escape what Markdown would take for structure in a table."""
    flat = " ".join(str(text).split())
    for sign in "\\|`*_[]<>#":
        flat = flat.replace(sign, f"\\{sign}")
    return flat


def _code(text: object) -> str:
    flat = " ".join(str(text).split()).replace("|", "\\|").replace("`", "'")
    return f"`{flat}`"
