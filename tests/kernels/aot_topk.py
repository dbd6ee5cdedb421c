"""Ahead-of-time cases of the exact top-k.

Counting keeps within 48 registers, so that 5 blocks of 256 threads stay resident on an SM, each
thread with 16-byte loads in flight; collecting, which scans and scatters, within 128. (Figures of
the compiler; nothing here was timed on a GPU.)
"""

from __future__ import annotations

from aot_harness import Case

TABLES = {
    "theta1_ptr": "*i64",
    "theta0_ptr": "*i64",
    "numel_ptr": "*i64",
    "span_tensor_ptr": "*i64",
    "span_start_ptr": "*i64",
    "span_ids_ptr": "*i64",
}


def cases() -> list[Case]:
    import triton.language as tl

    from sparseft_kernels._configs import TOPK

    def case(
        name: str, kernel: str, arguments: dict[str, str], types: dict, registers: int
    ) -> Case:
        constants = {"BLOCK": TOPK.block, **types}
        return Case(
            name, "topk", kernel, arguments, constants, TOPK.num_warps, (), max_registers=registers
        )

    def types(theta1, theta0=None, align: int | None = 16, nonnegative: bool = False) -> dict:
        out = {
            "DTYPE1": theta1,
            "DTYPE0": theta0 or theta1,
            "DIFFERENCE": theta0 is not None,
            "NONNEGATIVE": nonnegative,
        }
        return out if align is None else {**out, "ALIGN": align}

    sources = {
        "bf16": types(tl.bfloat16, tl.bfloat16),
        "fp32": types(tl.float32, tl.float32),
        "bf16-fp32": types(tl.bfloat16, tl.float32),
        "unaligned": types(tl.bfloat16, tl.bfloat16, align=1),
        "scores": types(tl.float32, nonnegative=True),
        "list": types(tl.int32),
    }
    count = {**TABLES, "bracket_ptr": "*i32", "counts_ptr": "*i32", "spans": "i32", "blocks": "i32"}
    histogram = {
        **TABLES, "state_ptr": "*i64", "histogram_ptr": "*i64",
        "blocks": "i32", "low": "i32", "high": "i32",
    }  # fmt: skip
    collect = {
        **TABLES, "begin_ptr": "*i64", "listed_ptr": "*i32", "cut_ptr": "*i64",
        "above_ptr": "*i32", "above_end_ptr": "*i64", "tied_ptr": "*i32", "tied_end_ptr": "*i64",
        "indices_ptr": "*i32", "keys_ptr": "*i32", "blocks": "i32",
    }  # fmt: skip
    sample = {
        "theta1_ptr": "*i64", "theta0_ptr": "*i64", "tensor_ptr": "*i64", "index_ptr": "*i64",
        "kind_ptr": "*i64", "keys_ptr": "*i32", "kind": "i32", "lanes": "i32",
    }  # fmt: skip
    out = [case(f"topk_count-{n}", "_count_kernel", count, t, 48) for n, t in sources.items()]
    for name in ("bf16", "list"):
        out.append(
            case(f"topk_histogram-{name}", "_histogram_kernel", histogram, sources[name], 64)
        )
    for name, from_list, with_keys in (
        ("bf16", False, False),
        ("bf16", False, True),
        ("fp32", False, True),
        ("list", True, False),
    ):
        flags = {"FROM_LIST": from_list, "WITH_KEYS": with_keys}
        label = f"topk_collect-{name}{'-keys' if with_keys else ''}"
        out.append(case(label, "_collect_kernel", collect, {**sources[name], **flags}, 128))
    lanes = types(tl.bfloat16, tl.bfloat16, align=None)
    out.append(case("topk_sample-bf16", "_sample_kernel", sample, lanes, 64))
    state = {"histogram_ptr": "*i64", "state_ptr": "*i64", "low": "i32"}
    out.append(Case("topk_digit", "topk", "_digit_kernel", state, {}, 4, ()))
    return out
