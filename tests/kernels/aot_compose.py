"""Ahead-of-time cases of the composition over many tensors."""

from __future__ import annotations

from typing import Any

from aot_harness import Case

DTYPE_NAME = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Limits of 3.9; a loop over the values of each of four entries a thread.
RULES = {"sum": 48, "elect": 56, "largest": 56, "consensus": 56}


def cases() -> list[Case]:
    import triton.language as tl

    from sparseft_kernels._configs import COMPOSE, GATHER_REDUCE, MULTI_TENSOR

    out = []
    for kernel in ("_capture_many_kernel", "_restore_many_kernel"):
        for bits, index in (("i16", "i32"), ("i32", "i64")):
            signature = {
                "weights_ptr": "*i64",
                "block_tensor_ptr": "*i32",
                "indices_ptr": f"*{index}",
                "saved_ptr": f"*{bits}",
                "entries": "i32",
            }
            out.append(
                Case(
                    f"{kernel.strip('_')}-{bits}-{index}",
                    "compose",
                    kernel,
                    signature,
                    {"BLOCK": MULTI_TENSOR.block, "BITS": getattr(tl, f"int{bits[1:]}")},
                    MULTI_TENSOR.num_warps,
                    ("weights_ptr", "block_tensor_ptr", "indices_ptr", "saved_ptr", "entries"),
                )
            )
    for kind, registers in RULES.items():
        for dtype in DTYPE_NAME if kind == "sum" else ("bf16",):
            for capture in (True, False):
                out.append(_compose(kind, dtype, capture, registers, tl, COMPOSE))
    out.append(
        Case(
            "compose_grad_kernel",
            "compose",
            "_compose_grad_kernel",
            {
                **{n: "*fp32" for n in ("grad_ptr", "values_ptr", "coeffs_ptr")},
                **{n: "*fp32" for n in ("grad_values_ptr", "parts_ptr")},
                "indices_ptr": "*i32",
                "positions_ptr": "*i32",
                "ordinals_ptr": "*u8",
                "entries": "i32",
                "adapters": "i32",
            },
            {"BLOCK": GATHER_REDUCE.block, "WIDE": tl.float32, "VALUE": tl.float32},
            GATHER_REDUCE.num_warps,
            ("grad_ptr", "values_ptr", "grad_values_ptr", "positions_ptr", "ordinals_ptr"),
        )
    )
    return out


def _compose(kind: str, dtype: str, capture: bool, registers: int, tl: Any, config: Any) -> Case:
    signature = {
        "weights_ptr": "*i64",
        "block_tensor_ptr": "*i32",
        "block_entry_ptr": "*i64",
        "indices_ptr": "*i32",
        "counts_ptr": "*u8",
        "values_ptr": f"*{dtype}",
        "ordinals_ptr": "*u8",
        "coeffs_ptr": "*fp32",
        "base_ptr": f"*{dtype}",
        "saved_ptr": f"*{dtype}",
        "state_ptr": "*i32",
        "strength_ptr": "*fp32",
        "entries": "i32",
        "least": "i32",
    }
    constants = {
        "BLOCK": config.block,
        "KIND": kind,
        "VOTE": "sum",
        "MEAN": "count",
        "CAPTURE": capture,
        "WIDE": tl.float32,
        "DTYPE": getattr(tl, DTYPE_NAME[dtype]),
    }
    aligned = tuple(n for n in signature if n not in ("least",))
    return Case(
        f"compose_kernel-{kind}-{dtype}{'-capture' if capture else ''}",
        "compose",
        "_compose_kernel",
        signature,
        constants,
        config.num_warps,
        aligned,
        max_registers=registers,
    )
