"""The gradient of a linear layer's weight at a mask against torch's dense ``dY.T @ X``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparseft.benchmarking.checks import as_accurate, rel_rms
from sparseft.benchmarking.masks import packed_pattern, random_pattern
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared, Target, attempt, faster
from sparseft.diff import SparsePattern
from sparseft.ops import resolve_backend, sampled_weight_grad

__all__ = ["sampled_grad_case"]

_DENSITIES = (0.0005, 0.001, 0.01, 0.1)
_PACKED = "1 % in a tenth of the tiles"
# What must be reached, for layers of these shapes.
_TARGET_SHAPES = ((4096, 4096), (11008, 4096))


def sampled_grad_case(shape: tuple[int, int], tokens: int) -> Case:
    """Compare at several densities, for a weight of ``shape`` (out, in), in bf16."""

    def build(device: torch.device) -> Prepared:
        generator = torch.Generator(device).manual_seed(0)

        def drawn(width: int) -> Tensor:
            made = torch.randn(tokens, width, device=device, generator=generator)
            return made.to(torch.bfloat16)

        dy, x = drawn(shape[0]), drawn(shape[1])
        patterns = {f"{d:.2%}": random_pattern(shape, d, device=device) for d in _DENSITIES}
        patterns[_PACKED] = packed_pattern(shape, 0.01, device=device)
        exact = (dy.double().t() @ x.double()).flatten()
        theirs = _dense_fp32(dy, x, exact)
        contenders = {"dense dY.T @ X": Contender(lambda: dy.t() @ x)}
        for label, pattern in patterns.items():
            contenders[label] = attempt(partial(_contender, label, dy, x, pattern, theirs, exact))

        def derive(timing: Timing, name: str, contender: Contender) -> Facts:
            flops = 2.0 * shape[0] * shape[1] * tokens
            return {"dense-equivalent TFLOP/s": flops / timing.median(name) * 1e-12}

        targets: tuple[Target, ...] = ()
        if shape in _TARGET_SHAPES:
            targets = (
                faster(0.85, "1.00%", "dense dY.T @ X"),
                faster(2.5, "0.05%", "dense dY.T @ X"),
            )
        return Prepared(contenders, "dense dY.T @ X", targets=targets, derive=derive)

    return Case(f"sampled_grad/{shape[0]}x{shape[1]}/T{tokens}", build)


def _contender(
    label: str, dy: Tensor, x: Tensor, pattern: SparsePattern, theirs: Tensor, exact: Tensor
) -> Contender:
    at = pattern.indices.long()
    check = as_accurate(label, sampled_weight_grad(dy, x, pattern), theirs[at], exact[at])
    backend = resolve_backend("sampled_weight_grad", dy, x, pattern.indices)
    return Contender(
        lambda: sampled_weight_grad(dy, x, pattern),
        [check],
        {"backend": backend, "nnz": pattern.nnz},
    )


def _dense_fp32(dy: Tensor, x: Tensor, exact: Tensor) -> Tensor:
    """torch's product of the same bf16 operands, unrounded.

    On NVIDIA GPUs tensor cores can make it too; the one that loses more is the measure, as ours may
    sum either way.
    """
    products = [(dy.float().t() @ x.float()).flatten()]
    if dy.is_cuda and torch.version.hip is None:
        products.append(torch.mm(dy.t(), x, out_dtype=torch.float32).flatten())
    return max(products, key=lambda product: rel_rms(product, exact))
