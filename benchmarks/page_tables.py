"""Whole tables of the page, and the line that says where a file comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from page_figures import clock_of, number
from page_files import Files, PageError

from sparseft._text import human_bytes
from sparseft.benchmarking.results import markdown_table
from sparseft.benchmarking.rotation import spread
from sparseft.benchmarking.suite_report import show_spread, show_time

__all__ = ["TABLES", "memory_table"]

# Contenders that show how fast it could be at most, and do not do the work.
_FLOORS = ("copy", "frozen")


def table(files: Files, file: str, only: str = "*", clock: str = "") -> str:
    """All contenders of the cases that ``only`` fits, on their first clock or the one named."""
    cases = [case for case in files.cases(file) if fnmatchcase(case["name"], only)]
    if not cases:
        names = ", ".join(case["name"] for case in files.cases(file))
        raise PageError(f"no case fits {only!r}; there are: {names}")
    rows = [row for case in cases for row in _rows(case, clock)]
    columns = {
        "case": "case",
        "name": "contender",
        "time": "time (quartiles)",
        "ratio": "/ baseline (quartiles)",
        "GB/s": "GB/s (of a copy)",
        "TFLOP/s": "TFLOP/s (of a GEMM)",
        "peak": "peak memory",
    }
    for column in ("GB/s", "TFLOP/s", "peak"):
        if not any(row[column] for row in rows):
            del columns[column]
    return markdown_table(rows, columns).rstrip()


def _rows(case: Mapping[str, Any], clock: str) -> list[dict[str, str]]:
    if "contenders" not in case:
        return [_blank(case["name"], "", f"{case['status']}: {_short(case['reason'])}")]
    rows = []
    for row in case["contenders"]:
        timed = row.get("clocks", {}).get(clock) if clock else clock_of(row)
        if timed is None:
            why = row.get("reason", f"no {clock} clock")
            rows.append(_blank(case["name"], row["name"], f"{row['status']}: {_short(why)}"))
            continue
        speed = row.get("speed", {})
        rows.append(
            {
                "case": case["name"],
                "name": row["name"],
                "time": show_spread(timed["seconds"], show_time),
                "ratio": _ratio(case, row, timed),
                "GB/s": _share(speed, "GB/s", "% of copy"),
                "TFLOP/s": _share(speed, "TFLOP/s", "% of GEMM"),
                "peak": f"{number(row['facts']['peak MB'])} MB"
                if "peak MB" in row["facts"]
                else "",
            }
        )
    return rows


def _ratio(case: Mapping[str, Any], row: Mapping[str, Any], timed: Mapping[str, Any]) -> str:
    if "ratio" not in timed:
        return ""
    text = show_spread(timed["ratio"], "{:.3f}".format)
    against = row.get("against") or case["baseline"]
    return text if against in (case["baseline"], row["name"]) else f"{text} of {against}"


def _blank(case: str, name: str, reason: str) -> dict[str, str]:
    empty = dict.fromkeys(("ratio", "GB/s", "TFLOP/s", "peak"), "")
    return {"case": case, "name": name, "time": reason, **empty}


def _short(reason: str) -> str:
    # The last line of a traceback says what it was; all of it is in the JSON.
    return str(reason).strip().splitlines()[-1].replace("|", "/")[:160]


def _share(speed: Mapping[str, float], name: str, share: str) -> str:
    if name not in speed:
        return ""
    return number(speed[name]) + (f" ({speed[share]:.0f} %)" if share in speed else "")


def best(files: Files, file: str, only: str = "*") -> str:
    """Each row of ours beside the fastest of the others that do the same: a line an answer."""
    rows = []
    for case in files.cases(file):
        if not fnmatchcase(case["name"], only):
            continue
        timed = [row for row in case.get("contenders", ()) if clock_of(row) is not None]
        if not timed:
            rows.append(_answer(case["name"], time=_reason(case)))
        for row in timed:
            if row.get("ours"):
                others = [r for r in timed if not r.get("ours") and _comparable(r, row)]
                rows.append(_answer(case["name"], **_against(row, others)))
    if not rows:
        raise PageError(f"nothing of ours fits {only!r}")
    heads = {
        "case": "case",
        "ours": "ours",
        "time": "time",
        "theirs": "fastest of the others",
        "their time": "its time",
        "ratio": "ours / it (quartiles)",
        "GB/s": "GB/s (of a copy)",
        "TFLOP/s": "TFLOP/s (of a GEMM)",
    }
    return markdown_table(rows, heads).rstrip()


def _answer(case: str, **cells: str) -> dict[str, str]:
    names = ("ours", "time", "theirs", "their time", "ratio", "GB/s", "TFLOP/s")
    return {"case": case, **dict.fromkeys(names, ""), **cells}


def _reason(case: Mapping[str, Any]) -> str:
    return f"{case['status']}: {_short(case.get('reason', 'nothing was timed'))}"


def _comparable(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    if other["name"].startswith(_FLOORS):
        return False
    if other.get("work", "") != row.get("work", ""):
        return False
    return other["density"] is None or other["density"] == row["density"]


def _against(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, str]:
    clock, speed = clock_of(row) or {}, row.get("speed", {})
    cells = {
        "ours": row["name"],
        "time": show_time(clock["seconds"]["median"]),
        "GB/s": _share(speed, "GB/s", "% of copy"),
        "TFLOP/s": _share(speed, "TFLOP/s", "% of GEMM"),
    }
    if not others:
        return cells
    fastest = min(others, key=lambda r: (clock_of(r) or {})["seconds"]["median"])
    theirs = clock_of(fastest) or {}
    pairs = zip(clock["samples"], theirs["samples"], strict=True)
    ratios = spread([mine / other for mine, other in pairs])
    return cells | {
        "theirs": fastest["name"],
        "their time": show_time(theirs["seconds"]["median"]),
        "ratio": show_spread(ratios, "{:.3f}".format),
    }


def link(files: Files, file: str, text: str) -> str:
    """A link to a file that need not be there."""
    return f"[{text}](results/{file})"


def targets(files: Files, file: str) -> str:
    """What was aimed at and what was measured."""
    rows = []
    for case in files.cases(file):
        for target in case.get("targets", ()):
            measured = target["measured"]
            rows.append(
                {
                    "case": case["name"],
                    "what": target["what"],
                    "measured": "not measured" if measured is None else f"{measured:.3g}",
                    "met": {True: "yes", False: "no", None: ""}[target["met"]],
                }
            )
    heads = {"case": "case", "what": "target", "measured": "measured", "met": "met"}
    return markdown_table(rows, heads).rstrip() if rows else "No targets for this device."


def steps(files: Files, file: str, task: str = "*") -> str:
    """Training steps attached against dense with a mask."""
    rows = []
    for result in files.cases(file):
        case, ratio = result["case"], result["ratio"]
        if not fnmatchcase(case["task"], task):
            continue
        rows.append(
            {
                "task": case["task"],
                "batch": f"{case['batch']} x {case['length']}",
                "density": f"{100 * case['density']:g} %",
                "baseline": show_time(result["baseline_seconds"]["median"]),
                "ours": show_time(result["ours_seconds"]["median"]),
                "ratio": show_spread(ratio, "{:.3f}".format),
                "state": f"{100 * result['state_ratio']:.3g} %",
            }
        )
    if not rows:
        raise PageError(f"no task fits {task!r}")
    heads = {
        "task": "task",
        "batch": "batch x length",
        "density": "density",
        "baseline": "dense + mask",
        "ours": "attached",
        "ratio": "ratio (quartiles)",
        "state": "trained state",
    }
    return markdown_table(rows, heads).rstrip()


def precisions(files: Files, file: str) -> str:
    """Every way of `run.py amp`: how far from the reference, limits in brackets."""
    from amp_curves import table

    return table(files.document(file)["curves"]).rstrip()


def ranks(files: Files, file: str) -> str:
    """Small models on several ranks, predicted beside measured, of `run.py ranks`."""
    from run_ranks import measured_table

    return measured_table(files.document(file)["measured"])


def paper(files: Files, *names: str) -> str:
    """Large models on several ranks, predicted, of `run.py ranks`; of files that are there."""
    from run_ranks import paper_table

    there = [name for name in names if files.exists(name)]
    return paper_table([found for name in there for found in files.document(name)["paper"]])


def sweep(files: Files, file: str, *labels: str) -> str:
    """Methods by density, mean over the target languages; ``name=Label`` says it better."""
    from sparseft.evaluation.comparison import mean_cell
    from sparseft.evaluation.markdown import cell_text, escape

    named = dict(label.split("=", 1) for label in labels)
    summaries = files.scores(file).summary()
    densities = sorted({s.density for s in summaries if s.density is not None})
    cells = {(s.setting, s.density): cell_text(mean_cell(s)) for s in summaries}
    heads = [f"{100 * density:.4g} %" for density in densities]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in dict.fromkeys(s.setting for s in summaries if s.density is not None):
        row = [cells.get((name, density), "-") for density in densities]
        lines.append(f"| {escape(named.pop(name, name))} | " + " | ".join(row) + " |")
    if named:
        raise PageError(f"no such setting: {', '.join(named)}")
    return "\n".join(lines)


def profiles(files: Files, file: str) -> str:
    """Every model's memory and time, a heading each; `run.py profile` wrote the file."""
    parts = []
    document = files.document(file)
    for found in document.get("profiles") or document.get("memory") or ():
        work = found["workload"]
        what = f"{work['model']}, {work['dtype']}, {work['batch']} x {work['length']} tokens"
        parts.append(f"**{what}, {work['optimizer']}**")
        parts.append(found.get("reason") or memory_table(found))
    return "\n\n".join(parts)


