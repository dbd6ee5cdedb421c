"""The trainings of a study as independent parts, run here or in worker processes.

The encoder is too small for threads: on two cores of a busy machine a step took 0.13 s with one
thread and 0.5 to 1.0 s with two. But the diffs of different languages do not depend on each other,
so whole trainings go to worker processes of one thread each. A worker leaves nothing behind but the
finished state of `lottery_ticket`; the main process then makes the same call, which finds it and
trains nothing. So one worker or two, interrupted or not, the bits are the same.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from sparseft.adapter import Adapter
from sparseft.demo.encoder import load_classifier, load_masked_lm, load_tokenizer
from sparseft.demo.recipe import DemoRecipe
from sparseft.demo.training import PhaseState, train_language, train_task
from sparseft.training import LotteryTicketResult

__all__ = [
    "BASE_NAME",
    "KINDS",
    "Found",
    "Kind",
    "Part",
    "Workers",
    "default_workers",
    "train_part",
]

BASE_NAME = "sparseft-demo-encoder"
Kind = Literal["plain", "denoised"]
KINDS: tuple[Kind, ...] = ("plain", "denoised")
# Results of each kind of mask, in the order of a part's densities.
Found = dict[Kind, list[LotteryTicketResult]]
Trained = tuple[Found, list[PhaseState]]


@dataclass(frozen=True)
class Part:
    """One dense phase and the sparse phases of the masks chosen from it, and all they depend on.

    Args:
        recipe: the study's.
        assets: the encoder's folder.
        output_dir: state of the training; a name that ends in how it was denoised is put beside it.
        seed: of the run.
        densities: of the diffs it gives.
        language: whose diff is learned; None for the task's.
        source: file of the English language diff beneath a task diff, None for the bare encoder.
        kinds: of masks; all are chosen from the dense phase of the first.
    """

    recipe: DemoRecipe
    assets: Path
    output_dir: Path
    seed: int
    densities: tuple[float, ...]
    language: str | None = None
    source: Path | None = None
    kinds: tuple[Kind, ...] = KINDS

    @property
    def name(self) -> str:
        """What to call it while it runs."""
        return self.output_dir.name

    def folder(self, kind: Kind) -> Path:
        """Return the folder of one kind's state.

        Other ways to denoise go to other folders, so that trials share all that is plain.
        """
        if kind == "plain":
            return self.output_dir
        return self.output_dir.with_name(f"{self.name}-{self.recipe.denoise.slug}")


def train_part(part: Part, report: Callable[[str, int], None] | None = None) -> Trained:
    """Run a part, or find it finished, and return its results and the state its phases kept."""
    tokenizer: Any = load_tokenizer(part.assets)
    model = (
        load_classifier(part.assets, seed=part.seed)
        if part.language is None
        else load_masked_lm(part.assets)
    )
    source = None if part.source is None else Adapter.load(part.source)
    found: Found = {}
    states: list[PhaseState] = []
    for kind in part.kinds:
        shared: dict[str, Any] = {
            "densities": part.densities,
            "seed": part.seed,
            "output_dir": part.folder(kind),
            "base_name": BASE_NAME,
            "denoise": part.recipe.denoise.how if kind == "denoised" else None,
            "phase1": None if kind == part.kinds[0] else part.folder(part.kinds[0]),
            "report": report,
        }
        if part.language is not None:
            found[kind], kept = train_language(
                model, part.language, tokenizer, part.recipe.language, **shared
            )
        else:
            found[kind], kept = train_task(
                model, tokenizer, part.recipe.task, source=source, **shared
            )
        states += kept
    return found, states


def _end_with_parent() -> None:
    """Make this worker process end when the one that started it is gone.

    The pool's workers otherwise outlive a killed parent, and hold the folder of their training.
    What they leave is what a kill leaves: the next run goes on from it.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_worker(part: Part) -> list[PhaseState]:
    torch.set_num_threads(1)
    return train_part(part)[1]


def default_workers() -> int:
    """Return how many trainings run at once: two where this process may use two cores."""
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return min(2, len(usable))


class Workers:
    """Runs parts: at once in ``count`` processes, or one by one in this process when it is 1."""

    def __init__(self, count: int, report: Callable[[str, int], None] | None = None) -> None:
        self.report = report
        self._futures: dict[Part, Future[list[PhaseState]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            # spawn: a forked child of a process with threads (torch, progress bar) may hang
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                count, mp_context=context, initializer=_end_with_parent
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def start(self, part: Part) -> None:
        """Queue a part, if there are workers to do it."""
        if self._pool is not None:
            self._futures[part] = self._pool.submit(_in_worker, part)

    def finish(self, part: Part) -> Trained:
        """Return a part's results, once it is done."""
        if part not in self._futures:
            return train_part(part, self.report)
        states = self._futures.pop(part).result()
        return train_part(part)[0], states
