"""The file that says a unit of a study is finished, and with which settings.

``unit.json`` is written last. A recipe whose settings for a finished unit have changed is refused:
skipping the unit would report another recipe's result, and training again would lose it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseft.errors import ResumeError
from sparseft.io.atomic import atomic_write_json
from sparseft.training.recipe import Recipe
from sparseft.training.sections import TrainSection
from sparseft.training.state import differences

__all__ = ["finished", "mark_finished", "read_mark", "section_settings"]

_FILE = "unit.json"

# Keys of a section that decide no number of one unit, or not of this one.
_ASIDE = ("seeds", "texts", "save_every", "log_every")
# Keys that a sweep's methods and densities stand in for.
_CHOICE = ("density", "nnz", "selector", "scope", "selector_options", "denoise", "iterations")


def section_settings(
    recipe: Recipe, section: TrainSection, *, masks: bool = True, texts: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what a unit's result depends on, of a recipe: its section, the base and its dtype.

    Args:
        recipe, section: the recipe and the section of the unit.
        masks: with how the mask is chosen.
        texts: files of the unit, of a section that lists those of several.
    """
    aside = _ASIDE if masks else (*_ASIDE, *_CHOICE)
    own = {k: v for k, v in dataclasses.asdict(section).items() if k not in aside}
    if texts:
        own["texts"] = list(texts)
    return {"model": {"base": recipe.model.base, "dtype": recipe.model.dtype}, section.where: own}


def read_mark(folder: Path) -> dict[str, Any]:
    """Return what a finished unit's file holds, nothing if there is none.

    Raises:
        ResumeError: it is not such a file.
    """
    path = folder / _FILE
    if not path.is_file():
        return {}
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
        mark["settings"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as bad:
        raise ResumeError(
            f"{path} is no file of a finished unit ({bad}); delete {folder} to train it anew."
        ) from None
    return mark


def finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a unit is finished.

    Raises:
        ResumeError: it was, with other settings; each differing key is named.
    """
    mark = read_mark(folder)
    if not mark:
        return False
    now = _by_key(json.loads(json.dumps(settings)))
    # A key that came with a later version says nothing about a unit of before.
    before = {k: v for k, v in _by_key(mark["settings"]).items() if k in now}
    other = [k for k in before if before[k] != now[k]]
    if other:
        changed = differences({k: before[k] for k in other}, {k: now[k] for k in other})
        raise ResumeError(
            f"{folder} holds a finished unit with other settings:\n  "
            + "\n  ".join(changed)
            + "\nRestore them, use another output_dir, or delete that folder to train it anew."
        )
    return True


def _by_key(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by section and key; a value that is a section itself stays whole."""
    return {
        f"{section}.{key}": value
        for section, keys in settings.items()
        for key, value in keys.items()
    }


def mark_finished(folder: Path, settings: Mapping[str, Any], **facts: Any) -> None:
    """Write a unit's file; call after everything else is on disk."""
    atomic_write_json(folder / _FILE, {"settings": settings, **facts})
