"""The cases. Each file says what it compares, and how, and ends in ``BENCH`` (or ``BENCHES``).

`OPS` has them by name, for `sparseft bench`; `suite_cases` lists what a GPU's suite runs. Nothing
is imported before it is asked for: a comparison of two revisions loads one case file alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from sparseft.benchmarking.catalogue import OpBench

if TYPE_CHECKING:
    from sparseft.benchmarking.cases.compose import compose_cases
    from sparseft.benchmarking.cases.denoise import denoise_cases
    from sparseft.benchmarking.cases.select import select_case
    from sparseft.benchmarking.suite import Case

    OPS: dict[str, OpBench]

__all__ = [
    "OPS",
    "benches_of",
    "compose_cases",
    "denoise_cases",
    "file_of",
    "find_ops",
    "select_case",
    "suite_cases",
]

_ELSEWHERE = {"compose_cases": "compose", "denoise_cases": "denoise", "select_case": "select"}

# The order of files in lists; those that are not named here follow, by name.
_ORDER = (
    "sampled_grad",
    "sampled_embedding",
    "sparse_step",
    "entries",
    "combine",
    "compose",
    "spmm",
)


def __getattr__(name: str) -> Any:
    if name == "OPS":
        value: Any = find_ops()
    elif name in _ELSEWHERE:
        module = importlib.import_module(f"{__name__}.{_ELSEWHERE[name]}")
        value = getattr(module, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def find_ops() -> dict[str, OpBench]:
    """Return every `OpBench` of the files here, by name.

    Raises:
        ValueError: two of one name.
    """
    found: dict[str, OpBench] = {}
    for name in _files():
        for bench in benches_of(name):
            if bench.name in found:
                raise ValueError(f"two case files have an op {bench.name!r}; one is {name}.py")
            found[bench.name] = bench
    return found


def file_of(op: str) -> str:
    """Return the name of the case file that has an op.

    Raises:
        KeyError: none has.
    """
    for name in _files():
        if any(bench.name == op for bench in benches_of(name)):
            return name
    raise KeyError(op)


def _files() -> list[str]:
    names = [m.name for m in pkgutil.iter_modules(__path__)]
    return sorted(names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))


def benches_of(name: str) -> tuple[OpBench, ...]:
    """Return what one case file offers; () for those that only help others."""
    module = importlib.import_module(f"{__name__}.{name}")
    one = getattr(module, "BENCH", None)
    return getattr(module, "BENCHES", () if one is None else (one,))


def suite_cases(*, tiny: bool = False) -> list[Case]:
    """Return all cases in order of importance.

    Args:
        tiny: shapes that take a second on a CPU; their figures mean nothing.
    """
    from sparseft.benchmarking.cases.cholesky_inverse import cholesky_case
    from sparseft.benchmarking.cases.compose import DENSITY, compose_case
    from sparseft.benchmarking.cases.denoise import denoise_case
    from sparseft.benchmarking.cases.entries import entries_case
    from sparseft.benchmarking.cases.residual import difference_case, prune_case
    from sparseft.benchmarking.cases.sampled_grad import sampled_grad_case
    from sparseft.benchmarking.cases.sketch import sketch_case
    from sparseft.benchmarking.cases.sparse_step import sparse_step_case
    from sparseft.benchmarking.cases.spmm import spmm_case
    from sparseft.benchmarking.cases.topk import topk_case
    from sparseft.benchmarking.cases.training_step import suite_step

    if tiny:
        return [
            sampled_grad_case((256, 192), 64),
            sparse_step_case("sparse_step", (1, 96, 128), "fp32"),
            suite_step(1, 4, tiny=True),
            sparse_step_case("sparse_step", (1, 96, 128), "bf16"),
            topk_case((1, 32, 64), (0.01,), "bf16"),
            spmm_case((64, 48), 6, 4, 2),
            denoise_case((1, 72, 2), (0.1,), "fp32"),
            prune_case((2, 40, 70, 5), (0.1,), "fp32"),
            difference_case((40, 70), (), "bf16"),
            difference_case((40, 70), (), "fp32"),
            sketch_case((70, 40), (), "fp32"),
            cholesky_case((3, 10), (), "fp32"),
            *(entries_case(op, (64, 48)) for op in ("write_sum", "restore", "capture")),
            compose_case("language", (1, 32, 64), (DENSITY,), "bf16"),
            compose_case("switch", (1, 32, 64, 2), (DENSITY,), "bf16"),
            compose_case("switch", (1, 32, 64, 8), (DENSITY,), "fp32"),
            compose_case("grid", (1, 32, 64), (DENSITY,), "bf16"),
        ]
    return [
        sampled_grad_case((4096, 4096), 4096),
        sampled_grad_case((11008, 4096), 4096),
        sparse_step_case("sparse_step", (32, 4096, 11008), "fp32"),
        suite_step(32, 128),
        suite_step(128, 128),
        compose_case("language", (12, 768, 250_002), (DENSITY,), "bf16"),
        compose_case("switch", (12, 768, 250_002, 2), (DENSITY,), "bf16"),
        compose_case("switch", (12, 768, 250_002, 8), (DENSITY,), "bf16"),
        sampled_grad_case((4096, 4096), 16384),
        sampled_grad_case((11008, 4096), 16384),
        sampled_grad_case((768, 768), 4096),
        sampled_grad_case((3072, 768), 4096),
        topk_case((12, 768, 250_002), (0.01,), "bf16"),
        sparse_step_case("sparse_step", (32, 4096, 11008), "bf16"),
        compose_case("grid", (12, 768, 250_002), (DENSITY,), "bf16"),
        compose_case("switch", (12, 768, 250_002, 2), (DENSITY,), "fp32"),
        topk_case((8, 4096, 32_000), (0.01,), "bf16"),
        denoise_case((12, 768, 64), (0.1,), "fp32"),
        prune_case((48, 768, 768, 64), (0.1,), "fp32"),
        prune_case((8, 768, 3072, 64), (0.1,), "fp32"),
        difference_case((4096, 11008), (), "bf16"),
        difference_case((11008, 4096), (), "bf16"),
        sketch_case((3072, 80), (), "fp32"),
        cholesky_case((48, 80), (), "fp32"),
        cholesky_case((48, 128), (), "fp32"),
        spmm_case((4096, 4096), 32, 1, 8),
        spmm_case((4096, 4096), 8, 128, 8),
        spmm_case((768, 768), 32, 128, 2),
        *(entries_case(op, (250_002, 768)) for op in ("write_sum", "restore", "capture")),
        sampled_grad_case((768, 768), 16384),
        sampled_grad_case((3072, 768), 16384),
        topk_case((12, 768, 250_002), (0.01,), "fp32"),
    ]