def memory_table(found: Mapping[str, Any]) -> str:
    """What `profile_json` gave: peak by way, predicted and measured, and the time of a step."""
    rows = []
    for row in found["rows"]:
        predicted, measured = row["predicted"], row["measured"]
        known = measured or predicted or {}
        parts = [f"{name} {human_bytes(known[name])}" for name in known if name != "peak"]
        rows.append(
            {
                "way": row["label"],
                "trained": "" if row["trainable"] is None else f"{row['trainable']:,}",
                "predicted": _peak(predicted, row["not_predicted"]),
                "measured": _peak(measured, row["not_measured"]),
                "error": "" if row["error"] is None else f"{100 * row['error']:+.1f} %",
                "parts": ", ".join(parts),
                "time": "" if row["seconds"] is None else show_spread(row["seconds"], show_time),
                "tokens": ""
                if row["tokens_per_second"] is None
                else f"{row['tokens_per_second']:,.0f}",
            }
        )
    heads = {
        "way": "way",
        "trained": "trained",
        "predicted": "peak, predicted",
        "measured": "measured",
        "error": "error",
        "parts": "parts",
        "time": "step (quartiles)",
        "tokens": "tokens/s",
    }
    return markdown_table(rows, heads).rstrip()


def _peak(use: Mapping[str, int] | None, why: str) -> str:
    return _short(why or "not run") if use is None else human_bytes(use["peak"])


