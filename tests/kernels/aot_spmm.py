"""Ahead-of-time cases of the products with sparse diffs."""

from __future__ import annotations

from aot_harness import TARGETS, Case

DTYPE_NAME = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def cases() -> list[Case]:
    import triton.language as tl

    from sparseft_kernels._configs import EMBEDDING_DIFF, SPMM_FEW, SPMM_MANY, SPMM_ONE

    out = []
    tiles = (("one", SPMM_ONE, False), ("few", SPMM_FEW, False), ("many", SPMM_MANY, True))
    for name, tile, packed in tiles:
        for dtype in ("bf16", "fp32"):
            strides = {"stride_xt": 1} if packed else {"stride_xk": 1}
            loose = "stride_xk" if packed else "stride_xt"
            out.append(
                Case(
                    f"spmm-{name}-{dtype}",
                    "spmm",
                    "_spmm_kernel",
                    {
                        "x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "order_ptr": "*i32",
                        "table_ptr": "*i64", "out_ptr": f"*{dtype}",
                        "per_row": "i32", "width": "i32", "blocks": "i32", loose: "i32",
                    },
                    {
                        **strides, "BLOCK_T": tile.block_t, "BLOCK_M": tile.block_m,
                        "BLOCK_K": tile.block_k, "PACKED": packed, "ORDERED": dtype == "bf16",
                        "ADD": True, "DTYPE": getattr(tl, DTYPE_NAME[dtype]),
                    },
                    tile.num_warps,
                    ("x_ptr", "y_ptr", "order_ptr", "table_ptr", "out_ptr", loose),
                    max_registers=128,
                    fp_fusion=True,
                    targets=TARGETS if dtype == "bf16" else ("sm_90", "gfx942"),
                )
            )  # fmt: skip
    for dtype, ids in (("bf16", "i64"), ("fp32", "i32")):
        out.append(
            Case(
                f"embedding_diff-{dtype}-{ids}",
                "spmm",
                "_embedding_diff_kernel",
                {
                    "ids_ptr": f"*{ids}", "order_ptr": "*i32", "table_ptr": "*i64",
                    "out_ptr": f"*{dtype}", "per_row": "i32", "dim": "i32",
                },
                {
                    "BLOCK": EMBEDDING_DIFF.block, "ORDERED": dtype == "bf16",
                    "DTYPE": getattr(tl, DTYPE_NAME[dtype]),
                },
                EMBEDDING_DIFF.num_warps,
                ("ids_ptr", "order_ptr", "table_ptr", "out_ptr"),
                targets=TARGETS if dtype == "bf16" else ("sm_90", "gfx942"),
            )
        )  # fmt: skip
    return out
