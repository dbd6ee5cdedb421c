"""Methods against a baseline, paired by language and seed: differences, tests, table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparseft._text import did_you_mean
from sparseft.errors import DataError
from sparseft.evaluation.markdown import cell_text, escape
from sparseft.evaluation.report import Cell, Results, SettingSummary

__all__ = [
    "Comparison",
    "compare",
    "comparison_markdown",
    "mean_cell",
    "sign_flip_p",
    "student_p",
]

# Pairs up to which every assignment of signs is looked at: 2**16 sums.
_EXACT = 16
_DRAWS = 1 << 16


@dataclass(frozen=True)
class Comparison:
    """A method minus the baseline at one density, over languages other than the source.

    Args:
        setting, baseline, density: what is compared.
        mean: of the differences, languages first, then seeds.
        sd: sample standard deviation of the differences; None for one pair.
        pairs: number of (language, seed) pairs; ``won`` of them favour the method, ties half.
        p_pairs: two-sided sign-flip test over the pairs. Pairs of one seed share a training run,
            so it speaks of these runs, not of new seeds.
        p_seeds: two-sided paired t-test over the seeds' means; None for one seed, and for means
            that are all the same.
    """

    setting: str
    baseline: str
    density: float | None
    mean: float
    sd: float | None
    pairs: int
    won: float
    p_pairs: float
    p_seeds: float | None


def compare(results: Results, baseline: str, metric: str | None = None) -> list[Comparison]:
    """Compare every setting with ``baseline`` at the same density, or at its own if it has none.

    Args:
        results: scores; the source language is left out unless it is the only one.
        baseline: a setting.
        metric: name of the score; None takes the first.

    Raises:
        DataError: no such setting.
    """
    metric = metric or results.metrics[0]
    scores: dict[tuple[str, float | None], dict[tuple[int, str], float]] = {}
    targets = [c for c in results.languages() if c != results.source_language]
    for row in results.rows:
        if row.metric == metric and (row.language in targets or not targets):
            scores.setdefault((row.setting, row.density), {})[row.seed, row.language] = row.value
    names = list(dict.fromkeys(setting for setting, _ in scores))
    if not any(baseline == name.partition(" + ")[0] for name in names):
        raise DataError(
            f"no setting {baseline!r} in the results.{did_you_mean(baseline, names)} "
            f"There is {', '.join(names)}."
        )
    out = []
    for (setting, density), found in scores.items():
        _, plus, rest = setting.partition(" + ")
        like = baseline + plus + rest  # composed settings with the baseline's own composition
        if setting == like:
            continue
        against = [density] if density is not None else [d for s, d in scores if s == like]
        for other in against:
            base = scores.get((like, other), {})
            shared = sorted(set(found) & set(base))
            if shared:
                differences = {key: found[key] - base[key] for key in shared}
                out.append(_comparison(setting, like, other, differences))
    return out


def _comparison(
    setting: str,
    baseline: str,
    density: float | None,
    differences: dict[tuple[int, str], float],
) -> Comparison:
    values = list(differences.values())
    seeds = sorted({seed for seed, _ in differences})
    means = [
        statistics.fmean(d for (s, _), d in differences.items() if s == seed) for seed in seeds
    ]
    return Comparison(
        setting=setting,
        baseline=baseline,
        density=density,
        mean=statistics.fmean(means),
        sd=statistics.stdev(values) if len(values) > 1 else None,
        pairs=len(values),
        won=sum((d > 0) + 0.5 * (d == 0) for d in values),
        p_pairs=sign_flip_p(values),
        p_seeds=student_p(means) if len(means) > 1 else None,
    )


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return how often random signs give a mean as far from 0: a two-sided permutation test.

    Every assignment of signs is counted for up to 16 differences, 65,536 random ones (seeded)
    beyond, the observed one included.

    Example:
        >>> sign_flip_p([1.0, 2.0, 3.0])
        0.25
    """
    values = torch.tensor(list(differences), dtype=torch.float64)
    n = values.numel()
    if n <= _EXACT:
        numbers = torch.arange(2**n)[:, None] >> torch.arange(n)
        signs = 1.0 - 2.0 * (numbers & 1).double()
    else:
        generator = torch.Generator().manual_seed(0)
        signs = 1.0 - 2.0 * torch.randint(2, (_DRAWS, n), generator=generator).double()
        signs[0] = 1.0
    sums = (signs @ values).abs()
    # Sums that differ by rounding only are ties.
    least = abs(float(values.sum())) - 1e-12 * float(values.abs().sum())
    return float((sums >= least).double().mean())


