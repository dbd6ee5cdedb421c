"""Pictures of the page, drawn from one result file each; the same file gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from page_files import Files, PageError
from pictures import memory_picture, stacked

__all__ = ["KINDS", "draw"]

# By kind: what it shows, as the page says it.
KINDS = {
    "speedup": "Times the speed of each case's baseline",
    "density": "Time against density",
    "roofline": "Roofline with the ceilings of the run",
    "scaling": "Time and memory against batch, width and density",
    "memory": "Peak memory of a step by its parts",
    "losses": "Loss in every precision, and its distance from dense-masked fp32",
}


def draw(files: Files, file: str, kind: str, path: Path) -> None:
    """Write the picture.

    Raises:
        PageError: no such kind, or nothing in the file to draw.
    """
    from sparseft.benchmarking import plots

    if kind == "memory":
        profiles = files.document(file).get("profiles", [])
        if stacked((memory_picture(found) for found in profiles), path) is None:
            raise PageError(f"results/{file} has nothing for a plot of {kind}")
        return
    if kind == "losses":
        from amp_curves import plot

        if plot(files.document(file).get("curves", []), path) is None:
            raise PageError(f"results/{file} has nothing for a plot of {kind}")
        return
    if kind == "scaling":
        from sparseft.benchmarking.scaling import scaling_plot

        if scaling_plot(files.cases(file), path) is None:
            raise PageError(f"results/{file} has nothing for a plot of {kind}")
        return
    by_kind = {
        "speedup": plots.plot_speedups,
        "density": plots.plot_density,
        "roofline": plots.plot_roofline,
    }
    if kind not in by_kind:
        raise PageError(f"no plot {kind!r}; there are: {', '.join(KINDS)}")
    if by_kind[kind](records(files, file), path) is None:
        raise PageError(f"results/{file} has nothing for a plot of {kind}")


def records(files: Files, file: str) -> list[dict[str, Any]]:
    """Return the lines of a `.jsonl` file, or those that its cases would be."""
    from sparseft.benchmarking.records import make_records, read_records

    if file.endswith(".jsonl"):
        return read_records(files.root / file)
    cases = files.cases(file)
    rows = [row for case in cases for row in case.get("contenders", ())]
    found = make_records(cases, files.document(file)["provenance"])
    if not any("ours" in row for row in rows):
        # Results from before rows said whose they are: only ours were checked against a definition.
        for record in found:
            record["ours"] = bool(record["checks"])
    return found
