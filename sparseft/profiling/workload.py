"""What is trained, and how: one training step of a model as plain data, checked when made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparseft._text import did_you_mean
from sparseft.errors import OptionError, SparseFtError

__all__ = ["BASES", "DTYPES", "KINDS", "OPTIMIZERS", "TASKS", "Unavailable", "Way", "Workload"]

TASKS = ("auto", "mlm", "classification", "causal", "seq2seq")
DTYPES = ("fp32", "bf16", "fp16")
BASES = ("", "4bit", "8bit")
OPTIMIZERS = ("adamw", "adamw_torch", "adamw_8bit", "sparse_adamw", "sgd")
# Which way to train, and its variants; the first is the plain one.
KINDS: dict[str, tuple[str, ...]] = {
    "attached": ("", "packed"),
    "dense": ("", "matrices"),
    "gradient_mask": ("",),
    "lora": ("", "fp32"),
    "shira": ("",),
    "frozen": ("",),
}
_NEED_DENSITY = ("attached", "gradient_mask", "lora", "shira")


class Unavailable(SparseFtError, RuntimeError):
    """A way to train that cannot run here, whatever its arguments: an absent package, say."""


def _one_of(what: str, got: object, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    if got not in allowed:
        shown = ", ".join(repr(name) for name in allowed)
        raise OptionError(f"{what} {got!r} is not one of {shown}.{did_you_mean(str(got), allowed)}")


def _positive(what: str, got: object) -> None:
    if not isinstance(got, int) or isinstance(got, bool) or got < 1:
        raise OptionError(f"{what}={got!r}; wanted a whole number of at least 1.")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step, whoever trains.

    Args:
        model: folder with a config.json, name on the hub, or a size of `sizes`.
        task: ``"mlm"``, ``"classification"`` (3 labels, a new head), ``"causal"``, ``"seq2seq"``;
            ``"auto"`` goes by the config's architectures, else by its kind of model.
        batch: sequences per step.
        length: tokens per sequence; of both sides for ``"seq2seq"``.
        dtype: of base and activations: ``"fp32"``, ``"bf16"``, ``"fp16"``.
        base: ``""``: as ``dtype``; ``"4bit"``, ``"8bit"``: quantised, predicted only.
        optimizer: ``"adamw"``: torch's with ``fused=True``, the Trainer's default;
            ``"adamw_torch"``: as torch chooses; ``"adamw_8bit"``: moments of a byte;
            ``"sparse_adamw"``: `SparseAdamW` where masks are attached, ``"adamw"`` elsewhere;
            ``"sgd"``.
        checkpointing: activation checkpointing of every layer, non-reentrant.
        dropout: as in the config; False: none.
        seed: of weights, masks and data.

    Raises:
        OptionError: a value outside its list or range; says which there are.
    """

    model: str
    task: str = "auto"
    batch: int = 8
    length: int = 128
    dtype: str = "fp32"
    base: str = ""
    optimizer: str = "adamw"
    checkpointing: bool = False
    dropout: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("base", self.base, BASES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _positive("batch", self.batch)
        _positive("length", self.length)


@dataclass(frozen=True)
class Way:
    """One way to train it.

    Args:
        kind: ``"attached"``: masks on every matrix; ``"dense"``: all of the model;
            ``"gradient_mask"``: the entries of ``"attached"``, with dense gradients times 0/1 masks
            and a dense optimizer; ``"lora"``, ``"shira"``: PEFT's, with as many trained entries;
            ``"frozen"``: forward, and backward to the embeddings' output, nothing trained.
        density: share of the matrices' entries in training; lora and shira equal its count. None
            for dense and frozen.
        variant: ``"packed"`` (attached): all entries within a tenth of the tiles; ``"matrices"``
            (dense): only what attached masks; ``"fp32"`` (lora): adapters widened, as PEFT does by
            default; plain adapters are of the base's dtype.

    Raises:
        OptionError: an unknown kind or variant; a density that is missing, or outside (0, 1].
    """

    kind: str
    density: float | None = None
    variant: str = ""

    def __post_init__(self) -> None:
        _one_of("way to train", self.kind, KINDS)
        _one_of(f"variant of {self.kind}", self.variant, KINDS[self.kind])
        if self.kind not in _NEED_DENSITY:
            if self.density is not None:
                raise OptionError(f"{self.kind} has no density, and got {self.density!r}.")
        elif not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise OptionError(
                f"density={self.density!r} for {self.kind}; wanted a share in (0, 1], such as 0.01."
            )

    @property
    def share(self) -> float:
        """The density of a way that has one."""
        return 1.0 if self.density is None else float(self.density)
