"""Recipes: a whole study as data. YAML files, ``key=value`` overrides, and a check of every value.

Here: reading and building. Not here: names and ranges of keys (`sparseft.training.sections`), doing
anything with them (`sparseft.training.study`).
"""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sparseft._text import did_you_mean
from sparseft.errors import RecipeError
from sparseft.training.sections import (
    EvaluationSection,
    LanguageSection,
    MethodSection,
    ModelSection,
    Section,
    SweepSection,
    TaskSection,
    TrainSection,
)

__all__ = ["Recipe", "load_recipe", "packaged_recipes", "read_recipe_file"]


@dataclass(kw_only=True)
class Recipe(Section):
    """A study: base, task, languages, evaluation.

    Args:
        name: short name; the default output folder is ``runs/<name>``.
        description: what the study shows.
        data_dir: folder that relative paths of data, and of the base if it lies there, start from.
        output_dir: where runs, adapters and results go.
        model, task, language, evaluation: the sections; without a task only language adapters are
            trained.
        sweep: methods and densities for `sparseft sweep`.
    """

    name: str
    description: str = ""
    data_dir: str = "."
    output_dir: str = ""
    model: ModelSection
    task: TaskSection | None = None
    language: LanguageSection = field(default_factory=LanguageSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    sweep: SweepSection = field(default_factory=SweepSection)

    def __post_init__(self) -> None:
        if not self.output_dir:
            self.output_dir = f"runs/{self.name}"
        if self.task is None and not self.language.texts:
            raise RecipeError(
                "the recipe trains nothing: it has neither a task nor language.texts."
            )
        if self.task is not None and self.evaluation.languages:
            self._need_evaluation()
        source = self.task.source if self.task is not None else None
        if self.task is not None and self.task.source_language_adapter:
            if source not in self.language.texts:
                raise RecipeError(
                    f"task.source_language_adapter needs language.texts.{source}; languages with "
                    f"text: "
                    f"{', '.join(self.language.texts) or 'none'}."
                )

    def _need_evaluation(self) -> None:
        if self.evaluation.data is None:
            raise RecipeError(
                "evaluation.languages are given but evaluation.data is not; set it to the folder "
                "with the task's files."
            )

    def path(self, text: str) -> Path:
        """Return a path of the recipe, relative ones from ``data_dir``."""
        given = Path(text).expanduser()
        return given if given.is_absolute() else Path(self.data_dir).expanduser() / given

    def options_of(self, section: TrainSection | MethodSection) -> dict[str, Any]:
        """Return the selector's options of a section, a file's path as the recipe means it."""
        options = dict(section.selector_options)
        if isinstance(options.get("path"), str):
            options["path"] = str(self.path(options["path"]))
        return options

    def check_data_dir(self) -> None:
        """Check that ``data_dir`` is there, before what is not found below it is taken for a name.

        Raises:
            RecipeError: it is no folder.
        """
        folder = Path(self.data_dir).expanduser()
        if folder.is_dir():
            return
        what = "is not a folder" if folder.exists() else "does not exist"
        from_here = "" if folder.is_absolute() else f", seen from {Path.cwd()}"
        raise RecipeError(
            f"data_dir {self.data_dir!r} {what}{from_here} (recipe key data_dir). Set it to the "
            "folder that the recipe's relative paths start from: data_dir=FOLDER."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as nested plain containers."""
        return dataclasses.asdict(self)


# -- from YAML ---


def packaged_recipes() -> dict[str, Path]:
    """Return the recipes that ship with sparseft, by name."""
    folder = Path(str(resources.files("sparseft.training") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a YAML file, the name of one that ships with sparseft, or a mapping.

    Args:
        source: path, name or mapping.
        overrides: ``key=value`` with dotted keys, applied in order; values are YAML.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, a value of another type or outside
            its range; the message names the key, what is allowed and the nearest match.

    Example:
        >>> recipe = load_recipe({"name": "a", "model": {"base": "x"},
        ...     "language": {"texts": {"ban": "ban.txt"}}}, ["language.lr=1e-4"])
        >>> recipe.language.lr, recipe.language.texts
        ((0.0001, 0.0001), {'ban': ['ban.txt']})
    """
    data = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else read_recipe_file(source)
    for override in overrides:
        _override(data, override)
    return typing.cast(Recipe, _build(Recipe, data, ""))


def read_recipe_file(source: str | Path) -> dict[str, Any]:
    """Return the keys of a recipe file, or of one that ships with sparseft, unchecked."""
    import yaml

    path = Path(source)
    shipped = packaged_recipes()
    if not path.exists():
        if str(source) not in shipped:
            raise RecipeError(
                f"no recipe {str(source)!r}: no such file, and not one that ships with sparseft "
                f"({', '.join(shipped)}).{did_you_mean(str(source), shipped)}"
            )
        path = shipped[str(source)]
    try:
        data = _read_yaml(path.read_text(encoding="utf-8"), path)
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as bad:
        raise RecipeError(f"{path} is not a YAML file: {bad}") from None
    if data is None:
        raise RecipeError(
            f"{path} is empty. Wanted keys such as name and model; `sparseft train NAME` runs one "
            f"that ships: {', '.join(shipped)}."
        )
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds {type(data).__name__}, wanted keys such as name.")
    return data


def _read_yaml(text: str, path: Path) -> Any:
    """Return what YAML text holds, refusing a key given twice, of which YAML keeps the last."""
    import yaml

    place: list[str] = []
    seen: set[int] = set()  # an alias leads to a node again, even to one that holds it

    def check(node: yaml.Node | None) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                check(item)
        if not isinstance(node, yaml.MappingNode):
            return
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            place.append(name)
            if name in lines:
                raise RecipeError(
                    f"{path} gives {'.'.join(place)!r} twice, in lines {lines[name]} and {line}; "
                    "keep one."
                )
            lines[name] = line
            check(value)
            place.pop()

    check(yaml.compose(text, Loader=yaml.SafeLoader))
    return yaml.safe_load(text)


def _override(data: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override {override!r} is not key=value, e.g. task.lr=1e-4.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as bad:
        raise RecipeError(f"the value of override {override!r} is not YAML: {bad}") from None
    *sections, last = key.strip().split(".")
    at = data
    for i, section in enumerate(sections):
        inner = at.setdefault(section, {})
        if inner is None:
            inner = at[section] = {}
        if not isinstance(inner, dict):
            raise RecipeError(
                f"override {override!r}: {'.'.join(sections[: i + 1])} is a value, not a section."
            )
        at = inner
    at[last] = value


def _build(cls: type, data: Any, prefix: str) -> Any:
    """Build a dataclass from a mapping, checking keys and types on the way."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{prefix or 'the recipe'} must be a section of keys, got {data!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            place = f"{prefix}.{key}" if prefix else str(key)
            raise RecipeError(
                f"unknown key {place!r}.{did_you_mean(str(key), fields)} Known keys here: "
                f"{', '.join(fields)}."
            )
    for name, entry in fields.items():
        no_default = (
            entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        )
        if no_default and name not in data:
            raise RecipeError(f"missing key {f'{prefix}.{name}' if prefix else name!r}.")
    values = {
        key: _convert(hints[key], value, f"{prefix}.{key}" if prefix else str(key))
        for key, value in data.items()
    }
    try:
        return cls(**values)
    except RecipeError as bad:
        where = getattr(cls, "where", "")
        if where and prefix != where:  # one of several sections of a kind
            raise RecipeError(str(bad).replace(where, prefix, 1)) from None
        raise


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Return ``value`` as ``kind``, or say what was wanted."""
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, key)
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), {} if value is None else value, key)
    if origin is tuple:  # one value for both phases, or one for each
        both = list(value) if isinstance(value, list | tuple) else [value] * len(args)
        if len(both) != len(args):
            raise RecipeError(f"{key} must be one value or [dense, sparse], got {value!r}.")
        return tuple(_convert(a, v, key) for a, v in zip(args, both, strict=True))
    if origin is list:
        items = value if isinstance(value, list | tuple) else [value]
        return [_convert(args[0], v, key) for v in items]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{key} must be a section of keys, got {value!r}.")
        return {
            _convert(args[0], k, key): _convert(args[1], v, f"{key}.{k}") for k, v in value.items()
        }
    return _scalar(kind, value, key)


def _scalar(kind: type, value: Any, key: str) -> Any:
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as text
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number == number and abs(number) != float("inf"):
            if kind is float:
                return number
            if number == int(number):
                return int(number)
    hint = " (quote it: YAML reads no, on, yes as true or false)" if kind is str else ""
    raise RecipeError(f"{key} must be {wanted}, got {value!r}{hint}.")
