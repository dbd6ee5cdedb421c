"""What `sparseft bench` can run: one `OpBench` per operation, found by name.

A case file makes its `OpBench` at its end, as ``BENCH`` (several: ``BENCHES``), and `cases.OPS`
finds it there. Shapes lie in three sizes: of real models for a GPU, such that a CPU takes seconds,
and tiny ones, whose figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sparseft.benchmarking.suite import Case

__all__ = ["DTYPES", "SIZES", "OpBench", "Shape", "case_name"]

Shape = tuple[int, ...]

# The names that are typed, and what torch calls them.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

SIZES = ("cuda", "cpu", "tiny")


@dataclass(frozen=True, kw_only=True)
class OpBench:
    """One operation that can be measured.

    Args:
        name: what is typed: ``sampled_grad``.
        summary: what is compared, in one line.
        dims: what the numbers of a shape are: ``OUTxINxTOKENS``.
        shapes: default shapes by size: ``"cuda"``, ``"cpu"``, ``"tiny"``.
        dtypes: names of `DTYPES` that it takes, the default first.
        densities: the default ones, ascending; empty: the op has none.
        build: (shape, densities, dtype) -> the case of that shape with one row per contender, and
            one per density where that matters.
    """

    name: str
    summary: str
    dims: str
    shapes: Mapping[str, tuple[Shape, ...]]
    dtypes: tuple[str, ...]
    densities: tuple[float, ...]
    build: Callable[[Shape, tuple[float, ...], str], Case]

    def case(self, shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
        """Return the case with what it is of: its results say it."""
        return replace(self.build(shape, densities, dtype), op=self.name, shape=shape, dtype=dtype)


def case_name(op: str, shape: Shape, dtype: str) -> str:
    """Return ``op/4096x4096x16384/bf16``."""
    return f"{op}/{'x'.join(map(str, shape))}/{dtype}"
