"""What `run_suite` returned, as Markdown: where it ran, the targets, a table per case."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sparseft.benchmarking.results import machine, markdown_table
from sparseft.evaluation.provenance import provenance

__all__ = [
    "show_spread",
    "show_time",
    "show_times",
    "suite_markdown",
    "suite_source",
    "suite_table",
]

_TARGETS = {"case": "case", "what": "target", "measured": "measured", "met": "met"}
_ONE = {
    "case": "case",
    "name": "contender",
    "time": "time (quartiles)",
    "ratio": "/ baseline (quartiles)",
    "figures": "figures",
}
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def suite_source(
    device: torch.device, *, tiny: bool = False, commit: str | None = None
) -> dict[str, str]:
    """Return what made the figures, line by line: device, commit, versions.

    Args:
        device: the one the suite ran on.
        tiny: whether the shapes were.
        commit: as its owner states it, for code that was copied without its checkout.
    """
    source = provenance()
    git = source["git"]
    if git is not None:
        state = git["sha"] + (" (dirty)" if git["dirty"] else "")
    else:
        state = "no checkout" if commit is None else f"{commit} (as stated; no checkout here)"
    versions = dict(source["versions"])
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["peft"] = importlib.metadata.version("peft")
    here = machine()
    lines = {
        "device": f"cpu: {here['cpu']}, {here['cores']} cores",
        "threads": str(torch.get_num_threads()),
        "load average": "unknown"
        if here["load_average"] is None
        else f"{here['load_average']:.1f}",
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        lines = {
            "device": found.name,
            "memory": f"{found.total_memory / 2**30:.0f} GiB",
            "multiprocessors": str(found.multi_processor_count),
            "CUDA": torch.version.cuda or f"ROCm {torch.version.hip}",
        }
    lines |= {"commit": state, "versions": ", ".join(f"{k} {v}" for k, v in versions.items())}
    if tiny:
        lines["note"] = "a smoke test on tiny shapes: the figures mean nothing"
    return lines


def suite_markdown(results: Sequence[Mapping[str, Any]], source: Mapping[str, str]) -> str:
    """Return the report of what `run_suite` returned, with the lines of `suite_source` on top."""
    parts = ["".join(f"- {key}: {value}\n" for key, value in source.items()), _targets(results)]
    parts += [_case(result) for result in results if result["status"] != "not run"]
    missing = [f"- {r['name']}: {r['reason']}" for r in results if r["status"] == "not run"]
    if missing:
        parts.append("\n".join(["## Not run", *missing]) + "\n")
    return "\n".join(parts)


def suite_table(results: Sequence[Mapping[str, Any]], source: Mapping[str, str]) -> str:
    """Return all contenders of all cases in one table, with the lines of `suite_source` on top."""
    rows = []
    for result in results:
        if "contenders" not in result:
            rows.append(dict.fromkeys(_ONE, "") | _failed(result))
            continue
        clock = next((c for row in result["contenders"] for c in row.get("clocks", ())), "wall")
        for row in result["contenders"]:
            cells = _row(row, [clock], result["baseline"])
            rows.append(
                {
                    "case": result["name"],
                    "name": cells["name"],
                    "time": cells[f"{clock} time"],
                    "ratio": cells[f"{clock} ratio"],
                    "figures": cells["figures"],
                }
            )
    lines = "".join(f"- {key}: {value}\n" for key, value in source.items())
    return "\n".join([lines, _targets(results), markdown_table(rows, _ONE)])


def _failed(result: Mapping[str, Any]) -> dict[str, str]:
    return {"case": result["name"], "figures": f"**{result['status']}**: {result['reason']}"}


def _targets(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        {
            "case": result["name"],
            "what": target["what"],
            "measured": "not measured"
            if target["measured"] is None
            else f"{target['measured']:.3g}",
            "met": {True: "yes", False: "NO", None: ""}[target["met"]],
        }
        for result in results
        for target in result.get("targets", ())
    ]
    if not rows:
        return "## Targets\nNone judged: they are for other devices or shapes.\n"
    return "## Targets\n" + markdown_table(rows, _TARGETS)


def _case(result: Mapping[str, Any]) -> str:
    heading = f"## {result['name']}\n"
    if "contenders" not in result:
        return f"{heading}{result['status']}: {result['reason']}\n"
    notes = "".join(f"- {key}: {_number(value)}\n" for key, value in result["facts"].items())
    clocks = list(dict.fromkeys(c for row in result["contenders"] for c in row.get("clocks", ())))
    columns = {"name": "contender"}
    for clock in clocks:
        columns[f"{clock} time"] = f"{clock} time (quartiles)"
        columns[f"{clock} ratio"] = f"/ {result['baseline']} (quartiles)"
    columns |= {"host": "host time", "figures": "figures"}
    rows = [_row(row, clocks, result["baseline"]) for row in result["contenders"]]
    return f"{heading}{notes}\n{markdown_table(rows, columns)}"


def _row(row: Mapping[str, Any], clocks: Sequence[str], baseline: str) -> dict[str, str]:
    cells = {"name": row["name"], "host": ""}
    for clock in clocks:
        cells |= {f"{clock} time": "", f"{clock} ratio": ""}
        timed = row.get("clocks", {}).get(clock)
        if timed is None:
            continue
        cells[f"{clock} time"] = show_spread(timed["seconds"], show_time)
        cells["host"] = cells["host"] or show_time(timed["host_seconds"]["median"])
        if "ratio" in timed:
            cells[f"{clock} ratio"] = show_spread(timed["ratio"], lambda x: f"{x:.3f}")
            if row.get("against") not in (None, baseline, row["name"]):
                cells[f"{clock} ratio"] += f" of {row['against']}"
    known = {**row.get("speed", {}), **row["facts"]}
    figures = [f"{key} {_number(value)}" for key, value in known.items()]
    if row["status"] != "ok":
        # The last line of a traceback says what it was; all of it is in the JSON.
        reason = str(row["reason"]).splitlines()[-1].replace("|", "/")
        figures.insert(0, f"**{row['status']}**: {reason}")
    return cells | {"figures": "; ".join(figures)}


def show_spread(numbers: Mapping[str, float], show: Callable[[float], str]) -> str:
    """Return ``median (quartile1-quartile3)``."""
    low, high = show(numbers["quartile1"]), show(numbers["quartile3"])
    return f"{show(numbers['median'])} ({low}-{high})"


def show_time(seconds: float) -> str:
    """Return ``12.3 ms``."""
    size, unit = next((u for u in _UNITS if seconds >= u[0]), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def show_times(numbers: Mapping[str, float]) -> str:
    """Return ``12.3 ms (11.9-13)``: the unit once, for narrow tables."""
    size, unit = next((u for u in _UNITS if numbers["median"] >= u[0]), _UNITS[-1])
    middle, low, high = (numbers[key] / size for key in ("median", "quartile1", "quartile3"))
    return f"{middle:.3g} {unit} ({low:.3g}-{high:.3g})"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
