"""What ahead-of-time cases are made of: `Case`, a compiler per target, and a reader of the machine
code.

A family declares its cases in `aot_<family>.py`, as ``def cases() -> list[Case]``; test_aot.py
finds the files by name and runs them all.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["SHARED_LIMIT", "TARGETS", "Case", "compile_case", "usage"]

# Target -> bytes of shared memory (LDS) one block may use. The compiler does not check it: an
# over-limit kernel fails only at launch.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TARGETS = tuple(SHARED_LIMIT)

# Matrix instructions as the disassembler spells them.
_MMA = {
    "sm_80": r"\bHMMA\b",
    "sm_90": r"\bHGMMA\b",
    "sm_100": r"\bUTC\w*MMA\b",
    "gfx942": r"\bv_mfma_",
}


@dataclass(frozen=True)
class Case:
    """One kernel with one set of argument types; `aligned` arguments are multiples of 16.

    The default of `max_registers` is for entry-wise kernels: 40 keep 2048 threads an SM resident on
    every target. None: whatever does not spill.
    """

    name: str
    module: str  # in sparseft_kernels
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    aligned: tuple[str, ...]
    num_stages: int = 1
    max_registers: int | None = 40
    needs_mma: bool = False
    fp_fusion: bool = False
    targets: tuple[str, ...] = TARGETS


def _gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def compile_case(case: Case, target: str) -> Any:
    """Return Triton's compiled kernel of a case for one target."""
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"sparseft_kernels.{case.module}"), case.kernel)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=dict(case.constants), attrs=attributes
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.fp_fusion,
    }
    return triton.compile(source, target=_gpu_target(target), options=options)


def usage(compiled: Any, target: str, folder: Path) -> dict[str, int]:
    """Return registers, stack bytes and counts of instructions, from the machine code.

    ``local`` counts local loads and stores (on AMD: spilled registers), ``global`` accesses of
    global memory, ``mma`` matrix instructions.
    """
    if target.startswith("gfx"):
        return _amd_usage(compiled.asm["amdgcn"], target)
    return _nvidia_usage(compiled.asm["cubin"], target, folder)


def _nvidia_usage(cubin: bytes, target: str, folder: Path) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"this Triton brings no cuobjdump ({tool})")
    code = _disassembly(tool, cubin, folder)
    held = re.search(r"REG:(\d+) STACK:(\d+)", code)
    assert held, "cuobjdump -res-usage prints no register count"
    return {
        "registers": int(held[1]),
        "stack": int(held[2]),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "global": len(re.findall(r"\b(?:LDG|STG|LDGSTS|UTMALDG)\b", code)),
        "mma": len(re.findall(_MMA[target], code)),
    }


def _disassembly(tool: Path, cubin: bytes, folder: Path) -> str:
    """What the tool prints of one binary, kept beside Triton's cache of the compiled kernels.

    The tool takes a quarter of a second, whatever the size: those who share the cache run it once.
    """
    kept = Path(os.environ["TRITON_CACHE_DIR"], "sass", hashlib.sha256(cubin).hexdigest())
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    binary = folder / "kernel.cubin"
    binary.write_bytes(cubin)
    done = subprocess.run(
        [tool, "-res-usage", "--dump-sass", binary], capture_output=True, text=True, check=True
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    half = kept.with_suffix(f".{os.getpid()}.tmp")  # never a half file under the name
    half.write_text(done.stdout, encoding="utf-8")
    half.replace(kept)
    return done.stdout


def _amd_usage(text: str, target: str) -> dict[str, int]:
    def field(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+)", text)
        assert found, f"the assembly names no {name}"
        return int(found[1])

    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local": field("vgpr_spill_count"),
        "global": len(re.findall(r"(?:global|buffer)_(?:load|store)", text)),
        "mma": len(re.findall(_MMA[target], text)),
    }
