"""Result files: JSON with provenance and a Markdown table.

A dirty tree or a failed check writes to ``scratch/``, which git ignores.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseft.evaluation.provenance import git_state, provenance
from sparseft.io.atomic import atomic_write_text

__all__ = ["machine", "markdown_table", "results_folder", "write_results"]


def _cpu_model() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def machine() -> dict[str, Any]:
    """Return the processor, its cores, and how busy it is (load average of one minute)."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "load_average": load}


def results_folder(root: str | Path, *, passed: bool) -> Path:
    """Return ``root``, or ``root/scratch`` after a failed check or in a changed checkout."""
    state = git_state()
    clean = state is not None and not state["dirty"]
    return Path(root) if passed and clean else Path(root) / "scratch"


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table; ``columns`` maps a key of the rows to its heading."""
    head = "| " + " | ".join(columns.values()) + " |"
    rule = "|" + "|".join("---" for _ in columns) + "|"
    body = ["| " + " | ".join(str(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join([head, rule, *body]) + "\n"


def write_results(folder: Path, name: str, payload: Mapping[str, Any], markdown: str) -> Path:
    """Write ``name.json`` (payload with provenance) and ``name.md``; return the JSON's path."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    document = {"provenance": provenance(hardware=machine()), **payload}
    path = folder / f"{name}.json"
    atomic_write_text(path, json.dumps(document, indent=1) + "\n")
    atomic_write_text(folder / f"{name}.md", markdown)
    return path
