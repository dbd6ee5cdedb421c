"""Entries of one weight, held within a distance of their base values.

Each program owns BLOCK consecutive entries. Indices are unique, so every address has one writer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import Config
from sparseft_kernels._launch import launch, round_to, triton_dtype

__all__ = ["CLIP", "launch_clip_to_base"]

# 4 entries a thread. With the 8 of ENTRYWISE the two comparisons take 48 registers on sm_80 to
# sm_100, above the 40 that keep every thread of a processor resident (ahead-of-time figures).
CLIP = Config(block=512, num_warps=4)


@triton.jit
def _clip_to_base_kernel(
    indices_ptr, base_ptr, weight_ptr, limit, nnz, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):
    """weight[indices[e]] = rn(min(max(weight, base[e] - limit), base[e] + limit)), in fp32."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_bounds = offs < nnz
    dst = tl.load(indices_ptr + offs, mask=in_bounds, other=0).to(tl.int64)  # may pass 2**31
    weight = tl.load(weight_ptr + dst, mask=in_bounds, other=0.0).to(tl.float32)
    base = tl.load(base_ptr + offs, mask=in_bounds, other=0.0).to(tl.float32)
    # comparisons, not tl.minimum: a NaN stays a NaN, as in the reference
    weight = tl.where(weight < base - limit, base - limit, weight)
    weight = tl.where(weight > base + limit, base + limit, weight)
    tl.store(weight_ptr + dst, round_to(weight, DTYPE), mask=in_bounds)


def launch_clip_to_base(weight: Tensor, indices: Tensor, base: Tensor, limit: float) -> None:
    """Clip entries of a contiguous ``weight`` (16 or 32 bits) in place."""
    launch(
        _clip_to_base_kernel, indices.numel(), weight.device,
        indices, base, weight, float(limit),
        DTYPE=triton_dtype(weight.dtype), **CLIP._asdict(),
    )  # fmt: skip
