"""Every kernel compiles ahead of time for the GPUs we mean to serve, within limits, without a GPU.

Thresholds: no spills, no local memory, shared memory under what one block may have on each target.
(The compiler does not check the last one; an over-limit kernel fails only at launch.)
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter lane compiles nothing"
)

# Target -> bytes of shared memory (LDS) one block may use.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@dataclass(frozen=True)
class Case:
    """One kernel with one set of argument types; `aligned` pointers are 16-byte aligned."""

    name: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    aligned: tuple[str, ...]


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
                    "compose",
                    kernel,
                    {**dict.fromkeys(names, f"*{bits}"), "indices_ptr": f"*{index}", "nnz": "i32"},
                    block,
                    ENTRYWISE.num_warps,
                    (*names, "indices_ptr"),
                )
            )
    for dtype, wide in (("bf16", tl.float32), ("fp16", tl.float32), ("fp32", tl.float32)):
        names = ("weight_ptr", "base_ptr")
        out.append(
            Case(
                f"write_sum_kernel-{dtype}",
                "compose",
                "_write_sum_kernel",
                {
                    **dict.fromkeys(names, f"*{dtype}"),
                    "values_ptr": "*fp32",
                    "indices_ptr": "*i32",
                    "nnz": "i32",
                },
                {**block, "WIDE": wide, "DTYPE": getattr(tl, DTYPE_NAME[dtype])},
                ENTRYWISE.num_warps,
                (*names, "values_ptr", "indices_ptr"),
            )
        )
    return out


DTYPE_NAME = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def gpu_target(name: str):
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def compile_case(case: Case, target: str):
    import importlib

    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"sparseft_kernels.{case.module}"), case.kernel)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=dict(case.constants), attrs=attributes
    )
    return triton.compile(
        source,
        target=gpu_target(target),
        options={"num_warps": case.num_warps, "enable_fp_fusion": False},
    )


def nvidia_usage(compiled, folder: Path) -> dict[str, int]:
    """Registers, stack bytes and counts of local loads and stores, from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"this Triton brings no cuobjdump ({tool})")
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])

    def dump(*flags: str) -> str:
        done = subprocess.run([tool, *flags, binary], capture_output=True, text=True, check=True)
        return done.stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    code = dump("--dump-sass")
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "global": len(re.findall(r"\b(?:LDG|STG)\b", code)),
    }


def amd_usage(compiled) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", text)[1])

    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local": field("vgpr_spill_count"),
        "global": len(re.findall(r"(?:global|buffer)_(?:load|store)", text)),
    }


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.parametrize("target", SHARED_LIMIT)
@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_compiles_within_limits(case, target, tmp_path):
    compiled = compile_case(case, target)
    assert compiled.metadata.shared <= SHARED_LIMIT[target]
    usage = amd_usage(compiled) if target.startswith("gfx") else nvidia_usage(compiled, tmp_path)
    assert usage["stack"] == 0, usage
    assert usage["local"] == 0, usage
    assert usage["global"] > 0, "the machine code was not read as expected"
    # entry-wise kernels: at most 40 registers keeps 2048 threads an SM resident on every target
    assert usage["registers"] <= 40, usage


def test_every_kernel_has_a_case():
    import ast

    import sparseft_kernels

    kernels = set()
    for file in Path(sparseft_kernels.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels.add(node.name)
    assert kernels == {c.kernel for c in cases()}
