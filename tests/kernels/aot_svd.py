"""Ahead-of-time cases of what surrounds a truncated SVD."""

from __future__ import annotations

from aot_harness import TARGETS, Case

_NVIDIA = tuple(t for t in TARGETS if t.startswith("sm_"))
_AMD = tuple(t for t in TARGETS if not t.startswith("sm_"))


def _difference(
    name: str,
    types: tuple[str, str, str],
    ones: tuple[str, ...],
    wide: str,
    targets: tuple[str, ...] = TARGETS,
) -> Case:
    """Strides of ``ones`` are 1, the others multiples of 16."""
    import triton.language as tl

    from sparseft_kernels._configs import DIFFERENCE

    pointers = ("theta1_ptr", "theta0_ptr", "out_ptr")
    strides = [f"stride_{x}{d}" for x in "10o" for d in "mn"]
    return Case(
        f"svd_difference-{name}",
        "svd",
        "_difference_kernel",
        {
            **dict(zip(pointers, types, strict=True)),
            **dict.fromkeys(("m", "n", *(s for s in strides if s not in ones)), "i32"),
        },
        {
            "BLOCK": DIFFERENCE.block, "WIDE": getattr(tl, wide), "SUBTRACT": True,
            **dict.fromkeys(ones, 1),
        },
        DIFFERENCE.num_warps,
        (*pointers, "m", "n", *(s for s in strides if s not in ones)),
        max_registers=64,
        targets=targets,
    )  # fmt: skip


def _residual(
    kernel: str, tables: dict[str, str], precision: str, *, loose: bool = False, **constants: bool
) -> Case:
    """One build on the devices of a precision; ``loose``: rows of no known multiple of 16."""
    from sparseft_kernels._configs import RESIDUAL

    factored = ("delta_ptr", "left_ptr", "right_ptr")
    sizes = ("m", "n", "pitch", "r", *(("low", "high") if kernel == "histogram" else ()))
    flags = ("-ties" if constants.get("TIES") else "") + ("-loose" if loose else "")
    return Case(
        f"svd_residual-{kernel}-{precision}{flags}",
        "residual",
        f"_residual_{kernel}_kernel",
        {**dict.fromkeys(factored, "*fp32"), **tables, **dict.fromkeys(sizes, "i32")},
        {
            "BLOCK_M": RESIDUAL.block_m, "BLOCK_N": RESIDUAL.block_n, "BLOCK_K": RESIDUAL.block_k,
            "PRECISION": precision, **constants,
        },
        RESIDUAL.num_warps,
        (*factored, *tables, *(() if loose else ("n",)), "pitch", "r"),
        num_stages=RESIDUAL.num_stages,
        max_registers=None,
        needs_mma=True,
        # what counts ties is a part of what writes them: once for each maker
        targets=_AMD if precision == "ieee" else ("sm_90",) if kernel == "ties" else _NVIDIA,
    )  # fmt: skip


def cases() -> list[Case]:
    import triton.language as tl

    from sparseft_kernels._configs import SKETCH, cholesky_warps

    rows = ("stride_1n", "stride_0n", "stride_on")
    out = [
        _difference("bf16", ("*bf16", "*bf16", "*fp32"), rows, "float32"),
        _difference(
            "bf16-transposed", ("*bf16", "*bf16", "*fp32"),
            ("stride_1n", "stride_0n", "stride_om"), "float32", ("sm_90", "gfx942"),
        ),
        _difference("fp32-fp64", ("*fp32", "*fp64", "*fp64"), rows, "float64", ("sm_90",)),
        Case(
            "svd_sign_sketch",
            "svd",
            "_sign_sketch_kernel",
            {"out_ptr": "*fp32", "seed": "i64", "rows": "i32", "first": "i32", "width": "i32"},
            {
                "BLOCK": SKETCH.block, "TENSOR": 0x5BD1E995, "STEP": 0xFFFFFFFF,
                "DTYPE": tl.float32,
            },
            SKETCH.num_warps,
            ("out_ptr",),
            max_registers=80,
        ),
    ]  # fmt: skip
    vectors = {"gram_ptr": "*fp32", "shift_ptr": "*fp32", "inverse_ptr": "*fp32"}
    out.append(
        Case(
            "svd_cholesky_inverse-127",  # holds the most registers
            "svd",
            "_cholesky_inverse_kernel",
            {**vectors, "failed_ptr": "*i32"},
            {"R": 127, "PITCH": 128, "PADDED": 128},
            cholesky_warps(128),
            (*vectors, "failed_ptr"),
            max_registers=None,
        )
    )
    state = {"histogram_ptr": "*i64", "state_ptr": "*i64"}
    for precision in ("tf32x3", "ieee"):
        out += [
            _residual(
                "histogram",
                {"state_ptr": "*i64", "histogram_ptr": "*i64", "nan_ptr": "*i32"},
                precision,
            ),
            _residual("ties", {"cut_ptr": "*i64", "ties_ptr": "*i32"}, precision),
        ]
        tables = {"cut_ptr": "*i64", "ties_ptr": "*i32", "before_ptr": "*i64"}
        out.append(_residual("write", tables, precision, TIES=False))
        out.append(_residual("write", tables, precision, loose=True, TIES=True))
    out.append(
        Case(
            "svd_residual-digit", "residual", "_residual_digit_kernel", {**state, "low": "i32"}, {},
            4, tuple(state), targets=("sm_90", "gfx942"),
        )
    )  # fmt: skip
    return out
