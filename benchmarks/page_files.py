"""Result files as the page reads them: JSON, JSON lines, scores of studies."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Files", "PageError"]


_SPEEDS = ("GB/s", "% of copy", "TFLOP/s", "% of GEMM")


class PageError(ValueError):
    """A directive that cannot be filled."""


class Files:
    """The files of one folder, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.document = cache(self._document)
        self.scores = cache(self._scores)

    def exists(self, file: str) -> bool:
        return (self.root / file).is_file()

    def _document(self, file: str) -> dict[str, Any]:
        """Return a JSON file; of JSON lines, provenance of the first and ``cases``."""
        if not file.endswith(".jsonl"):
            return json.loads((self.root / file).read_text(encoding="utf-8"))
        from sparseft.benchmarking.records import read_records

        lines = read_records(self.root / file)
        if not lines:
            raise PageError(f"results/{file} is empty")
        return {"provenance": lines[0]["provenance"], "cases": _cases(lines)}

    def _scores(self, file: str) -> Any:
        """Return a study's `Results`."""
        from sparseft.evaluation.report import Results

        return Results.load(self.root / file)

    def cases(self, file: str) -> list[dict[str, Any]]:
        """Return what `run_suite` returned."""
        found = self.document(file).get("cases")
        if not isinstance(found, list):
            raise PageError(f"results/{file} has no cases")
        return found

    def case(self, file: str, name: str) -> dict[str, Any]:
        """Return one case by its name."""
        found = {case.get("name"): case for case in self.cases(file)}
        if name not in found:
            raise PageError(f"no case {name!r}; there are: {', '.join(map(str, found))}")
        return found[name]


def _cases(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines of `sparseft bench --json`, one a contender, as `run_suite` returns cases."""
    cases: dict[str, dict[str, Any]] = {}
    for line in lines:
        case = cases.setdefault(line["case"], {"name": line["case"], "status": "ok"})
        if line["contender"] is None:
            case |= {"status": line["status"], "reason": line["reason"]}
            continue
        case |= {"baseline": line["baseline"], "facts": line["case_facts"]}
        row = {key: line[key] for key in ("status", "reason", "ours", "density", "facts")}
        # Lines of before had no others than the baseline.
        row |= {"work": line.get("work", ""), "against": line.get("against", line["baseline"])}
        row |= {"name": line["contender"], "speed": {k: line[k] for k in _SPEEDS if k in line}}
        if line["clock"] is not None:
            seconds = {key: line[key] for key in ("median", "quartile1", "quartile3", "min")}
            clock = {"seconds": seconds, "samples": line["samples"]}
            if line["ratio"] is not None:
                clock["ratio"] = line["ratio"]
            row["clocks"] = {line["clock"]: clock}
        case.setdefault("contenders", []).append(row)
    return list(cases.values())
