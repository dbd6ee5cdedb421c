"""The sections of a recipe: names, types and ranges of their keys.

Not here: reading them from YAML (`sparseft.training.recipe`), doing anything with them
(`sparseft.training.study`, `sparseft.training.sweep`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sparseft._text import did_you_mean
from sparseft.denoise import Denoise
from sparseft.errors import RecipeError, SparseFtError
from sparseft.evaluation import METRICS
from sparseft.selection import selectors
from sparseft.training.mask_choice import MaskChoice
from sparseft.training.schedule import SCHEDULES

__all__ = [
    "DEVICE_NAMES",
    "EvaluationSection",
    "LanguageSection",
    "MethodSection",
    "ModelSection",
    "Section",
    "SweepSection",
    "TaskSection",
    "TrainSection",
    "is_device_name",
]

SETTINGS = ("full", "task", "task+language")
DEVICE_NAMES = "auto, cpu, cuda or cuda:N"


def is_device_name(name: str) -> bool:
    """Whether a text has the form of a device, whatever this machine has."""
    return re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name) is not None


@dataclass(kw_only=True)
class Section:
    """A part of a recipe; ``where`` is its dotted place, for messages."""

    where: ClassVar[str] = ""

    def _need(self, key: str, ok: bool, wanted: str) -> None:
        if not ok:
            place = f"{self.where}.{key}" if self.where else key
            raise RecipeError(f"{place} must be {wanted}, got {getattr(self, key)!r}.")


@dataclass(kw_only=True)
class ModelSection(Section):
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
class TrainSection(Section):
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
        iterations, selector, scope, selector_options: see `lottery_ticket`.
        denoise: keys of `sparseft.Denoise`, e.g. {rank: 64} or {energy: 0.9}: choose by denoised
            differences (DeFT-X).
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
    selector_options: dict[str, Any] = field(default_factory=dict)
    denoise: dict[str, Any] | None = None
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
        _check_mask_choice(self)
        if self.density is not None:
            self._need("density", 0 < self.density <= 1, "in (0, 1]")
        if self.nnz is not None:
            self._need("nnz", self.nnz >= 1, "at least 1")
        if self.density is not None and self.nnz is not None:
            raise RecipeError(f"{self.where} gives both density and nnz; keep one of the two.")
        if self.density is None and self.nnz is None:
            self.density = 0.1

    def denoising(self) -> Denoise | None:
        """Return the options of ``denoise``, None without."""
        return _denoising(self.denoise)


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
class EvaluationSection(Section):
    """What is scored.

    Args:
        data: folder with the task's files in their original layout.
        languages: languages to score; those without an adapter are scored by the task alone.
        split: test or valid.
        settings: of full (phase 1's result), task, task+language.
        metric: the one in the report's table and plot.
        language_coeff, task_coeff: of the adapters in a composition.
        batch_size, max_length: of the forward passes.
        autocast: bfloat16 forward over the weights' own dtype.
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
    autocast: bool = False

    def __post_init__(self) -> None:
        for name in self.settings:
            _choice("evaluation.settings", name, SETTINGS)
        _choice("evaluation.metric", self.metric, METRICS)
        _choice("evaluation.split", self.split, ("test", "valid", "train"))
        self._need("batch_size", self.batch_size >= 1, "at least 1")
        self._need("max_length", self.max_length >= 4, "at least 4")


def _denoising(options: Mapping[str, Any] | None) -> Denoise | None:
    return None if options is None else Denoise(**options)


@dataclass(kw_only=True)
class MethodSection(Section):
    """One way to choose masks, in a sweep.

    Args:
        selector, scope, selector_options, denoise: as in the task section.
    """

    where: ClassVar[str] = "sweep.methods"

    selector: str = "magnitude"
    scope: str = "global"
    selector_options: dict[str, Any] = field(default_factory=dict)
    denoise: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_mask_choice(self)

    def denoising(self) -> Denoise | None:
        """Return the options of ``denoise``, None without."""
        return _denoising(self.denoise)


@dataclass(kw_only=True)
class SweepSection(Section):
    """Ways to choose masks and sizes of masks, all compared on one dense phase a seed.

    Args:
        methods: name in the report -> how it chooses.
        densities: of the masks; each method's masks nest where its scope is global.
        baseline: the method that the others are compared with; default the first.
    """

    where: ClassVar[str] = "sweep"

    methods: dict[str, MethodSection] = field(default_factory=dict)
    densities: list[float] = field(default_factory=lambda: [0.01, 0.05, 0.1])
    baseline: str = ""

    def __post_init__(self) -> None:
        self._need("densities", bool(self.densities), "a list of at least one density")
        self._need("densities", all(0 < d <= 1 for d in self.densities), "in (0, 1]")
        self._need("densities", len(set(self.densities)) == len(self.densities), "all different")
        for name in self.methods:
            if " + " in name or not name.strip():
                raise RecipeError(
                    f"sweep.methods has the name {name!r}; wanted one without ' + ', which stands "
                    "for composition in reports."
                )
        if self.methods:
            self.baseline = self.baseline or next(iter(self.methods))
            _choice("sweep.baseline", self.baseline, self.methods)


# Options of selectors that a run fills in, or that YAML cannot hold.
_NOT_HERE = ("base", "tuned", "batches", "loss_fn", "seed", "nnz", "scope", "group", "fn")


def _check_mask_choice(section: TrainSection | MethodSection) -> None:
    where, options = section.where, section.selector_options
    _choice(f"{where}.selector", section.selector, selectors())
    _choice(f"{where}.scope", section.scope, ("global", "tensor", "row"))
    for option in options:
        if option in _NOT_HERE:
            raise RecipeError(
                f"{where}.selector_options has {option!r}, which is filled in or cannot come from "
                "a recipe; leave it out."
            )
    if section.selector == "function":
        raise RecipeError(
            f"{where}.selector is 'function', which a recipe cannot give; use Python, or masks "
            "saved in a file (selector: file)."
        )
    denoise = None
    if section.denoise is not None:
        known = [f.name for f in dataclasses.fields(Denoise)]
        for key in section.denoise:
            if key not in known:
                raise RecipeError(
                    f"{where}.denoise has the key {key!r}.{did_you_mean(str(key), known)} "
                    f"Known: {', '.join(known)}."
                )
        try:
            denoise = Denoise(**section.denoise)
        except SparseFtError as bad:
            raise RecipeError(f"{where}.denoise is {section.denoise!r}: {bad}") from None
    try:
        MaskChoice.of(section.selector, section.scope, options, denoise)
    except SparseFtError as bad:
        key = "selector_options" if denoise is None else "denoise"
        raise RecipeError(f"{where}.{key}: {bad}") from None


def _choice(key: str, value: str, allowed: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in allowed:
        raise RecipeError(
            f"{key} is {value!r}, allowed: {', '.join(map(str, allowed))}."
            f"{did_you_mean(value, allowed)}"
        )
