"""`run.py amp`: loss curves in mixed precision against dense-masked fp32, on real data.

The reference is dense fine-tuning in fp32 whose gradients and updates are masked (`amp_ways`): the
same start, batches, rates, clipping and decay. Every way of ours is held to limits that come from
dense runs alone:

- **Loss**: no mean over `WINDOW` steps may be further off than a tenth of what another order of the
  batches does to the dense fp32 run: the spread that anybody takes for granted. It is no multiple
  of the dense run of the same precision, which is shown beside it: a drift of the loss is one
  random number, and of two such numbers one is twice the other three times in ten.
- **Diff**: at the end, at most twice as far off as the dense run of the same precision. For fp32
  that is dense fine-tuning in fp64, whose distance is what fp32 itself loses by rounding over the
  run; it is the least limit of every precision. A bf16 base is held against dense training of bf16
  weights with fp32 masters, which is what a diff in fp32 stands for; pure bf16 AdamW is shown, and
  no limit. RMS of the difference over RMS of the reference's diff, over all trained entries but the
  one in a thousand that is furthest off: where a gradient is rounding noise around zero, Adam makes
  full steps of it, and one such entry of a rare word was seen to hold nine tenths of the squares.
  With them it is in the JSON as well.
- **Lost**: AdamW in fp64 on the very gradients of a run, for entries of every tensor, against the
  values that the run has at its end: at most twice what the fp32 reference loses. This limit is
  free of chaos, and six digits tight: a diff kept in bf16 is over it a thousandfold.
- **Frozen**: no bit outside the mask changes, on any side. **Skipped**: the GradScaler leaves out
  no more steps than on the dense side (fewer may be: gradients at a mask do not overflow).

Two mistakes run besides and have to be caught: a diff kept in bf16, and another mask.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from amp_study import Study, real_study
from amp_ways import WAYS, Curve, Way, run_way
from torch import Tensor

from sparseft.benchmarking import markdown_table, results_folder, write_results
from sparseft.benchmarking.checks import Check

__all__ = ["STEPS", "WINDOW", "curves", "main", "plot", "table"]

STEPS = 300
# Steps that a smoothed loss is the mean of.
WINDOW = 20
FACTOR = 2.0  # over dense runs
SHARE = 0.1  # of what another order does to the loss
# Share of the entries that the distance of diffs is taken over.
_NEAR = 0.999
_FLOOR = "dense fp64"
_ORDER = "dense fp32, another order"
_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def smoothed(losses: Sequence[float], window: int = WINDOW) -> Tensor:
    """Return means over a moving window, (steps - window + 1,) fp64."""
    wide = torch.tensor(losses, dtype=torch.float64)
    return wide.unfold(0, min(window, len(losses)), 1).mean(1)


def distances(curve: Curve, reference: Curve) -> dict[str, float]:
    """Return how far a curve is from the reference: its loss, and its diff at the end."""
    steps = torch.tensor(curve.losses, dtype=torch.float64) - torch.tensor(reference.losses)
    apart = (smoothed(curve.losses) - smoothed(reference.losses)).abs()
    apart_at, size_at = [], []
    for name, wanted in reference.diff.items():
        trained = (curve.diff[name] != 0) | (wanted != 0)
        apart_at.append((curve.diff[name][trained] - wanted[trained]).double())
        size_at.append(wanted[trained].double())
    off, size = torch.cat(apart_at).abs(), torch.cat(size_at).square().mean().sqrt()
    near = off[off <= off.kthvalue(math.ceil(_NEAR * off.numel())).values]
    return {
        "loss": float(steps.square().mean().sqrt()),
        "smoothed max": float(apart.max()),
        "smoothed mean": float(apart.mean()),
        "diff": float(near.square().mean().sqrt() / size),
        "diff with outliers": float(off.square().mean().sqrt() / size),
        "lost": curve.lost,
    }


def curves(
    study: Study, ways: Sequence[Way] = WAYS, *, progress: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Run ways, hold ours to their limits, and return a row each, ready for JSON.

    Args:
        study: what they train.
        ways: the reference first, and before a way of ours the dense ways that set its limits.
        progress: is told of what was done.
    """
    reference = run_way(ways[0], study, progress=progress)
    rows: dict[str, dict[str, Any]] = {}
    for way in ways:
        curve = reference if way is ways[0] else run_way(way, study, progress=progress)
        far = distances(curve, reference)
        checks = [Check("entries outside the mask that changed", curve.moved, 0)]
        if way.limit:
            checks += _checks(curve, far, rows, reference)
        passed = all(check.passed for check in checks)
        rows[way.name] = {
            "name": way.name,
            "ours": way.ours,
            "limit": way.limit,
            "spoil": way.spoil,
            "good": passed != bool(way.spoil),
            "checks": [{**vars(check), "passed": check.passed} for check in checks],
            "distance": far,
            "skipped": curve.skipped,
            "seconds": curve.seconds,
            "first": sum(curve.losses[:WINDOW]) / len(curve.losses[:WINDOW]),
            "last": sum(curve.losses[-WINDOW:]) / len(curve.losses[-WINDOW:]),
            "losses": [round(loss, 7) for loss in curve.losses],
        }
        if progress is not None:
            text = "; ".join(str(check) for check in checks if not check.passed) or "within limits"
            progress(f"{way.name}: {curve.seconds:.0f} s, {text}")
    return list(rows.values())


