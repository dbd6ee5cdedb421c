"""Every kernel compiles ahead of time for the GPUs we mean to serve, within limits, without a GPU.

Thresholds: no spills, no local memory, shared memory under what one block may have on each target,
matrix instructions where a case says so. The cases lie in `aot_<family>.py`, one file a family.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter lane compiles nothing"
)
HERE = Path(__file__).resolve().parent


def load(name: str):
    """Import a file of this folder, which is no package; the case files import the harness by
    name.
    """
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


harness = load("aot_harness")
FAMILIES = sorted(file.stem for file in HERE.glob("aot_*.py") if file.stem != "aot_harness")
# The register limits are for occupancy and were set with 3.9. The ptxas of 3.6 takes up to half as
# many again for the same kernels, without a spill.
RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
CASES = [case for family in FAMILIES for case in load(family).cases()]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile anew, unless the run names a cache (keyed by source and version) to share."""
    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.parametrize(
    ("case", "target"),
    [pytest.param(c, t, id=f"{c.name}-{t}") for c in CASES for t in c.targets],
)
def test_compiles_within_limits(case, target, tmp_path):
    compiled = harness.compile_case(case, target)
    assert compiled.metadata.shared <= harness.SHARED_LIMIT[target]
    used = harness.usage(compiled, target, tmp_path)
    assert used["stack"] == 0, used
    assert used["local"] == 0, used
    assert used["global"] > 0, "the machine code was not read as expected"
    if case.max_registers is not None and RELEASE >= (3, 9):
        assert used["registers"] <= case.max_registers, used
    if case.needs_mma:
        assert used["mma"] > 0, used


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_every_kernel_has_a_case():
    import sparseft_kernels

    kernels = set()
    for file in Path(sparseft_kernels.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels.add(node.name)
    assert kernels == {c.kernel for c in CASES}
