"""Every operation of `sparseft bench` under pytest-benchmark: a group a case, a row a contender.

    pytest benchmarks                                   # shapes of this machine's device
    pytest benchmarks --bench-size tiny --bench-op sampled_grad

A contender that is not right fails and has no time. Rounds of one contender follow each other
here: `sparseft bench` alternates them, and its ratios are the ones to quote. On a GPU a round is
from idle device to idle device, launches included, the L2 flushed before it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparseft.benchmarking.cases import OPS
from sparseft.benchmarking.limits import TooLittleMemory
from sparseft.benchmarking.suite import Case, Prepared
from sparseft.evaluation.provenance import provenance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Larger than any L2.
FLUSH_BYTES = 512 << 20

# The case built last, alone: two of real size need not fit into memory together.
_built: dict[str, Prepared] = {}


def prepared(case: Case) -> Prepared:
    if case.name not in _built:
        _built.clear()
        gc.collect()  # attached models hold cycles
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled contenders hold their tensors
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        _built[case.name] = case.build(DEVICE)
    return _built[case.name]


def cases(config: pytest.Config) -> list[Case]:
    size = config.getoption("bench_size") or DEVICE.type
    chosen = config.getoption("bench_op") or list(OPS)
    return [
        op.case(shape, op.densities, op.dtypes[0])
        for op in (OPS[name] for name in chosen)
        for shape in op.shapes[size]
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Who takes part is known once a case is built: shapes and installed packages decide."""
    rows, names = [], []
    for case in cases(metafunc.config):
        try:
            contenders = list(prepared(case).contenders)
        except Exception:  # shown by the test, which builds it again
            contenders = ["(not built)"]
        rows += [(case, contender) for contender in contenders]
        names += [f"{case.name}-{contender}" for contender in contenders]
    metafunc.parametrize(("case", "contender"), rows, ids=names)


@pytest.fixture(scope="session")
def source() -> dict[str, Any]:
    return provenance()


def test_op(
    case: Case,
    contender: str,
    benchmark: Any,
    source: dict[str, Any],
    pytestconfig: pytest.Config,
) -> None:
    try:
        side = prepared(case).contenders[contender]
    except TooLittleMemory as error:
        pytest.skip(str(error))
    if side.status == "skipped":
        pytest.skip(side.skipped)
    if side.status == "error":
        pytest.fail(side.error, pytrace=False)
    failed = [str(check) for check in side.checks if not check.passed]
    if failed:
        pytest.fail(f"not timed, as it is not right: {'; '.join(failed)}", pytrace=False)
    benchmark.group = case.name
    benchmark.extra_info |= {
        "contender": contender,
        "ours": side.ours,
        "density": side.density,
        "bytes": side.bytes,
        "flops": side.flops,
        "facts": {**prepared(case).facts, **side.facts},
        "device": DEVICE.type,
        "provenance": source,
    }
    run, before = on_device(side.run)
    benchmark.pedantic(
        run,
        setup=before,
        rounds=pytestconfig.getoption("benchmark_min_rounds"),
        iterations=1,
        warmup_rounds=prepared(case).warmup,
    )


def on_device(run: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], None] | None]:
    """Return what to time and what to do before it."""
    if DEVICE.type != "cuda":
        return run, None
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)

    def before() -> None:
        flush.zero_()
        torch.cuda.synchronize(DEVICE)

    def timed() -> None:
        run()
        torch.cuda.synchronize(DEVICE)

    return timed, before
