"""Ahead-of-time cases of the sampled gradients: the rows of the tile table on the devices that get
them, and the smaller kernels on all.
"""

from __future__ import annotations

from typing import Any

from aot_harness import TARGETS, Case

OPERANDS = ("a_ptr", "b_ptr")
SIZES = ("tokens", "rows", "cols", "slab", "part_stride", "first_tile")
STRIDES = ("stride_at", "stride_am", "stride_bt", "stride_bn")
# What the tables call each target.
ARCH = {"sm_80": ("cuda", (8, 0)), "sm_90": ("cuda", (9, 0)), "sm_100": ("cuda", (10, 0))}


def tile_case(
    name: str,
    config: Any,
    dtype: str,
    targets: tuple[str, ...],
    *,
    precision: str = "ieee",
    wide_codes: bool = False,
    loose: bool = False,
    widen: bool = False,
    accumulate: bool = False,
    cap: int = 512,
    mma: bool = True,
) -> Case:
    """One build of the tile kernel; ``loose``: operands in no way aligned."""
    from sparseft_kernels._configs import PLACE_SHIFT

    unit = 1 if loose else 8
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_T": config.block_t,
        "CAP": cap,
        "A_UNIT": unit,
        "B_UNIT": unit,
        "WIDEN": widen,
        "PRECISION": precision,
        "ACCUMULATE": accumulate,
        "SHIFT": PLACE_SHIFT,
        "stride_am": 1,
        "stride_bn": 1,
    }
    return Case(
        f"tile_grad-{name}",
        "sampled_grad",
        "_tile_grad_kernel",
        {
            "a_ptr": f"*{dtype}",
            "b_ptr": "*fp32" if widen else f"*{dtype}",
            "codes_ptr": "*i64" if wide_codes else "*u32",
            "work_ptr": "*i32",
            "out_ptr": "*fp32",
            **dict.fromkeys((*SIZES, *STRIDES), "i32"),
        },
        constants,
        config.num_warps,
        ("codes_ptr", "out_ptr") if loose else (*OPERANDS, "codes_ptr", "out_ptr"),
        num_stages=config.num_stages,
        max_registers=None,
        needs_mma=mma,
        fp_fusion=True,
        targets=targets,
    )


def tile_cases() -> list[Case]:
    from sparseft_kernels._configs import Target, tile_configs

    builds: dict[tuple[Any, str], list[str]] = {}
    for target in TARGETS:
        kind, capability = ARCH.get(target, ("hip", (9, 4)))
        for precision in ("half", "loose", "tf32", "ieee"):
            for row in tile_configs(Target(kind, capability, 132), precision):
                config = row._replace(resident=1, rate=1.0)  # what the compiler does not see
                users = builds.setdefault((config, precision), [])
                if not (kind == "hip" and precision == "tf32"):  # no such thing there
                    users.append(target)
    out = []
    for (config, precision), users in builds.items():
        targets, cap = tuple(users), config.cap
        name = (
            f"{config.block_m}x{config.block_n}x{config.block_t}-s{config.num_stages}-{precision}"
        )
        if precision == "half":
            out += [
                tile_case(f"bf16-{name}", config, "bf16", targets, cap=cap),
                tile_case(
                    f"fp16-{name}-accumulated", config, "fp16", targets[:1],
                    accumulate=True, wide_codes=True, cap=cap,
                ),
            ]  # fmt: skip
        elif precision == "loose":
            out.append(tile_case(f"bf16-{name}", config, "bf16", targets, loose=True, cap=cap))
        elif precision == "tf32" and targets:
            out.append(tile_case(f"fp32-{name}", config, "fp32", targets, precision=precision))
        elif targets:
            # Exact fp32 has matrix instructions on AMD alone. Operands of two dtypes end here too.
            out.append(
                tile_case(
                    f"fp32-{name}-mixed", config, "bf16", targets,
                    widen=True, loose=True, mma=targets == ("gfx942",), cap=cap,
                )
            )  # fmt: skip
    return out


def cases() -> list[Case]:
    from sparseft_kernels._configs import DOTS, EMBEDDING_ROWS, ENTRYWISE, TRANSPOSE

    out = tile_cases()
    out.append(
        Case(
            "sum_parts",
            "sampled_grad",
            "_sum_parts_kernel",
            {
                "parts_ptr": "*fp32", "out_ptr": "*fp32",
                "part_stride": "i32", "parts": "i32", "nnz": "i32",
            },
            {"BLOCK": ENTRYWISE.block, "ACCUMULATE": True},
            ENTRYWISE.num_warps,
            ("parts_ptr", "out_ptr"),
        )
    )  # fmt: skip
    out.append(
        Case(
            "transpose",
            "sampled_grad",
            "_transpose_kernel",
            {
                "x_ptr": "*bf16",
                "out_ptr": "*bf16",
                **dict.fromkeys(("tokens", "width", "pitch", "stride_t"), "i32"),
            },
            {"BLOCK_T": TRANSPOSE.block, "BLOCK_N": TRANSPOSE.block, "stride_n": 1},
            TRANSPOSE.num_warps,
            ("x_ptr", "out_ptr", "pitch", "stride_t"),
            max_registers=None,
        )
    )
    for dtype, index in (("bf16", "i32"), ("fp32", "i64")):
        out.append(
            Case(
                f"dot_grad-{dtype}-{index}",
                "sampled_grad",
                "_dot_grad_kernel",
                {
                    "at_ptr": f"*{dtype}", "bt_ptr": f"*{dtype}",
                    "indices_ptr": f"*{index}", "out_ptr": "*fp32",
                    "nnz": "i32", "cols": "i32", "pitch": "i32",
                },
                {"ENTRIES": DOTS.entries, "BLOCK_T": DOTS.block_t, "ACCUMULATE": True},
                DOTS.num_warps,
                ("at_ptr", "bt_ptr", "indices_ptr", "out_ptr", "pitch"),
                max_registers=None,
                fp_fusion=True,
                targets=TARGETS if index == "i32" else ("sm_90", "gfx942"),
            )
        )  # fmt: skip
    for dtype, index in (("bf16", "i32"), ("fp32", "i64")):
        pointers = ("order_ptr", "run_end_ptr", "entry_first_ptr", "entry_end_ptr")
        out.append(
            Case(
                f"embedding_grad-{dtype}-{index}",
                "sampled_grad",
                "_embedding_grad_kernel",
                {
                    "grad_ptr": f"*{dtype}", "ids_ptr": "*i64", "indices_ptr": f"*{index}",
                    "out_ptr": "*fp32", **dict.fromkeys(pointers, "*i64"),
                    "dim": "i32", "padding": "i32", "stride_t": "i32",
                },
                {
                    "POSITIONS": EMBEDDING_ROWS.positions, "ENTRIES": EMBEDDING_ROWS.entries,
                    "BY_FREQUENCY": index == "i64", "stride_d": 1,
                },
                EMBEDDING_ROWS.num_warps,
                ("grad_ptr", "ids_ptr", *pointers, "indices_ptr", "out_ptr", "stride_t"),
                max_registers=None,
                fp_fusion=True,
                targets=TARGETS if index == "i32" else ("sm_90", "gfx942"),
            )
        )  # fmt: skip
    return out
