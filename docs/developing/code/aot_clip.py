"""Ahead-of-time cases of the clip kernel."""

from __future__ import annotations

from aot_harness import Case


def cases() -> list[Case]:
    import triton.language as tl
    from sparseft_kernels.clip import CLIP

    names = ("weight_ptr", "base_ptr")
    return [
        Case(
            f"clip_to_base_kernel-{dtype}",
            "clip",
            "_clip_to_base_kernel",
            {
                **dict.fromkeys(names, f"*{dtype}"),
                "indices_ptr": "*i32",
                "limit": "fp32",
                "nnz": "i32",
            },
            {"BLOCK": CLIP.block, "DTYPE": kind},
            CLIP.num_warps,
            (*names, "indices_ptr"),
        )
        for dtype, kind in (("fp32", tl.float32), ("bf16", tl.bfloat16))
    ]
