"""The embedded study, end to end: sparse diffs for a task and for languages, composed and scored.

Task diffs are learned on labelled English names, language diffs on each language's raw text;
nothing labelled in a target language is ever read before the scores. What is compared is told in
`scoring`; plain and denoised masks are chosen from the same dense phases, except that the task diff
on top of English has the English diff of its own kind beneath, and hence a dense phase of its own.

Everything is ordinary use of the engine: `lottery_ticket`, `Composer`, `sparseft.evaluation`.

On disk (``output_dir``)::

    results.json results.md results.png
    adapters/seed-0/fi-0.1/adapter.safetensors ... fi-denoised-0.1/ ...
    runs/                                          state of the trainings; a re-run goes on from it
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparseft.adapter import Adapter
from sparseft.demo.encoder import (
    ASSETS,
    load_classifier,
    load_provenance,
    load_tokenizer,
)
from sparseft.demo.names import SHOWN, SOURCE, Split, babel_version, names, names_digest
from sparseft.demo.parts import KINDS, Found, Kind, Part, Workers, default_workers
from sparseft.demo.recipe import DemoRecipe
from sparseft.demo.scoring import Scorer, held_out_examples
from sparseft.demo.show import Display, peak_rss
from sparseft.demo.training import PhaseState
from sparseft.evaluation.provenance import provenance
from sparseft.evaluation.report import Results
from sparseft.modules.ranks import refuse_several
from sparseft.selection import Masks

__all__ = ["AdapterFile", "DemoResult", "run_demo"]


@dataclass(frozen=True)
class AdapterFile:
    """A saved adapter: what it holds and what it weighs.

    Args:
        shared: share of its entries that the plain mask of the same dense phase has too; None for a
            plain adapter, and for one with a dense phase of its own.
    """

    name: str
    seed: int
    density: float
    nnz: int
    file_bytes: int
    path: Path
    shared: float | None = None


@dataclass
class DemoResult:
    """What the demo found.

    Args:
        results: every score, with provenance.
        adapters: every adapter file.
        state: bytes of gradients, optimizer state and diff, the largest of each kind of phase.
        peak_rss: peak resident memory of the process in bytes, None where the system does not say.
        seconds: wall-clock time of this call (a resumed run counts only its own part).
        files: ``results.json``, ``results.md``, ``results.png``.
    """

    results: Results
    adapters: list[AdapterFile] = field(default_factory=list)
    state: dict[str, PhaseState] = field(default_factory=dict)
    peak_rss: int | None = None
    seconds: float = 0.0
    files: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    """What the parts of one run share."""

    recipe: DemoRecipe
    languages: tuple[str, ...]
    densities: tuple[float, ...] | None
    output_dir: Path
    assets: Path
    tokenizer: Any
    display: Display
    result: DemoResult
    split: Split
    full: bool
    workers: int

    @property
    def task_densities(self) -> tuple[float, ...]:
        return self.densities or (self.recipe.task.density,)

    @property
    def language_densities(self) -> tuple[float, ...]:
        return self.densities or (self.recipe.language.density,)


def run_demo(
    *,
    full: bool = False,
    output_dir: str | Path = "sparseft-demo",
    seed: int = 0,
    quiet: bool = False,
    recipe: DemoRecipe | None = None,
    assets: Path = ASSETS,
    split: Split = "test",
    workers: int | None = None,
) -> DemoResult:
    """Run the study and return its result; the table is printed unless ``quiet``.

    Args:
        full: ten languages, three seeds, several densities, in place of four, one and one.
        output_dir: results, adapters and the state that an interrupted run goes on from.
        seed: the first seed.
        quiet: print nothing.
        recipe: another recipe than the shipped one (for trials).
        assets: another encoder than the shipped one.
        split: keys that are scored; "dev" is for choosing a recipe.
        workers: trainings that run at once, each in a process of one thread; None takes two where
            there are two cores. The bits do not depend on it.

    Raises:
        DataError: the assets do not fit together.
        ResumeError: ``output_dir`` holds a run of another recipe.
        SparseFtError: started as several processes.

    Numerics: the same seed gives the same bits on one machine, thread count and set of versions.
    """
    refuse_several("the demo", "Start it without the launcher; it starts processes of its own.")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the bits then depend on no number of cores
    try:
        return _study(
            full,
            Path(output_dir),
            seed,
            quiet,
            recipe or DemoRecipe.load(),
            assets,
            split,
            default_workers() if workers is None else workers,
        )
    finally:
        torch.set_num_threads(before)


def _study(
    full: bool,
    output_dir: Path,
    seed: int,
    quiet: bool,
    recipe: DemoRecipe,
    assets: Path,
    split: Split,
    workers: int,
) -> DemoResult:
    began = time.monotonic()
    cover = recipe.full if full else recipe.quick
    record = load_provenance(assets)
    results = Results(
        source_language=SOURCE,
        title=f"What kind of name is it? Zero-shot macro-F1, trained on {SOURCE} labels only",
        provenance=provenance(
            recipe=recipe.to_dict(),
            seed=seed,
            full=full,
            split=split,
            threads=torch.get_num_threads(),
            workers=workers,
            babel=babel_version(),
            names_as_pretrained=_names_agree(record),
            encoder={key: record[key] for key in ("parameters", "steps_done", "files")},
        ),
    )
    run = _Run(
        recipe=recipe,
        languages=cover.languages,
        densities=cover.densities or None,
        output_dir=output_dir,
        assets=assets,
        tokenizer=load_tokenizer(assets),
        display=Display(quiet=quiet),
        split=split,
        full=full,
        workers=workers,
        result=DemoResult(results),
    )
    run.display.intro(record, cover.languages, agree=results.provenance["names_as_pretrained"])
    try:
        with run.display.progress(_total_steps(run, cover.seeds)):
            for number in range(seed, seed + cover.seeds):
                _one_seed(run, number)
    except KeyboardInterrupt:
        run.display.interrupted(output_dir)
        raise
    result = run.result
    result.peak_rss = peak_rss()
    result.seconds = time.monotonic() - began
    results.provenance["adapters"] = _adapter_table(result.adapters)
    results.provenance["trained_state_bytes"] = {
        name: {"gradients": s.gradients, "optimizer": s.optimizer, "diff": s.diff}
        for name, s in sorted(result.state.items())
    }
    results.provenance["peak_rss_bytes"] = result.peak_rss
    results.provenance["seconds"] = round(result.seconds, 1)
    result.files = results.save(output_dir)
    run.display.outcome(result)
    return result


def _names_agree(record: dict[str, Any]) -> bool:
    """Return whether the installed CLDR names are those the encoder was pre-trained with."""
    return names_digest([SOURCE, *SHOWN]) == record["data"]["names_digest_source_and_shown"]


def _steps(run: _Run, part: Part) -> int:
    """Return the optimizer steps of a part."""
    phases = 1 + len(part.kinds) * len(part.densities)
    if part.language is not None:
        return run.recipe.language.steps * phases
    per_epoch = -(-len(names(SOURCE, "train")) // run.recipe.task.batch_size)
    return run.recipe.task.epochs * per_epoch * phases


def _total_steps(run: _Run, seeds: int) -> int:
    """Return the optimizer steps of the whole run."""
    nowhere = Path()
    parts = [Part(run.recipe, nowhere, nowhere, 0, run.task_densities)]
    parts += [
        Part(run.recipe, nowhere, nowhere, 0, (d,), kinds=(kind,))
        for d in run.task_densities
        for kind in KINDS
    ]
    parts += [
        Part(run.recipe, nowhere, nowhere, 0, run.language_densities, language=code)
        for code in (SOURCE, *run.languages)
    ]
    return seeds * sum(_steps(run, part) for part in parts)


def _one_seed(run: _Run, seed: int) -> None:
    """Train, compose and score with one seed."""

    def part(name: str, densities: tuple[float, ...], **more: Any) -> Part:
        folder = _state_folder(run, seed) / name
        return Part(run.recipe, run.assets, folder, seed, densities, **more)

    codes = (SOURCE, *run.languages)
    parts = {code: part(code, run.language_densities, language=code) for code in codes}
    task = part("task", run.task_densities)
    with Workers(run.workers, run.display.step) as workers:
        for queued in (parts[SOURCE], task, *(parts[code] for code in run.languages)):
            workers.start(queued)

        def finish(what: str, done: Part) -> Found:
            run.display.begin(f"seed {seed}: {done.name}")
            found, states = workers.finish(done)
            if run.workers > 1:
                run.display.advance(_steps(run, done))
            _note_states(run, what, states)
            for kind, results in found.items():
                for number, density in enumerate(done.densities):
                    plain = found["plain"][number] if "plain" in found else None
                    shared = None
                    if plain is not None and kind != "plain":
                        shared = _shared(results[number].masks, plain.masks)
                    _save(run, results[number].adapter, seed, density, shared)
            return found

        trained = {SOURCE: finish("language", parts[SOURCE])}
        over: dict[Kind, list[Part]] = {
            kind: [
                part(f"task-on-{SOURCE}-{d:g}", (d,), kinds=(kind,), source=beneath.path)
                for d, beneath in zip(run.task_densities, trained[SOURCE][kind], strict=True)
            ]
            for kind in KINDS
        }
        for each in over.values():
            for queued in each:
                workers.start(queued)
        alone = finish("task", task)
        for code in run.languages:
            trained[code] = finish("language", parts[code])
        on_source: Found = {
            kind: [finish("task", queued)[kind][0] for queued in each]
            for kind, each in over.items()
        }

    run.display.begin(f"seed {seed}: scores")
    classifier = load_classifier(run.assets, seed=seed)
    scorer = Scorer(
        results=run.result.results,
        tokenizer=run.tokenizer,
        examples={code: held_out_examples(code, run.split) for code in codes},
        split=run.split,
        seed=seed,
        language_coeff=run.recipe.compose.language_coeff,
    )
    densities = run.task_densities
    scorer.kinds(classifier, densities, alone=alone, on_source=on_source, languages=trained)
    dense = alone["plain"][0].dense_path
    if dense is not None:
        scorer.full_fine_tuning(classifier, dense)


def _state_folder(run: _Run, seed: int) -> Path:
    # a full run keeps other densities than a quick one, so they do not share trainings
    return run.output_dir / "runs" / f"{'full' if run.full else 'quick'}-seed-{seed}"


def _shared(masks: Masks, others: Masks) -> float:
    """Return the share of entries that other masks of the same size have too."""
    theirs = dict(others.items())
    common = sum(
        int(torch.isin(mine.indices, theirs[name].indices, assume_unique=True).sum())
        for name, mine in masks.items()
        if name in theirs
    )
    return common / masks.nnz


def _save(run: _Run, adapter: Adapter, seed: int, density: float, shared: float | None) -> None:
    folder = run.output_dir / "adapters" / f"seed-{seed}" / f"{adapter.name}-{density:g}"
    adapter.save(folder)
    path = folder / "adapter.safetensors"
    run.result.adapters.append(
        AdapterFile(adapter.name, seed, density, adapter.nnz, path.stat().st_size, path, shared)
    )


def _note_states(run: _Run, what: str, states: list[PhaseState]) -> None:
    for state in states:
        key = f"{what}, {state.name} phase"
        old = run.result.state.get(key)
        if old is None or state.total > old.total:
            run.result.state[key] = state


def _adapter_table(adapters: list[AdapterFile]) -> list[dict[str, Any]]:
    return [
        {
            "name": a.name,
            "seed": a.seed,
            "density": a.density,
            "nnz": a.nnz,
            "file_bytes": a.file_bytes,
            "shared_with_plain": a.shared,
        }
        for a in adapters
    ]
