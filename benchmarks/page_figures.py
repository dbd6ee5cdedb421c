"""Single figures of the page: each function reads one number from one result file.

None: it was left out there (out of time, too little memory, a package not installed).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from page_files import Files, PageError

from sparseft.benchmarking.suite_report import show_time

__all__ = ["FIGURES", "clock_of", "number", "speed"]


def number(value: Any) -> str:
    """Return three digits, thousands with commas."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def clock_of(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first clock of a contender: the one of ratios; None if it was not timed."""
    return next(iter(row.get("clocks", {}).values()), None)


def speed(case: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Return how many times as fast as what it is held against: the median of rounds' ratios."""
    against = row.get("against") or case["baseline"]
    base = next((r for r in case["contenders"] if r["name"] == against), None)
    mine, theirs = clock_of(row), None if base is None else clock_of(base)
    if mine is None or theirs is None:
        return None
    rounds = zip(theirs["samples"], mine["samples"], strict=True)
    return statistics.median(other / own for other, own in rounds)


def figure(files: Files, file: str, name: str, contender: str, field: str) -> Any:
    case = files.case(file, name)
    if "contenders" not in case:
        return None
    rows = {row["name"]: row for row in case["contenders"]}
    if contender not in rows:
        raise PageError(f"no contender {contender!r}; there are: {', '.join(rows)}")
    row = rows[contender]
    clock = clock_of(row)
    if field in ("time", "seconds", "ratio", "speed"):
        if clock is None:
            return None
        if field in ("time", "seconds"):
            median = clock["seconds"]["median"]
            return median if field == "seconds" else show_time(median)
        if field == "speed":
            return speed(case, row)
        return clock["ratio"]["median"] if "ratio" in clock else None
    facts = {**case["facts"], **row["facts"], **row.get("speed", {})}
    if field not in facts:
        if clock is None:
            return None
        raise PageError(
            f"no fact {field!r}; there are: time, seconds, ratio, speed, {', '.join(facts)}"
        )
    return facts[field]


def value(files: Files, file: str, *keys: str) -> Any:
    found: Any = files.document(file)
    for key in keys:
        if isinstance(found, list):
            found = _pick(found, key)
        elif not isinstance(found, dict) or key not in found:
            have = ", ".join(found) if isinstance(found, dict) else type(found).__name__
            raise PageError(f"no key {key!r}; there are: {have}")
        else:
            found = found[key]
    if isinstance(found, dict | list):
        raise PageError(f"{'/'.join(keys)} is no single value")
    return found


def _pick(found: list[Any], key: str) -> Any:
    """Return one element by its number, or the one with all of ``a=1,b=2``; dots go deeper."""
    if key.isdigit() and int(key) < len(found):
        return found[int(key)]
    wanted = dict(part.split("=", 1) for part in key.split(",")) if "=" in key else {}
    if not wanted:
        raise PageError(f"{key!r}: a list of {len(found)} needs key=value")

    def holds(element: Any, name: str, text: str) -> bool:
        for part in name.split("."):
            if not isinstance(element, dict) or part not in element:
                return False
            element = element[part]
        return _text(element) == text

    chosen = [e for e in found if all(holds(e, name, text) for name, text in wanted.items())]
    if len(chosen) != 1:
        raise PageError(f"{len(chosen)} of {len(found)} elements have {key}; wanted one")
    return chosen[0]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def score(files: Files, file: str, setting: str, density: str, language: str) -> str:
    from sparseft.evaluation.markdown import cell_text

    summaries = files.scores(file).summary()
    for summary in summaries:
        if summary.setting == setting and _same(summary.density, density):
            cell = summary.mean if language == "mean" else summary.languages.get(language)
            if cell is None:
                raise PageError(f"no score of {language!r}: {', '.join(summary.languages)}, mean")
            return cell_text(cell)
    raise PageError(f"no such setting; there are: {', '.join(s.label for s in summaries)}")


def gain(files: Files, file: str, density: str, language: str = "mean") -> str:
    gains = files.scores(file).composed_gains()
    for at, found in gains:
        if _same(at, density):
            if language != "mean":
                return f"{100 * found.languages[language]:+.1f}"
            error = found.standard_error
            return f"{100 * found.mean:+.1f}" + (f" ± {100 * error:.1f}" if error else "")
    raise PageError(f"no gain at {density}; there are: {', '.join(str(at) for at, _ in gains)}")


def paired(
    files: Files, file: str, baseline: str, setting: str, density: str, field: str
) -> float | str:
    from sparseft.evaluation.comparison import compare

    for found in compare(files.scores(file), baseline):
        if found.setting == setting and _same(found.density, density):
            got = getattr(found, field, None)
            if got is None:
                raise PageError(f"no {field!r} of a comparison")
            return f"{100 * got:+.1f}" if field == "mean" else f"{got:.2g}"
    raise PageError(f"{setting!r} is not compared with {baseline!r} at {density}")


def _same(density: float | None, text: str) -> bool:
    if density is None or text == "-":
        return density is None and text == "-"
    return abs(density - float(text)) < 1e-6


FIGURES: dict[str, Callable[..., Any]] = {
    "figure": figure,
    "gain": gain,
    "paired": paired,
    "score": score,
    "value": value,
}
