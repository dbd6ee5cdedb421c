"""The lottery-ticket algorithm for sparse fine-tuning (LT-SFT): Ansell et al. 2022, arXiv
2110.07560, section 3.1.

Phase 1 fine-tunes densely, the entries that moved most are selected, everything is rewound, phase 2
trains those entries. Both phases are ordinary trainer runs made by a factory of the user's.

On disk (``output_dir``)::

    state.json                            settings, finished phases
    theta0.safetensors                    everything trainable before phase 1
    iteration-0/dense/                    the trainer's checkpoints
    iteration-0/dense.safetensors         result of phase 1 (full fine-tuning)
    iteration-0/masks-nnz-K.safetensors   what was selected
    iteration-0/sparse-nnz-K/             the trainer's checkpoints
    iteration-0/adapter-nnz-K/            result of phase 2
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

from torch import nn

from sparseft.adapter import Adapter
from sparseft.errors import MaskError, ResumeError
from sparseft.modules._collective import Ranks
from sparseft.modules.ranks import refuse_unconnected
from sparseft.selection.counts import total_nnz
from sparseft.training.mask_choice import MaskChoice
from sparseft.training.parameters import Trainables, base_digest, saved_training_mode
from sparseft.training.phase1 import DENSE, Phase1
from sparseft.training.phases import MakeTrainer
from sparseft.training.state import MASK_KEYS, RunState, exclusive
from sparseft.training.ticket import LotteryTicketResult, TicketRun

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sparseft.denoise import Denoise

__all__ = ["LotteryTicketResult", "SourceAdapter", "dense_phase", "lottery_ticket"]

SourceAdapter = Adapter | tuple[Adapter, float]


class _Options(TypedDict, total=False):
    """The keywords of `lottery_ticket` that the type of its result does not depend on."""

    iterations: int
    selector: str
    scope: str
    selector_options: Mapping[str, Any] | None
    denoise: Denoise | None
    include: Sequence[str] | None
    exclude: Sequence[str]
    full_params: Sequence[str]
    l1: float | tuple[float, float]
    source_adapters: Sequence[SourceAdapter]
    seed: int
    resume: bool
    adapter_name: str
    base_name: str | None
    metadata: Mapping[str, Any] | None
    theta0: str | Path | None
    phase1: str | Path | None


@overload
def lottery_ticket(
    make_trainer: MakeTrainer,
    model: nn.Module,
    *,
    output_dir: str | Path,
    nnz: int | None = None,
    density: float | None = None,
    **options: Unpack[_Options],
) -> LotteryTicketResult: ...


@overload
def lottery_ticket(
    make_trainer: MakeTrainer,
    model: nn.Module,
    *,
    output_dir: str | Path,
    nnz: Sequence[int] | None = None,
    density: Sequence[float] | None = None,
    **options: Unpack[_Options],
) -> list[LotteryTicketResult]: ...


def lottery_ticket(
    make_trainer: MakeTrainer,
    model: nn.Module,
    *,
    output_dir: str | Path,
    nnz: int | Sequence[int] | None = None,
    density: float | Sequence[float] | None = None,
    iterations: int = 1,
    selector: str = "magnitude",
    scope: str = "global",
    selector_options: Mapping[str, Any] | None = None,
    denoise: Denoise | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    full_params: Sequence[str] = (),
    l1: float | tuple[float, float] = 0.0,
    source_adapters: Sequence[SourceAdapter] = (),
    seed: int = 0,
    resume: bool = True,
    adapter_name: str = "adapter",
    base_name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    theta0: str | Path | None = None,
    phase1: str | Path | None = None,
) -> LotteryTicketResult | list[LotteryTicketResult]:
    """Learn a sparse adapter in two phases: dense, select, rewind, sparse.

    Phase 1 minimises ``loss + l1 * mean|theta - theta0|`` over all candidates, giving theta1. The
    mask keeps the nnz entries with the largest ``|theta1 - theta0|`` (or what ``selector``
    chooses). Everything goes back to theta0, and phase 2 minimises ``loss + l1 * mean|diff|`` over
    the entries of the mask. With n iterations the mask grows by nnz / n an iteration (the last
    brings it to nnz): each begins where the last ended, its dense phase moves every candidate, the
    entries that are then farthest from theta0 join those already chosen, everything is rewound to
    where the iteration began, and its sparse phase trains the whole mask.

    Args:
        make_trainer: (model, `Phase`) -> a Hugging Face ``Trainer`` or `LoopTrainer` that keeps its
            checkpoints in ``phase.output_dir``. Called once a phase, with what is to be trained
            already marked by ``requires_grad``; options such as ``load_best_model_at_end`` work in
            both phases.
        model: the base; as it was, bit for bit, when this returns or raises.
        output_dir: folder of the run's state. The same call goes on from whatever it finds there.
        nnz: entries to train; or density, a fraction of the candidates' entries. A list of either
            gives a list of
            results: phase 1 runs once, and the masks nest where the scope is "global".
        iterations: repetitions of the two phases; 1 with a list.
        selector: name of a registered selector; ``scope`` and ``selector_options`` go to `select`.
            One that looks at no differences ("low_rank", "random", ...) runs no dense phase; one by
            gradients ("fisher", ...) looks at the batches of a trainer of the dense phase.
        denoise: choose by denoised differences (DeFT-X): selector "deltas_svd" with these options.
        include, exclude: globs over parameter names that the mask may and may not touch (exclude
            wins). What is excluded stays frozen in both phases. As in `select`, a tied parameter is
            meant by any of its names: a head's glob also freezes an embedding tied to it.
        full_params: globs of parameters trained fully in both phases (heads). They are rewound like
            the rest, and saved whole in the adapter.
        l1: strength of the penalty on the diff, or one for each phase.
        source_adapters: adapters, or (adapter, coeff), that are applied beneath in both phases, so
            that the diff is relative to them. Their digests are the result's ``metadata.parents``.
        seed: of both phases (each derives its own; a Trainer additionally uses its ``args.seed``).
        resume: False starts over and deletes what the folder holds of an earlier run.
        adapter_name, base_name, metadata: name and provenance of the result; ``metadata`` is JSON.
        theta0: a safetensors file of the base, under the model's own names; what it holds bit for
            bit is read from there, not copied to ``output_dir``.
        phase1: ``output_dir`` of another run, or of `dense_phase` (or the file that returned): its
            dense phase is taken, its heads' first values, too. Runs that share one differ in their
            masks only: each sparse phase of a size sees the same batches.

    Returns:
        A `LotteryTicketResult`, or a list in the order of the list given.

    Raises:
        MaskError: nothing to select from, nnz outside 1 ... candidates, or other than the number
            that a selector keeps by itself ("n:m", "file": leave nnz and density out).
        OptionError, UnknownNameError: a selector, or options of it, that `select` would refuse.
        ResumeError: the folder holds a run with other settings, or another process runs in it.
        NonFiniteLossError: NaN or infinite loss; the last good checkpoint stays.
        DataError: empty training data.
        SparseFtError: started as several processes that have no process group yet.

    Several processes (torchrun) train both phases together over a factory of Trainers, and one
    writes the folder; to rounding, they make the ticket of one process with their whole batch.

    Numerics: interrupted and continued, a run gives the bytes of an uninterrupted one (one machine,
        thread count, set of versions), as long as the trainer's checkpoints are exact:
        `LoopTrainer`'s are, and Trainer's are with a collator that draws from torch's generators or
        from the batch itself.

    Source: Ansell, Ponti, Korhonen, Vulić 2022, arXiv 2110.07560, section 3.1 and appendix
        (iterations, L1).
    """
    refuse_unconnected("lottery_ticket")
    single = not (_several(nnz) or _several(density))
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    if iterations > 1 and not single:
        raise ValueError(
            "a list of nnz or densities shares one dense phase, as only one iteration can; "
            "call once for each, with its own output_dir, to repeat the phases."
        )
    choice = MaskChoice.of(selector, scope, selector_options, denoise)
    if iterations > 1 and (choice.method != "magnitude" or phase1 is not None):
        with_phase1 = "" if phase1 is None else " with phase1"
        raise ValueError(
            f"iterations={iterations} needs selector='magnitude', which can keep earlier entries, "
            f"and a dense phase of its own each; got {choice.method!r}{with_phase1}."
        )
    parts = Trainables.of(model, include=include, exclude=exclude, full_params=full_params)
    fixed = choice.fixed_nnz(model, list(parts.candidates))
    if nnz is None and density is None:
        nnz = fixed
    budgets = _budgets(nnz, density, parts.numel)
    if fixed is not None and budgets != [fixed]:
        raise MaskError(
            f"selector {choice.method!r} keeps {fixed:,} entries by itself; leave nnz and density "
            f"out, which ask for {', '.join(f'{b:,}' for b in budgets)}."
        )
    common = _Common(model, parts, l1, source_adapters, seed, theta0)
    if base_name is None:
        base_name = getattr(getattr(model, "config", None), "name_or_path", None) or None
    settings = {
        # Sizes on a shared dense phase are independent of each other: one more is no other run.
        **({} if phase1 is not None else {"nnz": budgets}),
        "iterations": iterations,
        "selector": choice.method,
        "scope": scope,
        "selector_options": {k: _recorded(v) for k, v in choice.options.items()},
        **common.settings,
        "adapter_name": adapter_name,
        "base_name": base_name,
        "metadata": dict(metadata or {}),
    }
    shared = None if phase1 is None else Phase1.of(phase1, settings)
    if shared is not None and shared.folder.resolve() == Path(output_dir).resolve():
        raise ValueError(
            f"phase1 and output_dir are the same folder, {str(output_dir)!r}; give the run an "
            "output_dir of its own beside the dense phase that it shares."
        )
    with _opened(
        make_trainer, common, Path(output_dir), settings, resume=resume, iterations=iterations,
        choice=choice, phase1=shared,
    ) as run:  # fmt: skip

        def finish(adapter: Adapter, budget: int) -> Adapter:
            extra = {
                "l1": common.settings["l1"],
                "iterations": iterations,
                "scope": scope,
                **({"selector_options": settings["selector_options"]} if choice.options else {}),
                **(metadata or {}),
            }
            about = dataclasses.replace(
                adapter.metadata,
                base_name=base_name,
                method=f"lottery_ticket/{choice.method}",
                density=budget / parts.numel,
                seed=seed,
                parents=tuple(a.digest for a, _ in common.sources),
                extra={**adapter.metadata.extra, **extra},
            )
            return Adapter(
                adapter.diffs, name=adapter_name, dense=dict(adapter.dense), metadata=about
            )

        results = run.results(budgets, finish)
    return results[0] if single else results


def dense_phase(
    make_trainer: MakeTrainer,
    model: nn.Module,
    *,
    output_dir: str | Path,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    full_params: Sequence[str] = (),
    l1: float = 0.0,
    source_adapters: Sequence[SourceAdapter] = (),
    seed: int = 0,
    resume: bool = True,
    metadata: Mapping[str, Any] | None = None,
    theta0: str | Path | None = None,
) -> Path:
    """Run phase 1 alone: full fine-tuning, for `lottery_ticket` s that share it by ``phase1=``.

    Args:
        make_trainer, model, include, exclude, full_params, source_adapters, seed, resume, theta0:
            as in `lottery_ticket`.
        output_dir: folder of the run; the same call goes on from whatever it finds there.
        l1: strength of the penalty on the difference.
        metadata: JSON; runs whose own has another ``"data"`` are refused the phase.

    Returns:
        The safetensors file with the result.

    Raises:
        ResumeError, NonFiniteLossError, DataError, MaskError: as `lottery_ticket`.
    """
    refuse_unconnected("dense_phase")
    parts = Trainables.of(model, include=include, exclude=exclude, full_params=full_params)
    common = _Common(model, parts, l1, source_adapters, seed, theta0)
    settings = {"phase": "dense", **common.settings, "metadata": dict(metadata or {})}
    result = Path(output_dir) / f"{DENSE}.safetensors"
    with _opened(make_trainer, common, Path(output_dir), settings, resume=resume) as run:
        if not run.state.done(DENSE):
            run.dense_phase(0, None)
    if not result.is_file():
        raise ResumeError(
            f"{result} is gone but the run had finished; put it back, or delete {output_dir} to "
            "train it anew."
        )
    return result


def _recorded(value: Any) -> Any:
    """Return an option as the state file can hold it; what JSON cannot hold, by its kind."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return f"({type(value).__name__})"


