"""Two revisions against each other in one run: a process each, commanded in turns.

Each round times every contender once on both sides, in the order that the round before did not, so
that what slows the machine for a while slows both. Beside ours one competitor runs as the control:
it is the same code on both sides, and how far its ratio is from 1 is the noise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sparseft.benchmarking.planning import Planned
from sparseft.benchmarking.rotation import spread
from sparseft.benchmarking.trees import Tree, checkout_root, lay_out, split_revisions
from sparseft.errors import SparseFtError

__all__ = ["SideFailed", "compare_revisions"]

Facts = dict[str, Any]

_PATIENCE = 5.0  # seconds that a process has to end
_TAIL = 3  # lines of a dead process's last words


class SideFailed(SparseFtError, RuntimeError):
    """One side's process ended, or cannot be used; the message has its last words."""


class _Process:
    """One side, started when first asked and again after it died."""

    def __init__(self, tree: Tree, folder: Path) -> None:
        self.tree, self.log, self.scratch = tree, folder / "log", folder / "scratch"
        self.process: subprocess.Popen[str] | None = None

    def ask(self, do: str, **words: Any) -> Facts:
        if self.process is None:
            self._start()
        return self._send({"do": do, **words})

    def _start(self) -> None:
        environment = dict(os.environ) | {
            "PYTHONPATH": str(self.tree.path),
            "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
            "TMPDIR": str(self.scratch),  # removed with the rest, however the process ends
        }
        self.scratch.mkdir(exist_ok=True)
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sparseft.benchmarking.worker",
                    str(torch.get_num_threads()),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.tree.path,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us; we end it
            )
        found = self._send({"do": "hello"})
        if "error" in found:
            self.end()
            raise SideFailed(f"{self.tree} cannot be measured: {found['error']}.")
        if Path(found["file"]).parent.parent != self.tree.path:
            self.end()
            raise SideFailed(f"{self.tree} was not imported, but {found['file']}.")

    def _send(self, words: Facts) -> Facts:
        process = self.process
        if process is None or process.stdin is None or process.stdout is None:
            raise SideFailed(f"the process of {self.tree} is not running.")
        try:
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = process.wait()
        self.end()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = "was killed (out of memory?)" if code == -9 else f"ended with {code}"
        last = f": {' / '.join(lines[-_TAIL:])}" if lines else ""
        raise SideFailed(f"the process of {self.tree} {why}{last}")

    def end(self) -> None:
        """Let the process end by itself (its input ends), but not for long."""
        process, self.process = self.process, None
        if process is None:
            return
        try:
            if process.stdin is not None:
                with suppress(BrokenPipeError):  # what was still to be written
                    process.stdin.close()
            process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def _sides(text: str) -> Iterator[tuple[_Process, _Process]]:
    root = checkout_root()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparseft-compare-")))
        pair = []
        for place, label in enumerate(split_revisions(text)):
            inside = folder / str(place)
            inside.mkdir()
            side = _Process(lay_out(label, root, inside), inside)
            stack.callback(side.end)
            pair.append(side)
        yield pair[0], pair[1]


def compare_revisions(
    revisions: str,
    planned: Sequence[Planned],
    device: torch.device | str,
    *,
    files: Callable[[str], str],
    rounds: int = 25,
    seconds: float = 15.0,
    clock: str | None = None,
    warmup: int = 3,
    started: Callable[[Tree, Tree], None] | None = None,
    progress: Callable[[Facts], None] | None = None,
) -> list[Facts]:
    """Measure cases on two revisions and return one result each.

    Args:
        revisions: ``REV``: against the working tree, uncommitted changes included; or ``A..B``.
        planned: the cases. Both sides hold one at the same time.
        device: where.
        files: name of an op -> name of its case file.
        rounds: at most, 2 or more.
        seconds: a case's rounds end after so long.
        clock: instead of each case's own.
        warmup: untimed runs of each contender on each side.
        started: called with both trees (before, after) before the first case.
        progress: called with each result.

    Returns:
        A dict per case: ``name``, ``op``, ``shape``, ``dtype``, ``before``, ``after`` (the sides in
        words), ``status`` ("ok"; "not in REV": the older side cannot build it; "red"; "error";
        "skipped") with ``reason`` if not ok, and ``contenders``: ``name``, ``ours``, ``control``,
        ``status``, and if it was timed ``rounds``, ``before_seconds``, ``after_seconds``, ``ratio``
        (after / before, round by round: below 1 is faster now) as spreads, and ``samples``.

    Raises:
        OptionError: no git, no checkout, no such revision.
        SideFailed: a side that cannot import what every case needs.
    """
    results = []
    with _sides(revisions) as (before, after):
        for side in (before, after):
            side.ask("drop")  # starts both: what cannot be measured at all is said at once
        if started is not None:
            started(before.tree, after.tree)
        for plan in planned:
            result = plan.result
            if plan.skipped:
                result["status"] = "skipped"
            else:
                del result["reason"]
                what = {"file": files(plan.op.name), "device": str(device), "clock": clock}
                try:
                    result |= _case(before, after, plan, what, rounds, seconds, warmup)
                except SideFailed as error:
                    result |= {"status": "error", "reason": str(error)}
            result |= {"before": str(before.tree), "after": str(after.tree)}
            results.append(result)
            if progress is not None:
                progress(result)
    return results


