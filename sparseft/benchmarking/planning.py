"""From what is typed to the cases that it asks for; everything wrong is refused before any runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparseft._text import did_you_mean
from sparseft.benchmarking.catalogue import DTYPES, SIZES, OpBench, Shape, case_name
from sparseft.benchmarking.suite import Case
from sparseft.errors import OptionError, UnknownNameError

__all__ = ["EVERY", "Planned", "choose_ops", "parse_shape", "plan_cases"]

EVERY = "all"


@dataclass(frozen=True)
class Planned:
    """A case to run, or why one that was asked for cannot be."""

    op: OpBench
    shape: Shape
    densities: tuple[float, ...]
    dtype: str
    skipped: str = ""

    @property
    def case(self) -> Case:
        return self.op.case(self.shape, self.densities, self.dtype)

    @property
    def result(self) -> dict[str, Any]:
        """The result of a case that is left out, as `run_suite` would give it."""
        name = case_name(self.op.name, self.shape, self.dtype)
        return {
            "name": name,
            "op": self.op.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "status": "skipped",
            "reason": self.skipped,
        }


def choose_ops(names: Sequence[str], ops: Mapping[str, OpBench]) -> list[OpBench]:
    """Return the ops of these names, each once; all of them for ``"all"``.

    Raises:
        UnknownNameError: no such op; lists those that there are.
    """
    for name in names:
        if name != EVERY and name not in ops:
            raise UnknownNameError(
                f"no op {name!r}.{did_you_mean(name, ops)} Ops: {', '.join(ops)}, or {EVERY}."
            )
    return list(ops.values()) if EVERY in names else [ops[name] for name in dict.fromkeys(names)]


def parse_shape(text: str) -> Shape:
    """Return ``768x768x4096`` as numbers.

    Raises:
        OptionError: something else, or a number below 1.
    """
    parts = text.lower().split("x")
    if not all(part.isascii() and part.isdigit() for part in parts) or 0 in map(int, parts):
        raise OptionError(
            f"--shape {text!r}: wanted whole numbers of 1 or more with an x between them, such as "
            "768x768x4096; `sparseft bench --list` says what each number is."
        )
    return tuple(map(int, parts))


def plan_cases(
    ops: Sequence[OpBench],
    size: str,
    *,
    shapes: Sequence[str] = (),
    densities: Sequence[float] = (),
    dtypes: Sequence[str] = (),
    every: bool = False,
) -> list[Planned]:
    """Return the cases: per op, shape and dtype one.

    Args:
        ops: what `choose_ops` returned.
        size: of `SIZES`: which default shapes.
        shapes: as typed, instead of the default ones.
        densities: instead of the default ones.
        dtypes: of `DTYPES`; left out: each op's first.
        every: the ops were not named one by one: what one does not take is skipped, not refused.

    Raises:
        OptionError: a shape, density, dtype or size that an op cannot have.
        UnknownNameError: an unknown dtype.
    """
    if size not in SIZES:
        raise OptionError(f"--size is {size!r}; wanted one of {', '.join(SIZES)}.")
    _check_densities(densities)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UnknownNameError(
                f"no dtype {dtype!r}.{did_you_mean(dtype, DTYPES)} Dtypes: {', '.join(DTYPES)}."
            )
    asked = [parse_shape(text) for text in dict.fromkeys(shapes)]
    if asked:
        _check_dims(ops, asked)
    chosen = tuple(sorted(set(densities)))
    planned = []
    for op in ops:
        if chosen and not op.densities and not every:
            raise OptionError(f"--density: {op.name} has none; leave the option out.")
        wanted = (chosen or op.densities) if op.densities else ()
        for dtype in dict.fromkeys(dtypes) or op.dtypes[:1]:
            refused = ""
            if dtype not in op.dtypes:
                refused = f"{op.name} takes {', '.join(op.dtypes)}, not {dtype}"
                if not every:
                    raise OptionError(f"--dtype: {refused}.")
            for shape in asked or op.shapes.get(size, ()):
                planned.append(Planned(op, shape, wanted, dtype, refused))
    return planned


def _check_densities(densities: Sequence[float]) -> None:
    for density in densities:
        if not 0 < density <= 1:
            raise OptionError(f"--density {density:g}: wanted more than 0 and at most 1 (all).")


def _check_dims(ops: Sequence[OpBench], shapes: Sequence[Shape]) -> None:
    dims = {op.name: op.dims.split("x") for op in ops}
    if len({len(names) for names in dims.values()}) > 1:
        each = ", ".join(f"{op.name} {op.dims}" for op in ops)
        raise OptionError(f"--shape: these ops have different numbers of dims ({each}); name one.")
    for shape in shapes:
        for name, names in dims.items():
            if len(shape) != len(names):
                text = "x".join(map(str, shape))
                raise OptionError(
                    f"--shape {text} has {len(shape)} numbers; {name} wants {len(names)}: "
                    f"{'x'.join(names)}."
                )