class _Common:
    """The arguments that all phases of a run share, checked."""

    def __init__(
        self,
        model: nn.Module,
        parts: Trainables,
        l1: float | tuple[float, float],
        source_adapters: Sequence[SourceAdapter],
        seed: int,
        theta0: str | Path | None,
    ) -> None:
        penalties = l1 if isinstance(l1, tuple) else (l1, l1)
        if len(penalties) != 2 or any(p < 0 for p in penalties):
            raise ValueError(
                f"l1 must be a number >= 0 or one for each of the two phases, got {l1!r}."
            )
        self.model, self.parts, self.seed = model, parts, seed
        self.l1 = (float(penalties[0]), float(penalties[1]))
        self.sources = [s if isinstance(s, tuple) else (s, 1.0) for s in source_adapters]
        self.theta0 = None if theta0 is None else Path(theta0)
        self.settings: dict[str, Any] = {
            "candidates": sorted(parts.candidates),
            "full_params": sorted(parts.full),
            "l1": list(penalties),
            "source_adapters": [[a.digest, float(c)] for a, c in self.sources],
            "seed": seed,
            "base": base_digest(parts),
        }


@contextmanager
def _opened(
    make_trainer: MakeTrainer,
    common: _Common,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    iterations: int = 1,
    choice: MaskChoice | None = None,
    phase1: Phase1 | None = None,
) -> Iterator[TicketRun]:
    """Hold a run's folder and state, with the sources applied; the model is put back at the end."""
    model = common.model
    with ExitStack() as stack:
        ranks = Ranks(None)
        with ranks.lead_first(f"{folder} is opened"):
            if ranks.leads:
                stack.enter_context(exclusive(folder))
                if not resume:
                    _forget(folder)
            # Until masks are chosen, how they are is open: a dense phase need not run again for it.
            chosen = any(folder.glob("iteration-*/masks-nnz-*"))
            state = RunState(
                folder / "state.json",
                settings,
                free=() if chosen else MASK_KEYS,
                writes=ranks.leads,
            )
        stack.enter_context(saved_training_mode(model))
        if common.sources:
            from sparseft.composition import Composer

            composer = Composer(model)
            names = []
            for i, (source, _) in enumerate(common.sources):
                names.append(f"source-{i}-{source.name}")
                composer.add(names[-1], source)
            composer.apply(dict(zip(names, (c for _, c in common.sources), strict=True)))
            stack.callback(composer.revert)
        run = TicketRun(
            make_trainer=make_trainer,
            model=model,
            parts=common.parts,
            folder=folder,
            state=state,
            iterations=iterations,
            l1=common.l1,
            seed=common.seed,
            choice=choice or MaskChoice(),
            phase1=phase1,
            ranks=ranks,
        )
        with ranks.lead_first("the base is written"):
            run.remember_theta0(common.theta0)
        stack.callback(run.rewind_to_base)
        yield run


def _several(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _budgets(
    nnz: int | Sequence[int] | None, density: float | Sequence[float] | None, numel: int
) -> list[int]:
    """Return the sizes of the masks, each of at least one entry and all different."""
    name, given = ("nnz", nnz) if density is None else ("density", density)
    wanted = list(cast(Sequence[Any], given)) if _several(given) else [given]
    if not wanted:
        raise MaskError(f"the list of {name} is empty; wanted at least one.")
    counts = []
    for value in wanted:
        asked = {"nnz": nnz, "density": density} | {name: value}
        count = total_nnz(**asked, candidates=numel, of=numel, of_what="candidate entries")
        if count == 0:
            raise MaskError(f"{name}={value!r} keeps no entry; there is nothing to train.")
        counts.append(count)
    if len(set(counts)) != len(counts):
        raise MaskError(f"two of the budgets are the same number of entries: {counts}.")
    return counts


def _forget(folder: Path) -> None:
    """Delete what a run writes, and nothing else that may lie in the folder."""
    for name in ("state.json", "theta0.safetensors"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("iteration-*"):
        shutil.rmtree(path)
