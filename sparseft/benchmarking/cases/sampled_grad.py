"""The gradient of a linear layer's weight at a mask against torch's dense ``dY.T @ X``.

Operations are those of the dense product for everyone, whoever skips them, so that TFLOP/s compare.
Ours forms no dense gradient; the others that end in the mask's entries gather them from one, or
take ``torch.sparse.sampled_addmm``, which torch has for fp32 and fp64 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.parts import csr_tensor, typical, where_torch_can
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, as_accurate, rel_rms
from sparseft.benchmarking.competitors import compiled
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.masks import packed_pattern, random_pattern
from sparseft.benchmarking.suite import Case, Contender, Prepared, Target, attempt, faster
from sparseft.diff import SparsePattern
from sparseft.ops import resolve_backend, sampled_weight_grad

__all__ = ["BENCH", "DENSE", "sampled_grad_case"]

_OP = "sampled_grad"
_DIMS = "OUTxINxTOKENS"
_DTYPES = ("bf16", "fp32", "fp16")
_DENSITIES = (0.0005, 0.001, 0.01, 0.1)
_PACKED = "1% in a tenth of the tiles"
# What must be reached, for layers of these shapes in bf16.
_TARGET_SHAPES = ((4096, 4096), (11008, 4096))

DENSE = "dense dY.T @ X"


def sampled_grad_case(
    shape: tuple[int, int],
    tokens: int,
    densities: tuple[float, ...] = _DENSITIES,
    dtype: str = "bf16",
) -> Case:
    """Compare for a weight of ``shape`` (out, in); operands in ``dtype``."""

    def build(device: torch.device) -> Prepared:
        kind, numel, width = torch_dtype(_OP, dtype, _DTYPES), shape[0] * shape[1], sum(shape)
        # operands in three widths, products in fp64 and fp32 for the gate, one result each
        require_memory(numel * (8 + 3 * 4 + kind.itemsize) + 14 * tokens * width, device)
        generator = torch.Generator(device).manual_seed(0)

        def drawn(columns: int) -> Tensor:
            return torch.randn(tokens, columns, device=device, generator=generator).to(kind)

        sides = _Sides(drawn(shape[0]), drawn(shape[1]))
        contenders = {DENSE: attempt(sides.dense)}
        for density in densities:
            label, pattern = percent(density), random_pattern(shape, density, device=device)
            makers: dict[str, Callable[..., Contender]] = {
                f"dense, then gather, {label}": sides.gathered,
                f"torch.sparse.sampled_addmm, {label}": sides.addmm,
                f"ours, {label}": sides.ours,
            }
            if density == typical(densities):  # the gather is a small part: one compilation
                makers[f"compiled: dense, then gather, {label}"] = sides.compiled
            for name, make in makers.items():
                contenders[name] = attempt(partial(make, name, pattern, density))
        packed = packed_pattern(shape, 0.01, device=device)
        name = f"ours, {_PACKED}"
        contenders[name] = attempt(partial(sides.ours, name, packed, 0.01))
        facts = {"operations": "those of the dense product, for everyone"}
        return Prepared(contenders, DENSE, targets=_targets(shape, dtype), facts=facts)

    return Case(case_name(_OP, (*shape, tokens), dtype), build)


def _targets(shape: tuple[int, int], dtype: str) -> tuple[Target, ...]:
    if shape not in _TARGET_SHAPES or dtype != "bf16":
        return ()
    return (faster(0.85, "ours, 1%", DENSE), faster(2.5, "ours, 0.05%", DENSE))


class _Sides:
    """The contenders on one pair of operands, each held against the product in fp64."""

    def __init__(self, dy: Tensor, x: Tensor) -> None:
        self.dy, self.x = dy, x
        self.exact = (dy.double().t() @ x.double()).flatten()
        self.theirs = _dense_fp32(dy, x, self.exact)
        self.operands = dy.element_size() * (dy.numel() + x.numel())
        self.flops = 2.0 * self.exact.numel() * len(dy)

    def check(self, name: str, got: Tensor, at: Tensor | slice) -> list[Check]:
        """As accurate as torch's product, rounded to the same dtype."""
        theirs, exact = self.theirs[at].to(got.dtype), self.exact[at]
        return [as_accurate(name, got.flatten(), theirs, exact)]

    def dense(self) -> Contender:
        def run() -> Tensor:
            return self.dy.t() @ self.x

        moved = self.operands + self.exact.numel() * self.dy.element_size()
        checks = self.check(DENSE, run(), slice(None))
        return Contender(run, checks, bytes=moved, flops=self.flops)

    def moved(self, pattern: SparsePattern, itemsize: int) -> int:
        """The operands once; per entry an index of 4 bytes and a value."""
        return self.operands + pattern.nnz * (4 + itemsize)

    def gathered(self, name: str, pattern: SparsePattern, density: float) -> Contender:
        at = pattern.indices.long()

        def run() -> Tensor:
            return _gathered(self.dy, self.x, at)

        return Contender(
            run,
            self.check(name, run(), at),
            density=density,
            bytes=self.moved(pattern, self.dy.element_size()),
            flops=self.flops,
        )

    def compiled(self, name: str, pattern: SparsePattern, density: float) -> Contender:
        at = pattern.indices.long()
        made = compiled(
            _gathered,
            self.dy,
            self.x,
            at,
            check=lambda got: self.check(name, got, at),
            density=density,
        )
        made.bytes, made.flops = self.moved(pattern, self.dy.element_size()), self.flops
        return made

    def addmm(self, name: str, pattern: SparsePattern, density: float) -> Contender:
        sparse = csr_tensor(pattern, self.dy.new_zeros(pattern.nnz))
        at = pattern.indices.long()

        def run() -> Tensor:
            return torch.sparse.sampled_addmm(sparse, self.dy.t(), self.x, beta=0.0).values()

        return where_torch_can(
            run,
            lambda got: self.check(name, got, at),
            density=density,
            bytes=self.moved(pattern, self.dy.element_size()),
            flops=self.flops,
        )

    def ours(self, name: str, pattern: SparsePattern, density: float) -> Contender:
        def run() -> Tensor:
            return sampled_weight_grad(self.dy, self.x, pattern)

        backend = resolve_backend("sampled_weight_grad", self.dy, self.x, pattern.indices)
        return Contender(
            run,
            self.check(name, run(), pattern.indices.long()),
            {"backend": backend, "nnz": pattern.nnz},
            ours=True,
            density=density,
            bytes=self.moved(pattern, 4),
            flops=self.flops,
        )


