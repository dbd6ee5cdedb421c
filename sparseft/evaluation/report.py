"""Results of a study: rows of scores, their summary over seeds and languages, their files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sparseft._text import did_you_mean
from sparseft.errors import DataError
from sparseft.io.atomic import atomic_write_text

__all__ = ["Cell", "Gain", "Result", "Results", "SettingSummary"]

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One score.

    Args:
        setting: what was evaluated: ``task``, ``task + language``, ``full fine-tuning``, ...
        language: code of the language.
        seed: seed of the run.
        metric: name of the score.
        value: the score, in [0, 1].
        split: data split.
        task: name of the task.
        n: number of examples.
        density: density of the adapters, None for dense runs.
    """

    setting: str
    language: str
    seed: int
    metric: str
    value: float
    split: str = "test"
    task: str = ""
    n: int | None = None
    density: float | None = None


@dataclass(frozen=True)
class Cell:
    """Mean over seeds, and their sample standard deviation (None for one seed)."""

    mean: float
    sd: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """Return the cell of one value per seed."""
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, len(values))


@dataclass(frozen=True)
class SettingSummary:
    """One setting over all languages.

    Args:
        languages: language -> cell, in the order of the results; the source language included.
        mean: over the languages other than the source: mean of their means; the deviation is that
            of the per-seed means, over the seeds that have every language.
        worst: the language other than the source with the lowest mean.
        gap: mean of the source language minus ``mean``; None without the source language.
    """

    setting: str
    density: float | None
    languages: dict[str, Cell]
    mean: Cell | None
    worst: str | None
    gap: float | None
    source: str | None

    @property
    def label(self) -> str:
        """Setting and, where there is one, density."""
        return self.setting if self.density is None else f"{self.setting} @ {self.density:.4g}"


@dataclass(frozen=True)
class Gain:
    """Paired difference of two settings: the same seeds and languages in both.

    Args:
        languages: language -> mean difference over the shared seeds.
        mean: mean over languages.
        standard_error: of that mean, over languages; None for a single language.
        pairs: number of (language, seed) pairs.
    """

    setting: str
    baseline: str
    languages: dict[str, float]
    mean: float
    standard_error: float | None
    pairs: int


