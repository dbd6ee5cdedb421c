"""A model's training step at several densities, predicted and measured, beside other ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from sparseft._text import human_bytes, parse_bytes
from sparseft.benchmarking.limits import too_little
from sparseft.errors import DataError, OptionError, SparseFtError
from sparseft.profiling.communication import Communication
from sparseft.profiling.fits import Fit, largest_densities
from sparseft.profiling.measure import Measurement, measure, measure_here
from sparseft.profiling.memory import MemoryUse
from sparseft.profiling.predict import Prediction, predict
from sparseft.profiling.rank_measure import MOST_RANKS, measure_ranks
from sparseft.profiling.sharding import check_ranks
from sparseft.profiling.worker import failure
from sparseft.profiling.workload import KINDS, Way, Workload

__all__ = ["DEFAULT_DENSITIES", "DEFAULT_WAYS", "Profile", "ProfileRow", "profile"]

DEFAULT_DENSITIES = (0.001, 0.01, 0.05, 0.1, 1.0)
DEFAULT_WAYS = ("attached", "dense", "lora", "frozen")
# Days on a CPU and, dense, more memory than any one GPU has: measured only when asked.
_LARGE = ("7b", "13b", "30b")
# What a process takes before it has a model: torch, transformers.
_INTERPRETER = 600 << 20

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One way to train, predicted and measured.

    Args:
        way: how it trains.
        prediction, measurement: None where there is none.
        not_predicted, not_measured: why; else empty.
    """

    way: Way
    prediction: Prediction | None = None
    not_predicted: str = ""
    measurement: Measurement | None = None
    not_measured: str = ""

    @property
    def predicted(self) -> MemoryUse | None:
        """Bytes by part, of one rank."""
        return None if self.prediction is None else self.prediction.use

    @property
    def measured(self) -> MemoryUse | None:
        """Bytes by part."""
        return None if self.measurement is None else self.measurement.use

    @property
    def exchange_predicted(self) -> Communication | None:
        """Bytes that a rank exchanges in a step."""
        return None if self.prediction is None else self.prediction.communication

    @property
    def exchange_measured(self) -> Communication | None:
        """Bytes that a rank exchanged in a step."""
        return None if self.measurement is None else self.measurement.communication

    @property
    def assumed(self) -> tuple[str, ...]:
        """What the prediction rests on, besides the code that ran."""
        return () if self.prediction is None else self.prediction.assumed

    @property
    def trainable(self) -> int | None:
        """Numbers that train."""
        known = self.measurement or self.prediction
        return None if known is None else known.trainable

    @property
    def error(self) -> float | None:
        """By how much of the measured peak the predicted one is higher."""
        if self.predicted is None or self.measured is None:
            return None
        return self.predicted.peak / self.measured.peak - 1


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What `profile` found.

    Args:
        workload: the step.
        device: ``"cpu"`` or ``"cuda"``.
        world_size: ranks that share the step; figures are of one.
        sharding: how they share it, ``"fsdp"`` or ``"ddp"``.
        rows: by way and density.
        fits: one for each limit asked for.
        how: where measured bytes come from.
    """

    workload: Workload
    device: str
    world_size: int
    sharding: str
    rows: tuple[ProfileRow, ...]
    fits: tuple[Fit, ...]
    how: str


@dataclass
class _Progress:
    tick: Tick
    what: str
    of: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        self.tick(self.what, self.done, self.of)


def profile(
    workload: Workload,
    densities: Sequence[float] = DEFAULT_DENSITIES,
    *,
    ways: Sequence[str] = DEFAULT_WAYS,
    device: str = "cpu",
    world_size: int = 1,
    sharding: str = "fsdp",
    predict_only: bool = False,
    large: bool = False,
    fits: Sequence[int | str] = (),
    steps: int = 5,
    threads: int | None = None,
    isolated: bool = True,
    progress: Tick | None = None,
) -> Profile:
    """Predict, and where possible measure, what a training step takes.

    Args:
        workload: model, task, batch, types, optimizer.
        densities: of the attached masks; LoRA and the like equal their counts. 1.0 is a mask on
            every entry.
        ways: kinds of `Way`.
        device: ``"cpu"`` or ``"cuda"``.
        world_size: ranks that share the step; ``workload.batch`` is each one's. Measured in as
            many processes of this machine, where it has the memory.
        sharding: how they share it: ``"fsdp"`` cuts weights, ``"ddp"`` copies them.
        predict_only: measure nothing; then a device that is not at hand will do.
        large: measure ``7b``, ``13b`` and ``30b`` too, if memory suffices.
        fits: limits in bytes or as ``"24GiB"``: the largest density below each is sought.
        steps: timed steps, at least 2.
        threads: torch's, measured and predicted; None: what this process has.
        isolated: measure each way in a process of its own; in this one otherwise (of one rank).
        progress: called as ``progress(what, done, of)``.

    Returns:
        One row per way and density. A way that fails leaves a row with the reason.

    Raises:
        OptionError: a density outside (0, 1], an unknown way or device, CUDA where there is none,
            no rank, an unknown way to share, a limit that is no size; what the `Workload` says of
            its model.
        DataError: a model that is not found.

    Example:
        >>> workload = Workload(model="tiny-encoder", batch=2, length=8)
        >>> found = profile(workload, [0.01], ways=["attached"], predict_only=True)
        >>> found.rows[0].predicted.peak > 0
        True
    """
    limits = [_limit(given) for given in fits]
    chosen = _ways(ways, densities)
    _check_device(device, predict_only)
    check_ranks(world_size, sharding)
    if steps < 2:
        raise OptionError(f"{steps=}: a spread of times needs at least 2 steps.")
    tick = progress or (lambda what, done, of: None)
    step = _Progress(tick, "predicting", len(chosen) + bool(limits))
    rows: list[ProfileRow] = []
    for way in chosen:
        with _threads(threads):
            rows.append(_predicted(workload, way, device, world_size, sharding))
        step()
    found: list[Fit] = []
    if limits:

        def peak_at(density: float) -> int:
            way = Way("attached", density)
            with _threads(threads):
                return predict(workload, way, device, world_size, sharding).use.peak

        known = {
            row.way.share: row.predicted.peak
            for row in rows
            if row.way.kind == "attached" and row.predicted is not None
        }
        found = largest_densities(peak_at, limits, known)
        step()
    step = _Progress(tick, "measuring", len(rows))
    for i, row in enumerate(rows):
        reason = _why_not(workload, row, device, world_size, predict_only, large)
        if reason:
            rows[i] = replace(row, not_measured=reason)
        else:
            ranks = (world_size, sharding)
            rows[i] = _measured(workload, row, device, ranks, steps, threads, isolated)
        step()
    how = next((r.measurement.how for r in rows if r.measurement is not None), "")
    return Profile(
        workload=workload,
        device=device,
        world_size=world_size,
        sharding=sharding,
        rows=tuple(rows),
        fits=tuple(found),
        how=how,
    )


def _limit(given: int | str) -> tuple[int, str]:
    try:
        limit = parse_bytes(given)
    except ValueError as error:
        raise OptionError(f"memory to fit in: {error}") from None
    if limit == 0:
        raise OptionError("memory to fit in: 0 bytes hold nothing.")
    return limit, given.strip() if isinstance(given, str) else human_bytes(given)


def _ways(kinds: Sequence[str], densities: Sequence[float]) -> list[Way]:
    """Return ways in the order of the table: each density's own first, then those without one."""
    if not kinds:
        raise OptionError(f"no way to train given; there are {', '.join(KINDS)}.")
    single = [kind for kind in dict.fromkeys(kinds) if kind in ("dense", "frozen")]
    several = [kind for kind in dict.fromkeys(kinds) if kind not in single]
    if several and not densities:
        raise OptionError("no density given; wanted shares in (0, 1], such as 0.01.")
    found = [
        Way(kind, density)
        for density in sorted(set(densities))
        for kind in several
        # As many numbers as all of the model's: a low rank is none.
        if not (kind == "lora" and density == 1)
    ]
    return found + [Way(kind) for kind in single]


