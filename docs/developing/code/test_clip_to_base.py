"""`clip_to_base_`: its definition, its kernel's bits, its registration, its compile, its bench."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import clip_to_base
import pytest
import torch
from clip_to_base import clip_to_base_, clip_to_base_reference_

from sparseft.errors import DiffError, OptionError
from sparseft.ops import _backend

ROOT = Path(__file__).resolve().parents[3]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
LANES = [
    pytest.param(
        "cpu",
        id="interpret",
        marks=[
            pytest.mark.interpret,
            pytest.mark.skipif(not INTERPRETING, reason="own process, TRITON_INTERPRET=1"),
        ],
    ),
    pytest.param(
        "cuda",
        id="gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
        ],
    ),
]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tree the name is a line of the set itself."""
    monkeypatch.setattr(_backend, "_TRITON_OPS", _backend._TRITON_OPS | {"clip_to_base_"})


def operands(n: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(41, 100, generator=generator).to(dtype)
    indices = torch.randperm(weight.numel(), generator=generator)[:n].sort().values.int()
    base = weight.flatten()[indices.long()] + 0.05 * torch.randn(n, generator=generator).to(dtype)
    if n:
        weight.view(-1)[indices[0].long()] = float("nan")
    return weight.to(device), indices.to(device), base.to(device)


def test_the_definition():
    weight, indices, base = operands(1000)
    before = weight.clone()
    clip_to_base_(weight, indices, base, 0.02)
    at = indices.long()
    wanted = before.flatten()[at].clamp(base - 0.02, base + 0.02)
    assert torch.equal(weight.flatten()[at].nan_to_num(7), wanted.nan_to_num(7))
    outside = torch.ones(weight.numel(), dtype=torch.bool).index_fill_(0, at, False)
    assert torch.equal(weight.flatten()[outside], before.flatten()[outside])


def test_strides_are_written_through():
    weight, indices, base = operands(1000)
    turned = weight.T.contiguous().T
    assert not turned.is_contiguous()
    clip_to_base_(weight, indices, base, 0.02)
    clip_to_base_(turned, indices, base, 0.02)
    assert torch.equal(turned.nan_to_num(7), weight.nan_to_num(7))


def test_refusals():
    weight, indices, base = operands(10)
    for bad in (-1.0, float("nan")):
        with pytest.raises(OptionError, match="0 or more"):
            clip_to_base_(weight, indices, base, bad)
    with pytest.raises(DiffError, match="base has shape"):
        clip_to_base_(weight, indices, base[1:], 0.1)
    with pytest.raises(DiffError, match="Pass float32"):
        clip_to_base_(weight.double(), indices, base, 0.1)
    with pytest.raises(DiffError, match="no_grad"):
        clip_to_base_(weight.requires_grad_(), indices, base, 0.1)


def test_registration():
    op, (weight, indices, base) = torch.ops.sparseft.clip_to_base_, operands(50)
    torch.library.opcheck(op, (weight.nan_to_num(), indices, base, 0.1))


# Around one tile of 512 entries, and none.
@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 511, 512, 513, 3001])
def test_kernel_gives_the_reference_s_bits(n, dtype, device):
    weight, indices, base = operands(n, dtype, device)
    mine, theirs = weight.clone(), weight.clone()
    clip_to_base_reference_(theirs, indices, base, 0.02)
    clip_to_base_(mine, indices, base, 0.02, backend="triton")
    assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert n < 2 or not torch.equal(theirs.nan_to_num(7), weight.nan_to_num(7))


def load(path: Path):
    """Import a file of a folder that is no package; case files import the harness by name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(INTERPRETING, reason="the interpreter lane compiles nothing")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernel_compiles_within_limits(target, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    import clip_kernel

    monkeypatch.setitem(sys.modules, "sparseft_kernels.clip", clip_kernel)
    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    harness = load(ROOT / "tests" / "kernels" / "aot_harness.py")
    for case in load(Path(__file__).with_name("aot_clip.py")).cases():
        compiled = harness.compile_case(case, target)
        used = harness.usage(compiled, target, tmp_path)
        assert used["stack"] == used["local"] == 0, used
        assert used["global"] > 0
        assert used["registers"] <= case.max_registers, used


def test_bench_case_runs_and_is_right():
    from clip_case import BENCH

    from sparseft.benchmarking.ceilings import Ceilings
    from sparseft.benchmarking.suite import run_suite

    case = BENCH.case(BENCH.shapes["tiny"][0], BENCH.densities, "fp32")
    ceilings = Ceilings(copy=1e9, gemm={"fp32": 1e9})  # not measured: nothing here is a speed
    [found] = run_suite([case], "cpu", rounds=2, ceilings=ceilings)
    assert found["status"] == "ok", found
    assert {row["status"] for row in found["contenders"]} == {"ok"}
    assert clip_to_base.__name__ == "clip_to_base"
