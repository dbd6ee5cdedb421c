"""Ahead-of-time cases of the capture, restore and write_sum kernels."""

from __future__ import annotations

from aot_harness import Case

DTYPE_NAME = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def cases() -> list[Case]:
    import triton.language as tl

    from sparseft_kernels._configs import ENTRYWISE

    block = {"BLOCK": ENTRYWISE.block}
    out = []
    for bits, index in (("i16", "i32"), ("i32", "i64")):
        for kernel in ("_capture_kernel", "_restore_kernel"):
            names = ("weight_ptr", "saved_ptr")
            out.append(
                Case(
                    f"{kernel.strip('_')}-{bits}-{index}",
                    "entries",
                    kernel,
                    {**dict.fromkeys(names, f"*{bits}"), "indices_ptr": f"*{index}", "nnz": "i32"},
                    block,
                    ENTRYWISE.num_warps,
                    (*names, "indices_ptr"),
                )
            )
    for dtype, name in DTYPE_NAME.items():
        names = ("weight_ptr", "base_ptr")
        out.append(
            Case(
                f"write_sum_kernel-{dtype}",
                "entries",
                "_write_sum_kernel",
                {
                    **dict.fromkeys(names, f"*{dtype}"),
                    "values_ptr": "*fp32",
                    "indices_ptr": "*i32",
                    "nnz": "i32",
                },
                {**block, "WIDE": tl.float32, "DTYPE": getattr(tl, name)},
                ENTRYWISE.num_warps,
                (*names, "values_ptr", "indices_ptr"),
            )
        )
    return out