@dataclass
class Results:
    """Scores with what made them.

    Args:
        rows: the scores.
        source_language: the language the task was trained in; its scores set the gap.
        provenance: versions, commit, seeds, recipe (see ``sparseft.evaluation.provenance``).
        title: heading of the report.
    """

    rows: list[Result] = field(default_factory=list)
    source_language: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    title: str = "Results"

    def add(self, row: Result | None = None, **values: Any) -> Result:
        """Append a row, given whole or by its fields, and return it.

        Raises:
            DataError: a value that is not finite; a second value for the same cell and seed.
        """
        row = row or Result(**values)
        if not math.isfinite(row.value):
            raise DataError(f"{row.metric} of {row.setting}, {row.language} is {row.value}.")
        for old in self.rows:
            if _key(old) == _key(row):
                raise DataError(
                    f"{row.metric} of {row.setting}, {row.language}, seed {row.seed} is there "
                    "already "
                    f"({old.value:.4f}; new {row.value:.4f})."
                )
        self.rows.append(row)
        return row

    def extend(self, rows: Iterable[Result]) -> None:
        """Append rows, as ``add`` does."""
        for row in rows:
            self.add(row)

    @property
    def metrics(self) -> list[str]:
        """Names of the scores present, in order of appearance."""
        return list(dict.fromkeys(r.metric for r in self.rows))

    def languages(self) -> list[str]:
        """Return the languages present, the source first, the others in order of appearance."""
        found = list(dict.fromkeys(r.language for r in self.rows))
        return sorted(found, key=lambda code: code != self.source_language)

    def _metric(self, metric: str | None) -> str:
        if not self.rows:
            raise DataError("no results to report.")
        metric = metric or self.metrics[0]
        if metric not in self.metrics:
            raise DataError(
                f"no metric {metric!r} in the results.{did_you_mean(metric, self.metrics)} "
                f"There is {', '.join(self.metrics)}."
            )
        return metric

    def _table(self, metric: str) -> dict[tuple[str, float | None], dict[str, dict[int, float]]]:
        table: dict[tuple[str, float | None], dict[str, dict[int, float]]] = {}
        for row in self.rows:
            if row.metric == metric:
                cells = table.setdefault((row.setting, row.density), {})
                cells.setdefault(row.language, {})[row.seed] = row.value
        return table

    def summary(self, metric: str | None = None) -> list[SettingSummary]:
        """Return one summary a setting, in order of appearance; the first metric by default."""
        metric = self._metric(metric)
        out = []
        for (setting, density), by_language in self._table(metric).items():
            order = [code for code in self.languages() if code in by_language]
            cells = {code: Cell.of(list(by_language[code].values())) for code in order}
            targets = [code for code in order if code != self.source_language]
            mean = worst = gap = None
            if targets:
                complete = set.intersection(*(set(by_language[c]) for c in targets))
                per_seed = [
                    statistics.fmean(by_language[c][s] for c in targets) for s in sorted(complete)
                ]
                sd = statistics.stdev(per_seed) if len(per_seed) > 1 else None
                mean = Cell(statistics.fmean(cells[c].mean for c in targets), sd, len(complete))
                worst = min(targets, key=lambda c: cells[c].mean)
                if self.source_language in cells:
                    gap = cells[self.source_language].mean - mean.mean
            out.append(
                SettingSummary(setting, density, cells, mean, worst, gap, self.source_language)
            )
        return out

    def gain(
        self,
        setting: str,
        baseline: str,
        metric: str | None = None,
        *,
        languages: Iterable[str] | None = None,
        density: float | None = None,
    ) -> Gain:
        """Return how much ``setting`` improves on ``baseline``, paired by language and seed.

        Args:
            setting, baseline: names of settings in the results.
            metric: name of the score; None takes the first.
            languages: those compared; None takes all but the source language.
            density: compares the rows of this density (a dense baseline has None and is kept);
                needed where a setting occurs with several.

        Raises:
            DataError: an unknown setting, several densities, nothing to pair.
        """
        metric = self._metric(metric)
        table = self._table(metric)

        def column(name: str) -> dict[str, dict[int, float]]:
            found = {d: v for (s, d), v in table.items() if s == name}
            if not found:
                names = list(dict.fromkeys(s for s, _ in table))
                raise DataError(
                    f"no setting {name!r} in the results.{did_you_mean(name, names)} "
                    f"There is {', '.join(names)}."
                )
            if density is not None and density in found:
                return found[density]
            if len(found) > 1:
                raise DataError(f"{name!r} has densities {sorted(map(str, found))}; give density.")
            return next(iter(found.values()))

        a, b = column(setting), column(baseline)
        wanted = (
            [c for c in self.languages() if c != self.source_language]
            if languages is None
            else list(languages)
        )
        per_language: dict[str, float] = {}
        pairs = 0
        for code in wanted:
            seeds = sorted(set(a.get(code, {})) & set(b.get(code, {})))
            if seeds:
                per_language[code] = statistics.fmean(a[code][s] - b[code][s] for s in seeds)
                pairs += len(seeds)
        if not per_language:
            raise DataError(f"{setting!r} and {baseline!r} share no language and seed.")
        values = list(per_language.values())
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return Gain(setting, baseline, per_language, statistics.fmean(values), error, pairs)

    def composed_gains(self, metric: str | None = None) -> list[tuple[float | None, Gain]]:
        """Return (density, gain) of each composed setting ``X + ...`` over ``X`` alone."""
        metric = self._metric(metric)
        table = self._table(metric)
        out = []
        for setting, density in table:
            baseline = setting.partition(" + ")[0]
            codes = set(table.get((baseline, density), ())) & set(table[setting, density])
            if baseline != setting and codes - {self.source_language}:
                out.append((density, self.gain(setting, baseline, metric, density=density)))
        return out

    def to_dict(self) -> dict[str, Any]:
        """Return rows, summaries and provenance as plain data."""
        return {
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "source_language": self.source_language,
            "seeds": sorted({r.seed for r in self.rows}),
            "provenance": self.provenance,
            "summary": {
                metric: [{**asdict(s), "label": s.label} for s in self.summary(metric)]
                for metric in self.metrics
            },
            "gains": {
                metric: [{**asdict(g), "density": d} for d, g in self.composed_gains(metric)]
                for metric in self.metrics
            },
            "rows": [asdict(row) for row in self.rows],
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON text; the same results give the same bytes."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Return results written by ``to_json``.

        Raises:
            DataError: not JSON, or not of this format.
        """
        try:
            data = json.loads(text)
            if data["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"results of format {data['format_version']}, not {FORMAT_VERSION}."
                )
            known = {f.name for f in fields(Result)}
            rows = [Result(**{k: v for k, v in r.items() if k in known}) for r in data["rows"]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"not a results file of sparseft ({type(error).__name__}: {error})."
            ) from None
        return cls(rows, data["source_language"], data["provenance"], data["title"])

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Return the results in a file written by ``save``."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path}: no such results file.") from None

    def to_markdown(self, metric: str | None = None) -> str:
        """Return the report as Markdown: a table for each metric (or one), and what made it."""
        from sparseft.evaluation.markdown import results_markdown

        return results_markdown(self, [self._metric(metric)] if metric else self.metrics)

    def to_png(self, path: str | Path, metric: str | None = None) -> None:
        """Write a plot of one metric (the first by default): languages, settings, deviations."""
        from sparseft.evaluation.plot import plot_results

        plot_results(self, path, self._metric(metric))

    def save(self, folder: str | Path, name: str = "results", *, plot: bool = True) -> list[Path]:
        """Write ``name.json``, ``name.md`` and, with ``plot``, ``name.png`` into a folder, and
        return the paths.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        endings = (".json", ".md", ".png") if plot else (".json", ".md")
        paths = [folder / f"{name}{ending}" for ending in endings]
        atomic_write_text(paths[0], self.to_json())
        atomic_write_text(paths[1], self.to_markdown())
        if plot:
            self.to_png(paths[2])
        return paths


def _key(row: Result) -> tuple[Any, ...]:
    return (row.task, row.split, row.setting, row.density, row.language, row.seed, row.metric)
