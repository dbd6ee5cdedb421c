"""The demo's recipe: `recipe.yaml`, checked and typed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from sparseft._text import did_you_mean
from sparseft.demo.names import DEV, HELD_OUT, SHOWN
from sparseft.denoise import Denoise
from sparseft.errors import OptionError, RecipeError

__all__ = [
    "ComposeRecipe",
    "DemoRecipe",
    "DenoiseRecipe",
    "LanguageRecipe",
    "RunRecipe",
    "TaskRecipe",
]

RECIPE = Path(__file__).with_name("recipe.yaml")


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """How the task diff is trained: passes over the English names, in each of the two phases."""

    epochs: int
    batch_size: int
    lr: float
    density: float
    scope: str
    l1: float
    dropout: float


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """How a language diff is trained: masked-LM steps on raw text, in each of the two phases."""

    steps: int
    batch_size: int
    lr: float
    density: float
    scope: str
    l1: float
    mask_rate: float
    phrases: int


@dataclass(frozen=True, kw_only=True)
class DenoiseRecipe:
    """How the differences of a dense phase are denoised, of the task's and of every language's.

    Args:
        rule: ``"energy"`` or ``"rank"``.
        level: the share of energy, or the number of singular values, that is kept.
        residual: share of entries at which the residual is kept.
    """

    rule: str
    level: float
    residual: float

    @property
    def how(self) -> Denoise:
        """The settings as the engine takes them.

        Raises:
            RecipeError: another rule, or a value out of range.
        """
        try:
            if self.rule == "energy":
                return Denoise(energy=self.level, residual=self.residual)
            if self.rule == "rank" and self.level == int(self.level):
                return Denoise(rank=int(self.level), residual=self.residual)
        except OptionError as error:
            raise RecipeError(f"denoise: {error}") from None
        raise RecipeError(
            f"denoise: rule {self.rule!r} with level {self.level}; wanted 'energy' with a share, "
            f"or 'rank' with a whole number.{did_you_mean(self.rule, ['energy', 'rank'])}"
        )

    @property
    def slug(self) -> str:
        """The settings as part of a folder's name."""
        return f"{self.rule}-{self.level:g}-residual-{self.residual:g}"


@dataclass(frozen=True, kw_only=True)
class ComposeRecipe:
    """Coefficient of the language diff; the task diff has 1."""

    language_coeff: float


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """What one run covers. Without densities, those of the task and language parts are used."""

    languages: tuple[str, ...]
    seeds: int
    densities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for language in self.languages:
            if language not in HELD_OUT:
                held_out = (*SHOWN, *DEV)
                raise RecipeError(
                    f"language {language!r} is not held out of the encoder's pre-training; "
                    f"these are: {', '.join(held_out)}.{did_you_mean(language, held_out)}"
                )


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """The whole recipe."""

    task: TaskRecipe
    language: LanguageRecipe
    denoise: DenoiseRecipe
    compose: ComposeRecipe
    quick: RunRecipe
    full: RunRecipe

    @classmethod
    def load(cls, path: Path = RECIPE) -> DemoRecipe:
        """Return a recipe file's content.

        Raises:
            RecipeError: a key that is missing, unknown, or of another kind; a way to denoise that
                the engine does not know.
        """
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = {
            "task": TaskRecipe,
            "language": LanguageRecipe,
            "denoise": DenoiseRecipe,
            "compose": ComposeRecipe,
            "quick": RunRecipe,
            "full": RunRecipe,
        }
        _same_keys(content, set(parts), set(parts), str(path))
        made: dict[str, Any] = {}
        for name, part in parts.items():
            known = {f.name for f in fields(part)}
            needed = known - ({"densities"} if part is RunRecipe else set())
            _same_keys(content[name], known, needed, f"{path}: {name}")
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in content[name].items()}
            made[name] = part(**values)
        recipe = cls(**made)
        _ = recipe.denoise.how  # refused here, not after the first dense phase
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        return asdict(self)


def _same_keys(found: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(found, dict):
        raise RecipeError(f"{where} is {type(found).__name__}, wanted keys {sorted(known)}.")
    for key in found:
        if key not in known:
            raise RecipeError(
                f"{where}: unknown key {key!r}.{did_you_mean(str(key), sorted(known))}"
            )
    if lacking := sorted(needed - set(found)):
        raise RecipeError(f"{where}: lacks {', '.join(lacking)}.")
