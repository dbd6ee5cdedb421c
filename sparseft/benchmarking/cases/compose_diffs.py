"""The differentiable sum of diffs, forward and backward, against what autograd makes of plain sums.

Everyone returns the composed weight and the gradients of the diffs' values and of the coefficients
(of a fixed gradient of the weight); the base takes none. The dense side's values are whole
matrices, so that it costs the same at any density.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.parts import typical
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, rel_rms
from sparseft.benchmarking.competitors import compiled_for_any_size
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.masks import random_pattern, sectors_touched
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.diff import SparseDiff
from sparseft.ops import compose_diffs, pack_diffs, resolve_backend

__all__ = ["BENCH", "compose_diffs_case"]

DENSE = "dense matrices, autograd"
PLAIN = "torch index_add, autograd"
COMPILED = "compiled: torch index_add, autograd"
OURS = "ours"

_DIMS = "ROWSxCOLUMNSxADAPTERS"
_DTYPES = ("bf16", "fp32", "fp16")
# Of fp32 sums over all entries, in whatever order; their terms cancel.
_SUM = 256 * torch.finfo(torch.float32).eps


def compose_diffs_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare on a weight in ``dtype``; values and coefficients are fp32."""
    check_shape("compose_diffs", _DIMS, shape)
    check_densities("compose_diffs", densities)
    kind = torch_dtype("compose_diffs", dtype, _DTYPES)
    *size, count = shape
    numel = size[0] * size[1]

    def build(device: torch.device) -> Prepared:
        # the dense side: a matrix and its gradient per adapter, in fp32; the gate in fp64
        require_memory(numel * (12 * count + 5 * kind.itemsize + 24), device)
        contenders: dict[str, Contender] = {}
        for density in densities:
            sides = _Sides((size[0], size[1]), count, density, kind, device)
            makers: dict[str, Callable[[], Contender]] = {PLAIN: sides.plain, OURS: sides.ours}
            if density == typical(densities):
                contenders[DENSE] = attempt(sides.dense)
                makers[COMPILED] = sides.compiled
            for name, make in makers.items():
                made = contenders[f"{name}, {percent(density)}"] = attempt(make)
                made.density, made.bytes = density, sides.bytes()
        facts = {"entries": numel, "adapters": count}
        return Prepared(contenders, DENSE, facts=facts)

    return Case(case_name("compose_diffs", shape, dtype), build)