def _case(
    before: _Process,
    after: _Process,
    plan: Planned,
    what: Facts,
    rounds: int,
    seconds: float,
    warmup: int,
) -> Facts:
    words = {"op": plan.op.name, "shape": plan.shape, "densities": plan.densities}
    words |= {"dtype": plan.dtype, **what}
    built = [side.ask("build", **words) for side in (before, after)]
    for side, answer in zip((before, after), built, strict=True):
        if "error" in answer:
            reason = answer["error"].strip().split("\n")[0]
            reason = reason.replace(f"{side.tree.path}{os.sep}", "")
            if "TooLittleMemory" in reason or "OutOfMemory" in reason:
                return {"status": "skipped", "reason": f"{side.tree}: {reason}"}
            status = "error" if side is after else f"not in {side.tree.label}"
            return {"status": status, "reason": reason}
    older = {row["name"]: row for row in built[0]["contenders"]}
    rows: list[Facts] = []
    control_found = False
    # The baseline first: the control that others' ratios are read beside.
    newer = sorted(built[1]["contenders"], key=lambda row: row["name"] != built[1]["baseline"])
    for row in newer:
        other = older.get(row["name"], {"status": "absent", "reason": "no such contender"})
        both = row["status"] == other["status"] == "ok"
        if not row["ours"] and (control_found or not both):
            continue
        control_found |= not row["ours"]
        made = {"name": row["name"], "ours": row["ours"], "control": not row["ours"]}
        bad, where = (row, after) if row["status"] != "ok" else (other, before)
        status = "ok" if both else bad["status"] if bad is row else f"not in {before.tree.label}"
        lines = str(bad.get("reason", "")).strip().splitlines()
        reason = "" if both else f"{where.tree}: {lines[-1] if lines else bad['status']}"
        rows.append({**made, "density": row["density"], "status": status, "reason": reason})
    timed = [row for row in rows if row["status"] == "ok"]
    _rounds(before, after, timed, rounds, seconds, warmup)
    statuses = [row["status"] for row in rows]
    status = next((s for s in ("red", "error") if s in statuses), "ok")
    return {"status": status, "clock": built[1]["clock"], "contenders": rows}


def _rounds(
    before: _Process,
    after: _Process,
    rows: list[Facts],
    rounds: int,
    seconds: float,
    warmup: int,
) -> None:
    """Add to each row what both sides took."""
    samples: dict[str, tuple[list[float], list[float]]] = {row["name"]: ([], []) for row in rows}
    for side in (before, after):
        for row in rows:
            _checked(side.ask("warm", contender=row["name"], times=warmup), side)
    began = time.monotonic()
    for number in range(rounds):
        if number >= 2 and time.monotonic() - began > seconds:
            break
        for place, row in enumerate(rows):
            pair = list(zip((before, after), samples[row["name"]], strict=True))
            for side, taken in pair if (number + place) % 2 == 0 else reversed(pair):
                taken.append(_checked(side.ask("time", contender=row["name"]), side)["seconds"])
    for row in rows:
        old, new = samples[row["name"]]
        ratios = [mine / theirs for mine, theirs in zip(new, old, strict=True)]
        row |= {"rounds": len(old), "before_seconds": spread(old), "after_seconds": spread(new)}
        row |= {"ratio": spread(ratios), "samples": {"before": old, "after": new}}


def _checked(answer: Facts, side: _Process) -> Facts:
    if "error" in answer:
        raise SideFailed(f"{side.tree}: {answer['error']}")
    return answer
