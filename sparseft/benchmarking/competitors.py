"""What an operation is held against, made the same way in every case: eager, compiled, absent."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.suite import Contender

__all__ = ["COMPILE", "absent", "compiled", "compiled_for_any_size"]

# "0" leaves compiled contenders out: each costs 10 s or more of a smoke test.
COMPILE = "SPARSEFT_BENCH_COMPILE"


def absent(package: str) -> str:
    """Return why a contender of ``package`` cannot take part; empty where it is installed."""
    if importlib.util.find_spec(package) is not None:
        return ""
    return f"{package} is not installed (pip install 'sparseft[bench]')"


def compiled(
    run: Callable[..., Any],
    *arguments: Any,
    check: Callable[[Any], list[Check]] | None = None,
    density: float | None = None,
) -> Contender:
    """Return ``torch.compile(run)`` on fixed arguments, compiled and checked.

    Args:
        run: the eager form; compiled for these shapes alone.
        arguments: what it is called with each time.
        check: what its result must show.
        density: as in `Contender`.

    A machine without a C++ compiler or Triton skips it, with the reason; so does ``COMPILE`` = 0 in
    the environment.
    """
    if os.environ.get(COMPILE) == "0":
        return Contender(skipped=f"{COMPILE}=0", density=density)
    quick = torch.compile(run, dynamic=False)
    try:
        result = quick(*arguments)
    except torch.OutOfMemoryError:
        raise  # not the compiler's fault: `attempt` says so
    except Exception as error:
        return _failed(error, density)
    checks = [] if check is None else check(result)
    return Contender(lambda: quick(*arguments), checks, density=density)


def compiled_for_any_size(
    each: Callable[..., Any],
    make: Callable[[Callable[..., Any]], Contender],
    *,
    density: float | None = None,
) -> Contender:
    """Return ``make(torch.compile(each))``: one compiled piece for tensors of any size, where a
    graph of a whole model takes minutes. Skipped as `compiled` is.

    Args:
        each: what is done to one tensor, sizes left open (but 0 and 1, which torch specialises on).
        make: builds and checks the contender, which calls the compiled piece tensor by tensor.
        density: as in `Contender`.
    """
    if os.environ.get(COMPILE) == "0":
        return Contender(skipped=f"{COMPILE}=0", density=density)
    try:
        return make(torch.compile(each, dynamic=True))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return _failed(error, density)


def _failed(error: Exception, density: float | None) -> Contender:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return Contender(skipped=f"torch.compile failed: {lines[0][:160]}", density=density)
