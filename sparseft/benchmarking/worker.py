"""One side of a comparison of revisions: a process that builds cases and times single runs, told so
by JSON lines on its input, answering by lines on its output.

It is started with another revision's library on its path and the present benchmarks in it, so it
imports only what a case needs. Started by `revisions`, not by hand.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sparseft.benchmarking.rotation import Clock

__all__ = ["Side", "main"]

# A run shorter than this follows an untimed one: the process has just been asleep, and the other
# side has had the caches.
_SHORT = 20e-3
# Runs are repeated to fill so many seconds, at most so often.
_SPAN, _MOST = 2e-3, 100


class Side:
    """What one process holds: the contenders of one case."""

    def __init__(self) -> None:
        self.contenders: dict[str, Any] = {}
        self.leads: dict[str, float] = {}
        self.watch: Any = None

    def hello(self) -> dict[str, Any]:
        """Say which library this is; what it lacks of the harness's needs is raised here."""
        import sparseft

        importlib.import_module("sparseft.benchmarking.suite")
        return {"file": sparseft.__file__, "pid": os.getpid()}

    def build(
        self,
        *,
        file: str,
        op: str,
        shape: list[int],
        densities: list[float],
        dtype: str,
        device: str,
        clock: Clock | None,
    ) -> dict[str, Any]:
        """Build a case of one case file, its checks included."""
        from sparseft.benchmarking.cases import benches_of
        from sparseft.benchmarking.rotation import Stopwatch

        self.drop()
        bench = next(bench for bench in benches_of(file) if bench.name == op)
        where = torch.device(device)
        built = bench.build(tuple(shape), tuple(densities), dtype).build(where)
        self.contenders = built.contenders
        self.watch = Stopwatch(where, clock or built.clocks[0])
        rows = []
        for name, contender in built.contenders.items():
            failed = [str(check) for check in contender.checks if not check.passed]
            reason = contender.skipped or contender.error or "; ".join(failed)
            row = {"name": name, "status": contender.status, "reason": reason}
            rows.append({**row, "ours": contender.ours, "density": contender.density})
        return {"contenders": rows, "baseline": built.baseline, "clock": self.watch.clock}

    def warm(self, *, contender: str, times: int) -> dict[str, Any]:
        """Run untimed."""
        for _ in range(times):
            self.leads[contender] = self.watch.host_seconds(self._run(contender))
        return {}

    def time(self, *, contender: str) -> dict[str, Any]:
        """Time one run; of a very short one the median of several, after an untimed one."""
        run, lead = self._run(contender), self.leads[contender]
        if lead < _SHORT:
            run()
        count = max(1, min(_MOST, int(_SPAN / max(lead, 1e-9))))
        gc.disable()
        try:
            taken = [self.watch.time(run, min(2 * lead, _SHORT))[0] for _ in range(count)]
        finally:
            gc.enable()
        return {"seconds": statistics.median(taken)}

    def drop(self) -> dict[str, Any]:
        """Free what the last case held."""
        self.contenders, self.leads, self.watch = {}, {}, None
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}

    def _run(self, contender: str) -> Callable[[], Any]:
        return self.contenders[contender].run


def main(arguments: list[str]) -> int:
    """Answer until the input ends; ``arguments``: the number of threads."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(arguments[0]))
    side = Side()
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        try:
            answer = getattr(side, asked.pop("do"))(**asked)
        except Exception as error:  # the other side goes on without this case
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["took"] = time.perf_counter() - began
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
