"""Several adapters on one weight by each rule: sum, TIES, largest, consensus.

Against the rules on dense task vectors, as model-merging tools have them: every adapter's delta of
the whole weight in fp32, stacked. Values are multiples of 1/64 and coefficients powers of two, so
that sums are exact and all sides elect the same signs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.parts import typical
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, as_accurate, equal_bits
from sparseft.benchmarking.competitors import compiled
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.masks import random_pattern, sectors_touched
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.ops import write_sum_
from sparseft.ops.combine import Rule, Term, combine
from sparseft.ops.compose import STATE, compose_many_, runs_packed
from sparseft.ops.packed import PackedTerm, PackedUnion
from sparseft.ops.union import union_of

__all__ = ["BENCH", "RULES", "combine_case", "dense_form"]

_OP = "combine"
_DIMS = "ROWSxCOLSxADAPTERS"
_DTYPES = ("bf16", "fp32", "fp16")
_DENSITIES = (0.001, 0.01, 0.1)

RULES = {
    "sum": Rule("sum"),
    "TIES": Rule("elect"),
    "largest": Rule("largest"),
    "consensus": Rule("consensus"),
}


def combine_case(
    shape: tuple[int, int],
    adapters: int,
    densities: tuple[float, ...] = _DENSITIES,
    dtype: str = "bf16",
) -> Case:
    """Compare the rules, written onto a weight in ``dtype`` from its own entries."""

    def build(device: torch.device) -> Prepared:
        made = _draw(shape, adapters, densities, dtype, device)
        contenders: dict[str, Contender] = {}
        for label, rule in RULES.items():
            side = made[typical(densities)]
            contenders[f"dense task vectors, {label}"] = attempt(partial(side.dense, rule))
            if label == "TIES":  # of most passes: one compilation
                name = f"compiled: dense task vectors, {label}"
                contenders[name] = attempt(partial(side.compiled, rule))
            for density, side in made.items():
                name = f"ours, {label}, {percent(density)}"
                contenders[name] = attempt(partial(side.ours, rule))
            for name, contender in contenders.items():
                if f", {label}" in name:
                    contender.work = label
        return Prepared(contenders, "dense task vectors, sum")

    return Case(case_name(_OP, (*shape, adapters), dtype), build)


def dense_form(
    base: Tensor, stack: Tensor, coeffs: Tensor, rule: Rule, wide: torch.dtype
) -> Tensor:
    """Apply a rule to whole deltas: ``rn(base + combined)`` in the dtype of ``base``.

    Args:
        base: (rows, cols).
        stack: (adapters, rows, cols) floating.
        coeffs: (adapters,).
        rule: ``"sum"``, ``"elect"`` by sum and with the mean by count, ``"largest"`` or
            ``"consensus"``.
        wide: what it computes in.
    """
    own = stack.to(wide) * coeffs.to(wide)[:, None, None]
    total = own.sum(0)
    if rule.kind == "elect":
        agrees = (own != 0) & (own.sign() == total.sign())
        total = torch.where(agrees, own, 0).sum(0) / agrees.sum(0).clamp_(min=1)
    elif rule.kind == "largest":
        total = own[0]
        for other in own[1:]:
            total = torch.where(other.abs() > total.abs(), other, total)
    elif rule.kind == "consensus":
        agrees = (own != 0) & (own.abs() >= rule.strength * (total - own).abs())
        total = torch.where(agrees.sum(0) >= rule.least, total, 0)
    return (base.to(wide) + total).to(base.dtype if wide != torch.float64 else wide)


def bytes_moved(union: SparsePattern, nnz: int, itemsize: int) -> int:
    """Return the least bytes of a composition.

    Index and base of each entry of the union, 5 (fp32 value, adapter) for each of ``nnz`` values;
    the weight's 32-byte pieces that hold an entry, in and out.
    """
    return (4 + itemsize) * union.nnz + 5 * nnz + 64 * sectors_touched(union, itemsize)


def _draw(
    shape: tuple[int, int],
    adapters: int,
    densities: tuple[float, ...],
    dtype: str,
    device: torch.device,
) -> dict[float, _Side]:
    kind, numel = torch_dtype(_OP, dtype, _DTYPES), shape[0] * shape[1]
    # deltas in fp32 and, for the gate, fp64 with what a rule makes of each; weights; packed entries
    need = numel * (adapters * (4 + 4 * 8) + 4 * 8 + 8 * kind.itemsize)
    require_memory(need + 60 * adapters * sum(densities) * numel, device)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, device=device, generator=generator).to(kind)
    return {d: _Side(weight, d, adapters, generator) for d in densities}


class _Side:
    """The contenders at one density: adapters on one weight, each with a mask of its own."""

    def __init__(
        self, weight: Tensor, density: float, adapters: int, generator: torch.Generator
    ) -> None:
        self.weight, self.density = weight, density
        device = weight.device
        self.diffs = []
        for seed in range(adapters):
            pattern = random_pattern(tuple(weight.shape), density, device=device, seed=seed)
            drawn = torch.randn(pattern.nnz, device=device, generator=generator)
            self.diffs.append(SparseDiff.from_pattern(pattern, (64 * drawn).round() / 64))
        self.coeffs = [(1.0, 0.5, -1.0, 2.0)[i % 4] for i in range(adapters)]
        union, self.places = union_of([d.indices for d in self.diffs])
        self.union = SparsePattern.from_indices(union, weight.shape)
        self.base = weight.view(-1)[union.long()]
        self.nnz = sum(d.nnz for d in self.diffs)

    def stack(self) -> tuple[Tensor, Tensor]:
        dense = torch.stack([d.to_dense().view(self.weight.shape) for d in self.diffs])
        return dense, torch.tensor(self.coeffs, device=dense.device)

    def check(self, rule: Rule, got: Tensor) -> list[Check]:
        """Of entries that some adapter has, and of the rest its bits."""
        stack, coeffs = self.stack()
        at = self.union.indices.long()
        theirs, exact = (
            dense_form(self.weight, stack, coeffs, rule, wide).view(-1)[at]
            for wide in (torch.float32, torch.float64)
        )
        rest = got.clone()
        rest.view(-1)[at] = self.base
        found = as_accurate("result", got.view(-1)[at], theirs, exact)
        return [found, equal_bits("the rest", rest, self.weight)]

    def _contender(self, run: Callable[[], Tensor], rule: Rule, *, backend: str) -> Contender:
        itemsize = self.weight.element_size()
        facts = {"backend": backend, "nnz": self.nnz, "union": self.union.nnz}
        moved = bytes_moved(self.union, self.nnz, itemsize)
        checks = self.check(rule, run())
        return Contender(run, checks, facts, ours=True, density=self.density, bytes=moved)

    def ours(self, rule: Rule) -> Contender:
        """By one launch where the kernels run, else by the definition, entries of the union."""
        target, at = self.weight.clone(), self.union.indices
        if not runs_packed([target]):
            terms = [
                Term(coeff, diff.values, places)
                for coeff, diff, places in zip(self.coeffs, self.diffs, self.places, strict=True)
            ]

            def run() -> Tensor:
                write_sum_(target, at, self.base, combine(terms, at.numel(), rule))
                return target

            return self._contender(run, rule, backend="reference")
        packed = PackedUnion.pack(
            [at],
            [[PackedTerm(i, d.values, self.places[i]) for i, d in enumerate(self.diffs)]],
            len(self.diffs),
        )
        saved = packed.empty(target.dtype)
        base, state = packed.join([self.base]), torch.zeros(len(STATE), dtype=torch.int32)
        state = state.to(target.device)

        def launch() -> Tensor:
            compose_many_(
                [target], packed, self.coeffs, rule, saved=saved, base=base, state=state
            )  # fmt: skip
            return target

        return self._contender(launch, rule, backend="triton")

    def _dense_bytes(self) -> int:
        """Every delta once in fp32, the weight in and out."""
        numel = self.weight.numel()
        return numel * (4 * len(self.diffs) + 2 * self.weight.element_size())

    def dense(self, rule: Rule) -> Contender:
        stack, coeffs = self.stack()

        def run() -> Tensor:
            return dense_form(self.weight, stack, coeffs, rule, torch.float32)

        return Contender(run, self.check(rule, run()), bytes=self._dense_bytes())

    def compiled(self, rule: Rule) -> Contender:
        stack, coeffs = self.stack()
        made = compiled(
            dense_form,
            self.weight,
            stack,
            coeffs,
            rule,
            torch.float32,
            check=partial(self.check, rule),
        )
        made.bytes = self._dense_bytes()
        return made


def _build(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    check_shape(_OP, _DIMS, shape)
    check_densities(_OP, densities)
    rows, cols, adapters = shape
    return combine_case((rows, cols), adapters, densities, dtype)


BENCH = OpBench(
    name=_OP,
    summary="adapters on one weight by four rules (TIES and others) against dense task vectors",
    dims=_DIMS,
    shapes={
        "cuda": ((4096, 11008, 4), (3072, 768, 8)),
        "cpu": ((768, 768, 4),),
        "tiny": ((48, 40, 3),),
    },
    dtypes=_DTYPES,
    densities=_DENSITIES,
    build=_build,
)