def student_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of a t-test that the mean of differences is 0; None where they
    do not differ from each other beyond rounding, as a t-test then says nothing.

    Degrees of freedom are whole, so the distribution is a finite sum: Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    Example:
        >>> round(student_p([1.0, 2.0, 3.0]), 4)
        0.0742
    """
    n = len(differences)
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    if sd <= 1e-12 * max(map(abs, differences)):
        return None
    df = n - 1
    theta = math.atan(abs(mean) / (sd / math.sqrt(n)) / math.sqrt(df))
    c, s = math.cos(theta), math.sin(theta)
    if df % 2:
        term = c
        total = 0.0
        for k in range(1, df, 2):
            total += term
            term *= c * c * (k + 1) / (k + 2)
        inside = 2 / math.pi * (theta + s * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, df, 2):
            total += term
            term *= c * c * (k + 1) / (k + 2)
        inside = s * total
    return min(1.0, max(0.0, 1.0 - inside))


def comparison_markdown(results: Results, baseline: str, metric: str | None = None) -> str:
    """Return two tables: methods by density, and their paired differences from the baseline."""
    metric = metric or results.metrics[0]
    summaries = results.summary(metric)
    densities = sorted({s.density for s in summaries if s.density is not None})
    columns: list[float | None] = [*densities]
    if any(s.density is None for s in summaries):
        columns.append(None)
    heads = ["all weights" if d is None else f"{100 * d:g} %" for d in columns]
    targets = [c for c in results.languages() if c != results.source_language]
    over = "the languages other than the source" if targets else "the source language"
    labels: dict[str, str] = {}
    for s in summaries:
        own = [code for code in s.languages if code in targets]
        few = f" ({', '.join(own)})" if own and own != targets else ""
        labels[s.setting] = escape(s.setting) + few
    cells = {(s.setting, s.density): mean_cell(s) for s in summaries}
    out = [
        f"{metric} x 100, mean over {over}; ± standard deviation over seeds.",
        "",
        "| method | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, label in labels.items():
        row = [cell_text(cells.get((name, d))) for d in columns]
        out.append(f"| {label} | " + " | ".join(row) + " |")
    out += [
        "",
        f"Against {escape(baseline)} at the same density (composed with composed), paired by "
        "language and seed. p (pairs): sign-flip test over all pairs, which share a training run "
        "by seed; p (seeds): t-test over the seeds' means.",
        "",
        "| method | density | difference | sd of pairs | pairs won | p (pairs) | p (seeds) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in compare(results, baseline, metric):
        density = "-" if c.density is None else f"{100 * c.density:g} %"
        sd = "-" if c.sd is None else f"{100 * c.sd:.1f}"
        out.append(
            f"| {escape(c.setting)} | {density} | {100 * c.mean:+.1f} | {sd} | {c.won:g} of "
            f"{c.pairs} | {_p_text(c.p_pairs)} | {_p_text(c.p_seeds)} |"
        )
    return "\n".join(out) + "\n"


def _p_text(p: float | None) -> str:
    if p is None:
        return "-"
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def mean_cell(summary: SettingSummary) -> Cell | None:
    """Return a setting's mean over the target languages; with only the source scored, its own."""
    if summary.mean is None and summary.source in summary.languages:
        return summary.languages[summary.source]
    return summary.mean