def _check_device(device: str, predict_only: bool) -> None:
    if device not in ("cpu", "cuda"):
        raise OptionError(f"{device=}; wanted 'cpu' or 'cuda'.")
    if device == "cuda" and not predict_only and not torch.cuda.is_available():
        raise OptionError(
            "device 'cuda': torch sees no CUDA device here. Predicting needs none "
            "(--predict-only; predict_only=True)."
        )


def _predicted(
    workload: Workload, way: Way, device: str, world_size: int, sharding: str
) -> ProfileRow:
    try:
        found = predict(workload, way, device, world_size, sharding)
    except (DataError, OptionError):
        raise
    except Exception as error:  # one way of training must not take the others along
        return ProfileRow(way=way, not_predicted=_said(error))
    return ProfileRow(way=way, prediction=found)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let torch have so many threads within, as in the processes that measure."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _said(error: Exception) -> str:
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return (
            f"its code asks for the values of tensors ({error.func}), and a prediction has shapes "
            "alone; measure it"
        )
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, SparseFtError) else f"{type(error).__name__}: {lines[0]}"


def _why_not(
    workload: Workload,
    row: ProfileRow,
    device: str,
    world_size: int,
    predict_only: bool,
    large: bool,
) -> str:
    """Return why a row is not measured; empty if it is to be."""
    if predict_only:
        return "predictions only were asked for"
    if workload.base:
        return f"a base of {workload.base} is predicted only"
    if reason := _too_many(world_size, device):
        return reason
    if workload.model in _LARGE and not large:
        return f"{workload.model} is predicted only, unless --large (large=True) asks for more"
    if row.predicted is None:
        return ""
    if world_size > 1 and device == "cpu":
        return too_little(world_size * (row.predicted.peak + _INTERPRETER), device)
    return too_little(row.predicted.peak, device)


def _too_many(world_size: int, device: str) -> str:
    """Return why so many ranks are not measured here; empty if they are."""
    if device == "cuda":
        there = torch.cuda.device_count()
        if 1 < world_size > there:
            return f"{world_size} ranks are predicted only: a GPU each, and here are {there}"
    elif world_size > MOST_RANKS:
        return (
            f"{world_size} ranks are predicted only: at most {MOST_RANKS} processes are measured "
            "on one CPU"
        )
    return ""


def _measured(
    workload: Workload,
    row: ProfileRow,
    device: str,
    ranks: tuple[int, str],
    steps: int,
    threads: int | None,
    isolated: bool,
) -> ProfileRow:
    try:
        if ranks[0] > 1:
            world_size, sharding = ranks
            found = measure_ranks(
                workload,
                row.way,
                device,
                world_size=world_size,
                sharding=sharding,
                threads=threads,
            )
        elif isolated:
            found = measure(workload, row.way, device, steps=steps, threads=threads)
        else:
            found = measure_here(workload, row.way, device, steps=steps)
    except OptionError:
        raise
    except SparseFtError as error:
        return replace(row, not_measured=_said(error))
    except Exception as error:  # in a process of its own it would be that row's reason, too
        if isolated:
            raise
        return replace(row, not_measured=failure(error, device))
    return replace(row, measurement=found)
