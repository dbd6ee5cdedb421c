"""Recipes: a whole study as data. YAML files, ``key=value`` overrides, and a check of every value.

Here: names, types and ranges. Not here: doing anything with them (`sparseft.training.study`).
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from sparseft._text import did_you_mean
from sparseft.errors import RecipeError
from sparseft.training.schedule import SCHEDULES

__all__ = [
    "EvaluationSection",
    "LanguageSection",
    "ModelSection",
    "Recipe",
    "TaskSection",
    "TrainSection",
    "load_recipe",
    "packaged_recipes",
    "read_recipe_file",
]

SETTINGS = ("full", "task", "task+language")
DEVICE_NAMES = "auto, cpu, cuda or cuda:N"


def is_device_name(name: str) -> bool:
    """Whether a text has the form of a device, whatever this machine has."""
    return re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name) is not None


@dataclass(kw_only=True)
class _Section:
    """A part of a recipe; ``where`` is its dotted place, for messages."""

    where: ClassVar[str] = ""

    def _need(self, key: str, ok: bool, wanted: str) -> None:
        if not ok:
            place = f"{self.where}.{key}" if self.where else key
            raise RecipeError(f"{place} must be {wanted}, got {getattr(self, key)!r}.")


@dataclass(kw_only=True)
class ModelSection(_Section):
    """The base.

    Args:
        base: folder with a model, or a name on the hub.
        dtype: of the weights while training: float32 or bfloat16.
        device: cpu, cuda, cuda:1, ..., or auto (cuda where there is one).
    """

    where: ClassVar[str] = "model"

    base: str
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        self._need("base", bool(self.base), "a folder or a hub name")
        self._need("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        self._need("device", is_device_name(self.device), DEVICE_NAMES)


@dataclass(kw_only=True)
class TrainSection(_Section):
    """How one adapter is trained; the base of the task and language sections.

    Args:
        steps: optimizer steps of each phase, or [dense, sparse].
        batch_size, accumulate: rows of a micro-batch, micro-batches of a step.
        max_length: tokens of an example.
        lr: of AdamW, one for both phases or [dense, sparse]; a mask bears a higher one than the
            whole model does.
        schedule, warmup_steps, weight_decay, max_grad_norm: the same in both phases.
        density, nnz: size of the mask, one of the two; density is a fraction of the entries that
            may be chosen.
        l1: strength of the penalty on the diff, or [dense, sparse].
        iterations, selector, scope: see `lottery_ticket`.
        exclude: globs of parameters frozen in both phases.
        full_params: globs of parameters trained fully; for a task, what the base lacks (its head)
            always is.
        checkpointing: trade time for activation memory (gradient checkpointing).
        autocast: bfloat16 forward over the weights' own dtype.
        save_every: steps between checkpoints, 0 for none.
        log_every: steps between lines of the log.
    """

    steps: tuple[int, int] = (500, 500)
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 128
    lr: tuple[float, float] = (5e-5, 5e-5)
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    density: float | None = None
    nnz: int | None = None
    l1: tuple[float, float] = (0.0, 0.0)
    iterations: int = 1
    selector: str = "magnitude"
    scope: str = "global"
    exclude: list[str] = field(default_factory=list)
    full_params: list[str] = field(default_factory=list)
    checkpointing: bool = False
    autocast: bool = False
    save_every: int = 100
    log_every: int = 50

    def __post_init__(self) -> None:
        self._need("steps", min(self.steps) >= 1, "at least 1 in each phase")
        for key in ("batch_size", "accumulate", "iterations", "log_every"):
            self._need(key, getattr(self, key) >= 1, "at least 1")
        for key in ("warmup_steps", "save_every"):
            self._need(key, getattr(self, key) >= 0, "at least 0")
        self._need("max_length", self.max_length >= 4, "at least 4")
        self._need("lr", min(self.lr) > 0, "above 0 in each phase")
        for key in ("weight_decay", "max_grad_norm"):
            self._need(key, getattr(self, key) >= 0, "at least 0")
        self._need("l1", min(self.l1) >= 0, "at least 0 in each phase")
        _choice(f"{self.where}.schedule", self.schedule, SCHEDULES)
        _choice(f"{self.where}.scope", self.scope, ("global", "tensor", "row"))
        if self.density is not None:
            self._need("density", 0 < self.density <= 1, "in (0, 1]")
        if self.nnz is not None:
            self._need("nnz", self.nnz >= 1, "at least 1")
        if self.density is not None and self.nnz is not None:
            raise RecipeError(f"{self.where} gives both density and nnz; keep one of the two.")
        if self.density is None and self.nnz is None:
            self.density = 0.1


@dataclass(kw_only=True)
class TaskSection(TrainSection):
    """The task: one adapter a seed, trained on labelled examples of the source language.

    Args:
        name: a registered task, e.g. nusax_senti.
        source: language of the training examples.
        train_file: CSV, TSV or JSONL with the training examples; without one, the task's own
            training split of the source language is read from evaluation.data.
        columns: names of the columns of a file without a header line.
        text_fields, label_field: which columns hold the text (or the pair) and the label.
        max_examples: keep the first so many.
        seeds: one run each.
        source_language_adapter: train with the language adapter of the source beneath (it must be
            among language.texts).
    """

    where: ClassVar[str] = "task"

    name: str
    source: str
    train_file: str | None = None
    columns: list[str] | None = None
    text_fields: list[str] = field(default_factory=lambda: ["text"])
    label_field: str = "label"
    max_examples: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    source_language_adapter: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need("seeds", bool(self.seeds), "a list of at least one seed")
        self._need("seeds", len(set(self.seeds)) == len(self.seeds), "without repetitions")
        if self.max_examples is not None:
            self._need("max_examples", self.max_examples >= 1, "at least 1")


@dataclass(kw_only=True)
class LanguageSection(TrainSection):
    """The languages: one adapter each, trained by masked language modelling on raw text.

    Args:
        texts: language -> text files or folders, one sentence or paragraph a line.
        mask_rate: fraction of tokens predicted.
        untie_embeddings: predict with a copy of the embedding; freeze it with ``exclude``, so that
            the mask is not spent on the output side.
        seed: of every language's run.
    """

    where: ClassVar[str] = "language"

    texts: dict[str, list[str]] = field(default_factory=dict)
    mask_rate: float = 0.15
    untie_embeddings: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need("mask_rate", 0 < self.mask_rate < 1, "in (0, 1)")
        for language, files in self.texts.items():
            if not files:
                raise RecipeError(f"language.texts.{language} lists no file.")


@dataclass(kw_only=True)
class EvaluationSection(_Section):
    """What is scored.

    Args:
        data: folder with the task's files in their original layout.
        languages: languages to score; those without an adapter are scored by the task alone.
        split: test or valid.
        settings: of full (phase 1's result), task, task+language.
        metric: the one in the report's table and plot.
        language_coeff, task_coeff: of the adapters in a composition.
        batch_size, max_length: of the forward passes.
    """

    where: ClassVar[str] = "evaluation"

    data: str | None = None
    languages: list[str] = field(default_factory=list)
    split: str = "test"
    settings: list[str] = field(default_factory=lambda: list(SETTINGS))
    metric: str = "macro_f1"
    language_coeff: float = 1.0
    task_coeff: float = 1.0
    batch_size: int = 16
    max_length: int = 128

    def __post_init__(self) -> None:
        for name in self.settings:
            _choice("evaluation.settings", name, SETTINGS)
        _choice("evaluation.split", self.split, ("test", "valid", "train"))
        self._need("batch_size", self.batch_size >= 1, "at least 1")
        self._need("max_length", self.max_length >= 4, "at least 4")


@dataclass(kw_only=True)
class Recipe(_Section):
    """A study: base, task, languages, evaluation.

    Args:
        name: short name; the default output folder is ``runs/<name>``.
        description: what the study shows.
        data_dir: folder that relative paths of data, and of the base if it lies there, start from.
        output_dir: where runs, adapters and results go.
        model, task, language, evaluation: the sections; without a task only language adapters are
            trained.
    """

    name: str
    description: str = ""
    data_dir: str = "."
    output_dir: str = ""
    model: ModelSection
    task: TaskSection | None = None
    language: LanguageSection = field(default_factory=LanguageSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

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


def _choice(key: str, value: str, allowed: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in allowed:
        raise RecipeError(
            f"{key} is {value!r}, allowed: {', '.join(map(str, allowed))}."
            f"{did_you_mean(value, allowed)}"
        )


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
    return cls(**values)


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Return ``value`` as ``kind``, or say what was wanted."""
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