def _checks(
    curve: Curve, far: Mapping[str, float], rows: Mapping[str, Any], reference: Curve
) -> list[Check]:
    dense, floor, order = (rows[n] for n in (curve.way.limit, _FLOOR, _ORDER))
    checks = [
        Check("smoothed max", far["smoothed max"], SHARE * order["distance"]["smoothed max"]),
        Check("diff", far["diff"], FACTOR * max(d["distance"]["diff"] for d in (dense, floor))),
        Check("lost", far["lost"], FACTOR * reference.lost),
    ]
    return [*checks, Check("skipped steps", curve.skipped, dense["skipped"])]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what was found as a Markdown table, limits in brackets."""
    columns = {
        "name": "",
        "last": f"loss, last {WINDOW} steps",
        "loss": "off the reference, RMS of steps",
        "smoothed max": f"mean of {WINDOW} steps, at most",
        "smoothed mean": "on average",
        "diff": "diff at the end",
        "lost": "lost on the way",
        "good": "",
    }
    lines = []
    for row in rows:
        limits = {check["name"]: check["limit"] for check in row["checks"]}
        line = {"name": row["name"], "last": f"{row['last']:.4f}", "good": _verdict(row)}
        for key, value in row["distance"].items():
            limit = f" ({limits[key]:.1e})" if key in limits else ""
            line[key] = f"{value:.1e}{limit}"
        lines.append(line)
    return markdown_table(lines, columns)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["spoil"]:
        return "caught" if row["good"] else "NOT CAUGHT"
    if not row["good"]:
        return "FAILED"
    return "within limits" if row["limit"] else ""


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Write a PNG: smoothed losses, and how far each is from the reference; None: no rows.

    The same rows give the same bytes.
    """
    from sparseft.io.png import COLOURS, blank_figure, tidy_axes, write_png

    shown = [row for row in rows if not row["spoil"]]
    if not shown:
        return None
    reference = smoothed(shown[0]["losses"])
    figure = blank_figure(13.0, 5.4, dpi=130)
    loss, apart = figure.subplots(1, 2)
    # One colour a precision: ours and the dense run that sets its limit.
    colours: dict[str, str] = {}
    for row in shown:
        key = row["limit"] or row["name"]
        colour = colours.setdefault(key, COLOURS[len(colours) % len(COLOURS)])
        line = smoothed(row["losses"])
        style = {"color": colour, "linestyle": "-" if row["ours"] else "--"}
        style |= {"linewidth": 1.8 if row["ours"] else 1.2, "label": row["name"]}
        steps = [WINDOW + n for n in range(len(line))]
        loss.plot(steps, line.tolist(), **style)
        if row is not shown[0]:
            # A log axis has no 0: equal losses are drawn where fp32 ends.
            apart.plot(steps, (line - reference).abs().clamp_min(1e-8).tolist(), **style)
    loss.set_ylabel(f"loss, mean of {WINDOW} steps")
    apart.set_ylabel("distance from dense-masked fp32")
    apart.set_yscale("log")
    for axes in (loss, apart):
        axes.set_xlabel("step")
        tidy_axes(axes)
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    write_png(figure, path)
    return path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py amp", description=__doc__.splitlines()[0])
    where = os.environ.get("SPARSEFT_TEST_DATA", str(_DATA))
    parser.add_argument("--data", type=Path, default=Path(where), help="folder of the real data")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="*", help="glob over ways; what sets limits runs as well")
    parser.add_argument("--out", type=Path, help="folder of the results; left out: results/")
    parser.add_argument("--name", default="amp", help="name of the result files")
    options = parser.parse_args(arguments)
    if options.steps < WINDOW:
        parser.error(f"--steps {options.steps}: smoothing takes {WINDOW} at least")
    return options


def chosen(only: str) -> list[Way]:
    """Return the ways that fit, with the reference and every dense way their limits need."""
    fits = [way for way in WAYS if fnmatchcase(way.name, only)]
    needed = {WAYS[0].name, *(way.name for way in fits), *(way.limit for way in fits)}
    if any(way.limit for way in fits):
        needed |= {_FLOOR, _ORDER}
    return [way for way in WAYS if way.name in needed]


def main(arguments: Sequence[str], *, results: Path) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    names = ("steps", "batch", "length", "density", "lr", "seed")
    study = real_study(options.data, **{name: getattr(options, name) for name in names})
    ways = chosen(options.only)
    rows = curves(study, ways, progress=lambda text: print(text, flush=True))
    passed = all(row["good"] for row in rows)
    whole = len(ways) == len(WAYS) and options.steps >= STEPS
    folder = options.out or results_folder(results, passed=passed and whole)
    text = table(rows)
    found = {"study": {**study.facts, "window": WINDOW}, "curves": rows}
    path = write_results(folder, options.name, found, text)
    print(f"\n{text}\nwritten to {path}")
    return 0 if passed else 1