class _Sides:
    """The contenders at one density, held against the definition in fp64."""

    def __init__(
        self,
        shape: tuple[int, int],
        count: int,
        density: float,
        kind: torch.dtype,
        device: torch.device,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*size: int) -> Tensor:
            return torch.randn(size, device=device, generator=generator)

        self.weight = drawn(*shape).mul_(0.02).to(kind)
        self.grad = drawn(*shape).to(kind)
        patterns = [random_pattern(shape, density, device=device, seed=i) for i in range(count)]
        self.values = [drawn(p.nnz).mul_(1e-3).requires_grad_() for p in patterns]
        self.diffs = [
            SparseDiff.from_pattern(p, v) for p, v in zip(patterns, self.values, strict=True)
        ]
        self.coeffs = torch.linspace(0.5, 1.0, count, device=device).requires_grad_()
        self.at = [p.indices for p in patterns]
        self.sectors = sum(sectors_touched(p, kind.itemsize) for p in patterns)
        self._define()

    @torch.no_grad()
    def _define(self) -> None:
        exact, g = self.weight.double(), self.grad.double().view(-1)
        slopes, sums = [], []
        for at, values, coeff in zip(self.at, self.values, self.coeffs, strict=True):
            exact.view(-1).index_add_(0, at, values.double() * coeff.double())
            slopes.append(g[at.long()] * coeff.double())
            sums.append(g[at.long()] @ values.double())
        self.touched = torch.zeros_like(self.weight, dtype=torch.bool)
        self.touched.view(-1)[torch.cat(self.at).long()] = True
        self.exact, self.slopes, self.sums = exact, torch.cat(slopes), torch.stack(sums)

    def bytes(self) -> float:
        """Weight in, result out; of the gradient the pieces that hold an entry; per entry an index
        and a value in, and the value's gradient out.
        """
        entries = sum(v.numel() for v in self.values)
        return 2.0 * self.weight.nbytes + 32.0 * self.sectors + 12.0 * entries

    def _contender(
        self, forward: Callable[[], Tensor], roundings: int, leaves: list[Tensor], **more: Any
    ) -> Contender:
        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            out = forward()
            return out.detach(), torch.autograd.grad(out, [*leaves, self.coeffs], self.grad)

        out, (*slopes, sums) = run()
        if slopes[0].ndim == 2:
            slopes = [s.view(-1)[at.long()] for s, at in zip(slopes, self.at, strict=True)]
        eps = torch.finfo(self.weight.dtype).eps
        composed, touched = out.view_as(self.exact), self.touched
        lost = composed[~touched] != self.weight[~touched]
        checks = [
            Check(
                "composed: error",
                rel_rms(composed[touched], self.exact[touched]),
                roundings**0.5 * eps / 2,
            ),
            Check("untouched entries that differ", float(lost.sum()), 0.0),
            Check(
                "gradient of the values: error",
                rel_rms(torch.cat(slopes), self.slopes),
                max(roundings - 1, 0) * eps + 4 * torch.finfo(torch.float32).eps,
            ),
            Check(
                "gradient of the coefficients: error",
                rel_rms(sums, self.sums),
                max(roundings - 1, 0) * eps + _SUM,
            ),
        ]
        return Contender(run, checks, **more)

    def dense(self) -> Contender:
        """Whole matrices with gradients: fine-tuning's task vectors."""
        matrices = []
        for at, values in zip(self.at, self.values, strict=True):
            whole = torch.zeros(self.weight.numel(), device=at.device)
            whole[at.long()] = values.detach()
            matrices.append(whole.view_as(self.weight).requires_grad_())

        def forward() -> Tensor:
            total = self.weight.float()
            for coeff, matrix in zip(self.coeffs, matrices, strict=True):
                total = total + coeff * matrix
            return total.to(self.weight.dtype)

        # per adapter a matrix in and its gradient out, and the sums between them
        moved = 2.0 * self.weight.nbytes + len(matrices) * 8.0 * self.weight.numel()
        return self._contender(forward, 1, matrices, bytes=moved)

    def plain(self, add: Callable[..., Tensor] | None = None) -> Contender:
        joined = torch.cat(self.at)
        flat = self.weight.flatten().clone()  # no view: compiled code would be bound to its base
        sizes = torch.tensor([v.numel() for v in self.values], device=joined.device)
        of = torch.repeat_interleave(torch.arange(len(sizes), device=joined.device), sizes)

        def forward() -> Tensor:
            summed = (add or _index_add)(flat, joined, torch.cat(self.values), self.coeffs, of)
            return summed.view_as(self.weight)

        # added one by one, each of them rounded; so are the products before
        return self._contender(forward, len(self.at) + 1, self.values)

    def compiled(self) -> Contender:
        return compiled_for_any_size(_index_add, self.plain)

    def ours(self) -> Contender:
        packed = pack_diffs(self.diffs)
        forward = partial(compose_diffs, self.weight, self.diffs, self.coeffs, packed=packed)
        backend = resolve_backend("compose_entries", self.values[0], self.coeffs)
        facts = {"backend": backend, "nnz": sum(v.numel() for v in self.values)}
        return self._contender(forward, 1, self.values, facts=facts, ours=True)


def _index_add(weight: Tensor, at: Tensor, values: Tensor, coeffs: Tensor, of: Tensor) -> Tensor:
    return weight.index_add(0, at, (values * coeffs[of]).to(weight.dtype))


BENCH = OpBench(
    name="compose_diffs",
    summary="weight + sum of coeff * diff with gradients: against index_add and dense matrices",
    dims=_DIMS,
    shapes={
        "cuda": ((4096, 4096, 2), (768, 3072, 8)),
        "cpu": ((768, 768, 2),),
        "tiny": ((40, 50, 2),),
    },
    dtypes=_DTYPES,
    densities=(0.01, 0.1),
    build=compose_diffs_case,
)
