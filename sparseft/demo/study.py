"""The embedded study, end to end: sparse diffs for a task and for languages, composed and scored.

Task diffs are learned on labelled English names, language diffs on each language's raw text;
nothing labelled in a target language is ever read before the scores. Three settings are compared:

* ``task``: the task diff alone, learned on the bare encoder;
* ``task + language``: the task diff learned on top of the English language diff, which is swapped
  for the target's (LT-SFT, section 3);
* ``full fine-tuning``: all weights trained on the task, on the bare encoder.

Everything is ordinary use of the engine: `lottery_ticket`, `Composer`, `sparseft.evaluation`.

On disk (``output_dir``)::

    results.json results.md results.png
    adapters/seed-0/fi-0.1/adapter.safetensors ...
    runs/                                          state of the trainings; a re-run goes on from it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft.adapter import Adapter
from sparseft.composition import Composer
from sparseft.data.classification import Example
from sparseft.demo.encoder import (
    ASSETS,
    load_classifier,
    load_provenance,
    load_tokenizer,
)
from sparseft.demo.names import CATEGORIES, SHOWN, SOURCE, Split, babel_version, names, names_digest
from sparseft.demo.parts import Part, Workers, default_workers
from sparseft.demo.recipe import DemoRecipe
from sparseft.demo.show import Display, peak_rss
from sparseft.demo.training import PhaseState
from sparseft.evaluation.evaluate import predict_logits
from sparseft.evaluation.metrics import accuracy, macro_f1
from sparseft.evaluation.provenance import provenance
from sparseft.evaluation.report import Results
from sparseft.training import LotteryTicketResult

__all__ = ["FULL_FT", "TASK", "TASK_LANGUAGE", "AdapterFile", "DemoResult", "run_demo"]

TASK, TASK_LANGUAGE, FULL_FT = "task", "task + language", "full fine-tuning"
_EVAL_BATCH = 64


@dataclass(frozen=True)
class AdapterFile:
    """A saved adapter: what it holds and what it weighs."""

    name: str
    seed: int
    density: float
    nnz: int
    file_bytes: int
    path: Path


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

    Numerics: the same seed gives the same bits on one machine, thread count and set of versions.
    """
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
    if part.language is not None:
        return run.recipe.language.steps * (1 + len(part.densities))
    per_epoch = -(-len(names(SOURCE, "train")) // run.recipe.task.batch_size)
    return run.recipe.task.epochs * per_epoch * (1 + len(part.densities))


def _total_steps(run: _Run, seeds: int) -> int:
    """Return the optimizer steps of the whole run."""
    nowhere = Path()
    parts = [Part(run.recipe, nowhere, nowhere, 0, run.task_densities)]
    parts += [Part(run.recipe, nowhere, nowhere, 0, (d,)) for d in run.task_densities]
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

        def finish(what: str, done: Part) -> list[LotteryTicketResult]:
            run.display.begin(f"seed {seed}: {done.name}")
            found, states = workers.finish(done)
            if run.workers > 1:
                run.display.advance(_steps(run, done))
            _note_states(run, what, states)
            for density, result in zip(done.densities, found, strict=True):
                _save(run, result.adapter, seed, density)
            return found

        trained = {SOURCE: finish("language", parts[SOURCE])}
        over = [
            part(f"task-on-{SOURCE}-{density:g}", (density,), source=beneath.path)
            for density, beneath in zip(run.task_densities, trained[SOURCE], strict=True)
        ]
        for queued in over:
            workers.start(queued)
        alone = finish("task", task)
        for code in run.languages:
            trained[code] = finish("language", parts[code])
        on_source = [finish("task", queued)[0] for queued in over]
    languages = {code: [r.adapter for r in found] for code, found in trained.items()}
    classifier = load_classifier(run.assets, seed=seed)

    run.display.begin(f"seed {seed}: scores")
    scorer = _Scorer(run, seed)
    coeff = run.recipe.compose.language_coeff
    for number, density in enumerate(run.task_densities):
        composer = Composer(classifier, {"task": alone[number].adapter})
        composer.apply({"task": 1.0})
        for code in languages:
            scorer.add(classifier, TASK, code, density)
        composer.revert()
        composer = Composer(
            classifier,
            {
                "task": on_source[number].adapter,
                **{code: found[number] for code, found in languages.items()},
            },
        )
        for code in languages:
            # the task diff was learned on top of the whole source diff, hence coefficient 1 there
            composer.switch({"task": 1.0, code: 1.0 if code == SOURCE else coeff})
            scorer.add(classifier, TASK_LANGUAGE, code, density)
        composer.revert()
    if alone[0].dense_path is not None:
        _load_dense(classifier, alone[0].dense_path)
        for code in languages:
            scorer.add(classifier, FULL_FT, code, None)


def _state_folder(run: _Run, seed: int) -> Path:
    # a full run keeps other densities than a quick one, so they do not share trainings
    return run.output_dir / "runs" / f"{'full' if run.full else 'quick'}-seed-{seed}"


class _Scorer:
    """Scores a classifier on a language's test names, into the run's results."""

    def __init__(self, run: _Run, seed: int) -> None:
        self.run, self.seed = run, seed
        codes = (SOURCE, *run.languages)
        self.examples = {code: held_out_examples(code, run.split) for code in codes}

    def add(self, model: nn.Module, setting: str, language: str, density: float | None) -> None:
        examples = self.examples[language]
        logits = predict_logits(
            model, self.run.tokenizer, examples, batch_size=_EVAL_BATCH, max_length=62
        )
        targets, predictions = [e.label for e in examples], logits.argmax(-1).tolist()
        scores: Sequence[tuple[str, Callable[..., float]]] = (
            ("macro_f1", macro_f1),
            ("accuracy", accuracy),
        )
        for metric, score in scores:
            self.run.result.results.add(
                setting=setting,
                language=language,
                seed=self.seed,
                metric=metric,
                value=score(targets, predictions),
                task="category of a CLDR name",
                n=len(examples),
                split=self.run.split,
                density=density,
            )


def held_out_examples(language: str, split: Split = "test") -> list[Example]:
    """Return a language's names of the test (or dev) keys, labelled."""
    return [
        Example(id=f"{key.category}/{key.key}", text=text, label=CATEGORIES.index(key.category))
        for key, text in names(language, split).items()
    ]


def _load_dense(model: nn.Module, path: Path) -> None:
    """Load the result of a dense phase (full fine-tuning) into the model."""
    from safetensors.torch import load_file

    with torch.no_grad():
        for name, tensor in load_file(path).items():
            model.get_parameter(name).copy_(tensor)


def _save(run: _Run, adapter: Adapter, seed: int, density: float) -> None:
    folder = run.output_dir / "adapters" / f"seed-{seed}" / f"{adapter.name}-{density:g}"
    adapter.save(folder)
    path = folder / "adapter.safetensors"
    run.result.adapters.append(
        AdapterFile(adapter.name, seed, density, adapter.nnz, path.stat().st_size, path)
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
        }
        for a in adapters
    ]
