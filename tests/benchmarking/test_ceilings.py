"""Ceilings measured in the run, shares of them, and memory that is not there."""

from __future__ import annotations

import json

import pytest
import torch

from sparseft.benchmarking import ceilings as module
from sparseft.benchmarking import limits
from sparseft.benchmarking.ceilings import Ceilings, measure_ceilings
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt, run_suite

GIB = 1 << 30


def test_a_copy_counts_twice_and_a_product_two_a_multiplication(monkeypatch):
    """Every run is said to take 1 ms, but the first of each two."""

    def clocked(contenders, **options):
        for run in contenders.values():
            run()
        return Timing("device", {"it": [9.0, 1e-3, 2e-3]})

    monkeypatch.setattr(module, "rotate", clocked)
    found = measure_ceilings("cpu", ["fp32", "bf16"], quick=True)
    assert found.copy == pytest.approx(2 * (32 << 20) / 1e-3)
    assert found.gemm == {"fp32": pytest.approx(2 * 256**3 / 1e-3)} | {
        "bf16": pytest.approx(2 * 256**3 / 1e-3)
    }
    assert found.sizes == {"copy": 32 << 20, "fp32": 256, "bf16": 256}


def test_what_is_measured_here_is_plausible():
    found = measure_ceilings("cpu", ["fp32"], quick=True)
    assert 1e8 < found.copy < 1e13
    assert 1e7 < found.gemm["fp32"] < 1e15
    json.dumps(found.to_json())
    assert "GB/s; GEMM fp32" in str(found)


def test_they_are_read_from_the_clock_of_the_figures_beside_them(monkeypatch):
    clocks = []

    def clocked(contenders, *, clock, **options):
        clocks.append(clock)
        return Timing(clock, {"it": [1.0, 2.0]})

    monkeypatch.setattr(module, "rotate", clocked)
    measure_ceilings("cpu", ["fp32"], quick=True, clock="cpu")
    assert set(clocks) == {"cpu"}


def test_slow_machines_get_smaller_products(monkeypatch):
    sides = []
    real = module._square
    monkeypatch.setattr(module, "_square", lambda n, *a: sides.append(n) or real(8, *a))
    # 256 takes 30 ms: 512 would take 0.24 s, and is the smallest there is.
    monkeypatch.setattr(module, "_fastest", lambda *a: 30e-3)
    module._gemm(torch.float32, torch.device("cpu"), quick=False, clock=None)
    monkeypatch.setattr(module, "_fastest", lambda *a: 1e-3)
    module._gemm(torch.float32, torch.device("cpu"), quick=False, clock=None)
    assert sides == [256, 512, 256, 1024]


def test_the_copied_buffer_fits_into_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "memory_free", lambda device: 100 << 20)
    monkeypatch.setattr(module, "_copy_seconds", lambda size, *a: asked.append(size) or 1.0)
    measure_ceilings("cpu", [])
    assert asked == [16 << 20]


def test_shares_are_of_what_is_known():
    found = Ceilings(copy=100e9, gemm={"fp32": 2e12})
    assert found.shares(5e9, 1e12, "fp32", 0.1) == {
        "GB/s": pytest.approx(50),
        "% of copy": pytest.approx(50),
        "TFLOP/s": pytest.approx(10),
        "% of GEMM": pytest.approx(500),
    }
    assert found.shares(None, 1e12, "bf16", 1.0) == {"TFLOP/s": pytest.approx(1)}
    assert found.shares(None, None, "fp32", 1.0) == {}


def test_the_suite_fills_them_in():
    def build(device):
        moved = Contender(list, bytes=1e6, flops=2e6, ours=True, density=0.1)
        return Prepared({"a": moved, "b": Contender(list)}, "a")

    [result] = run_suite(
        [Case("x", build, op="x", shape=(3, 4), dtype="fp32")],
        "cpu",
        rounds=2,
        ceilings=Ceilings(copy=1e9, gemm={"fp32": 1e12}),
        clock="wall",
    )
    a, b = result["contenders"]
    seconds = a["clocks"]["wall"]["seconds"]["median"]
    assert a["speed"]["GB/s"] == pytest.approx(1e-3 / seconds)
    assert a["speed"]["% of copy"] == pytest.approx(1e-1 / seconds)
    assert a["speed"]["% of GEMM"] == pytest.approx(2e-4 / seconds)
    assert b["speed"] == {}
    assert (result["op"], result["shape"], result["dtype"]) == ("x", [3, 4], "fp32")
    assert (a["ours"], a["density"], b["ours"], b["density"]) == (True, 0.1, False, None)


def test_a_clock_and_a_number_of_warm_ups_can_be_given():
    runs = []
    case = Case("x", lambda d: Prepared({"a": Contender(lambda: runs.append(1))}, "a", ("device",)))
    [result] = run_suite([case], "cpu", rounds=2, clock="cpu", warmup=1)
    assert list(result["contenders"][0]["clocks"]) == ["cpu"]
    assert len(runs) == 3


# Memory.


def test_memory_left_is_the_least_of_the_system_and_the_group(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   4194304 kB\n")
    monkeypatch.setattr(limits, "_MEMINFO", meminfo)
    monkeypatch.setattr(limits, "_CGROUP", tmp_path)
    assert limits.memory_free("cpu") == 4 * GIB
    for name, text in (("max", 3 * GIB), ("current", 2 * GIB)):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 2}\n")
    assert limits.memory_free("cpu") == 1.5 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert limits.memory_free("cpu") == 4 * GIB
    monkeypatch.setattr(limits, "_MEMINFO", tmp_path / "nowhere")
    assert limits.memory_free("cpu") > 0


def test_free_memory_of_a_gpu_counts_what_torch_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda where: 8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 5)
    assert limits.memory_free("cuda") == 13


def test_a_case_that_needs_more_is_skipped_with_both_numbers(monkeypatch):
    monkeypatch.setattr(limits, "memory_free", lambda device: 2 * GIB)

    def build(device):
        limits.require_memory(3 * GIB, device)
        raise AssertionError("went on")

    [result] = run_suite([Case("x", build)], "cpu", rounds=2)
    assert result["status"] == "skipped"
    assert result["reason"] == "needs 3.0 GiB of memory; cpu has 2.0 GiB"
    limits.require_memory(2 * GIB, "cpu")


def test_what_ran_out_of_memory_is_skipped_with_what_it_asked_for():
    def hungry(device=None):
        torch.empty(1 << 50)

    [result] = run_suite([Case("x", hungry)], "cpu", rounds=2)
    assert result["status"] == "skipped"
    assert "asked for 4096.0 TiB more; cpu has" in result["reason"]
    contender = attempt(hungry)
    assert contender.status == "skipped"
    assert "4096.0 TiB" in contender.skipped
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    assert "asked for 20.00 GiB" in limits.out_of_memory(cuda, "cpu")
    assert limits.out_of_memory(RuntimeError("something else"), "cpu") == ""
