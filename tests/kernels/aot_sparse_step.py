"""Ahead-of-time cases of the fused optimizer step.

Registers: 64 keep 1024 threads an SM resident, 80 keep 768, 96 keep 640, 128 keep 512, 160 keep
384. A thread of AdamW reads 8 entries of 26 bytes (bf16 weight) before it computes, so 640 threads
have 130 KB in flight; 4.3 TB/s at 0.8 us of latency ask for 26 KB an SM. So the limits only hold
what the compiler gives now. (Reckoned from ahead-of-time figures; nothing was timed on a GPU.)
"""

from __future__ import annotations

from aot_harness import Case


def cases() -> list[Case]:
    import triton.language as tl

    from sparseft_kernels._configs import OPTIMIZER

    tables = {"table_ptr": "*i64", "rates_ptr": "*fp64"}
    out = [
        Case(
            f"rates_kernel-{rule}",
            "sparse_step",
            "_rates_kernel",
            {
                **tables,
                "hyper_ptr": "*fp64",
                "grad_scale_ptr": "*fp32",
                "found_inf_ptr": "*fp32",
                "tensors": "i32",
            },
            {"BLOCK": 128, "RULE": rule, "SCALED": True, "CHECKED": True},
            num_warps=4,
            aligned=("table_ptr", "hyper_ptr", "rates_ptr"),
            max_registers=64,  # one block of it runs
        )
        for rule in ("adamw", "sgd", "lion")
    ]

    def step(name: str, max_registers: int, **changed: object) -> Case:
        constants = {
            "BLOCK": OPTIMIZER.block,
            "RULE": "adamw",
            "MOMENTUM": True,
            "VALUE": tl.float32,
            "EIGHT_BITS": False,
            "WEIGHT": tl.bfloat16,
            "INDEX": tl.int32,
            "WIDE": tl.float32,
            "STOCHASTIC": False,
            "ALIGNED": True,
            **changed,
        }
        return Case(
            f"step_kernel-{name}",
            "sparse_step",
            "_step_kernel",
            {**tables, "block_tensor_ptr": "*i32", "entries": "i32"},
            constants,
            OPTIMIZER.num_warps,
            ("table_ptr", "block_tensor_ptr", "rates_ptr", "entries"),
            max_registers=max_registers,
        )

    double = {"VALUE": tl.float64, "WEIGHT": tl.float64, "WIDE": tl.float64}
    return [
        *out,
        step("adamw-bf16", 96),
        step("adamw-fp32-int64", 96, WEIGHT=tl.float32, INDEX=tl.int64),
        # scalar loads, each with an address of its own
        step("adamw-fp16-unaligned", 144, WEIGHT=tl.float16, ALIGNED=False),
        step("adamw-fp64", 168, **double),
        step("adamw-fp16-stochastic", 104, STOCHASTIC=True, WEIGHT=tl.float16),
        step("adamw-8bit-stochastic", 128, EIGHT_BITS=True, STOCHASTIC=True),
        step("adamw-ordinary-bf16", 64, VALUE=tl.bfloat16, WEIGHT=None),
        step("lion-bf16", 80, RULE="lion"),
        step("lion-8bit", 96, RULE="lion", EIGHT_BITS=True),
        step("sgd-bf16", 64, RULE="sgd", MOMENTUM=False),
        step("sgd-momentum-8bit", 96, RULE="sgd", EIGHT_BITS=True),
    ]