def source(files: Files, file: str) -> str:
    """Commit, machine, threads and versions, in one sentence's words."""
    document = files.document(file)
    made = document["provenance"]
    git = made.get("git")
    if git is None:
        commit = "no checkout"
    else:
        commit = git["sha"][:12] + (" with changes" if git["dirty"] else "")
    hardware = made.get("hardware", {})
    extra = document.get("suite", {})
    device = extra.get("device") or hardware.get("cpu") or made.get("processor", "unknown")
    device = device.removeprefix("cpu: ")
    threads = made.get("machine", {}).get("threads")
    versions = ", ".join(f"{key} {made['versions'][key]}" for key in _named(made["versions"]))
    parts = [device, f"commit {commit}", versions]
    if made.get("machine", {}).get("device", "cpu") == "cpu" and threads is not None:
        parts.insert(1, f"{threads} thread{'' if threads == 1 else 's'}")
    return "; ".join(parts)


def _named(versions: Mapping[str, str]) -> Sequence[str]:
    return [name for name in ("python", "torch", "transformers", "triton") if name in versions]


TABLES: dict[str, Callable[..., str]] = {
    "best": best,
    "link": link,
    "paper": paper,
    "precisions": precisions,
    "profile": profiles,
    "ranks": ranks,
    "source": source,
    "steps": steps,
    "sweep": sweep,
    "table": table,
    "targets": targets,
}