def _gathered(dy: Tensor, x: Tensor, at: Tensor) -> Tensor:
    return (dy.t() @ x).flatten()[at]


def _dense_fp32(dy: Tensor, x: Tensor, exact: Tensor) -> Tensor:
    """torch's product of the same operands, unrounded.

    On NVIDIA GPUs tensor cores can make it of bf16 and fp16 too; the one that loses more is the
    measure, as ours may sum either way.
    """
    products = [(dy.float().t() @ x.float()).flatten()]
    if dy.is_cuda and torch.version.hip is None and dy.dtype != torch.float32:
        products.append(torch.mm(dy.t(), x, out_dtype=torch.float32).flatten())
    return max(products, key=lambda product: rel_rms(product, exact))


def _build(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    check_shape(_OP, _DIMS, shape)
    check_densities(_OP, densities)
    out, inner, tokens = shape
    return sampled_grad_case((out, inner), tokens, densities, dtype)


BENCH = OpBench(
    name=_OP,
    summary="a linear weight's gradient at the mask against the dense gradient",
    dims=_DIMS,
    shapes={
        "cuda": (
            (4096, 4096, 4096),
            (11008, 4096, 4096),
            (4096, 4096, 16384),
            (11008, 4096, 16384),
            (768, 768, 4096),
            (3072, 768, 4096),
            (768, 768, 16384),
            (3072, 768, 16384),
        ),
        "cpu": ((768, 768, 1024),),
        "tiny": ((256, 192, 64),),
    },
    dtypes=_DTYPES,
    densities=_DENSITIES,
    build=_build,
)
