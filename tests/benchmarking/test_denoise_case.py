"""The cases of denoising and selection: both sides do what they say, and what is wrong is red."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from sparseft.benchmarking import denoise_cases, select_case
from sparseft.benchmarking.cases import denoise, select
from sparseft.benchmarking.cases.encoders import matrix_shapes, random_differences
from sparseft.benchmarking.cases.truncated_svd import cut_full
from sparseft.benchmarking.rotation import rotate
from sparseft.benchmarking.suite import run_suite

CPU = torch.device("cpu")


def rows_of(result):
    return {row["name"]: row for row in result["contenders"]}


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setenv("SPARSEFT_BENCH_COMPILE", "0")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_both_commands_on_tiny_shapes(one_thread):
    cases = [*denoise_cases("tiny", rank=8, clock="cpu"), select_case("tiny", rank=8, clock="cpu")]
    results = run_suite(cases, "cpu", rounds=2)
    assert [r["status"] for r in results] == ["ok"] * 3
    for result in results:
        assert not result["targets"], "they are for other shapes"
        for row in result["contenders"]:
            assert row["clocks"]["cpu"]["seconds"]["median"] > 0
    svd = rows_of(results[0])
    assert list(svd) == [denoise.FULL, denoise.LOWRANK, denoise.OURS]
    assert len(svd[denoise.OURS]["checks"]) == 4  # against svd_lowrank; optimal, three shapes
    chosen = rows_of(results[2])
    assert list(chosen) == [
        select.PEER,
        select.TORCH,
        select.MAGNITUDE,
        select.LOOP,
        select.DENOISED,
    ]


def test_the_shapes_of_an_encoder():
    shapes = matrix_shapes("xlmr_base")
    counts = {s: list(shapes.values()).count(s) for s in set(shapes.values())}
    assert counts == {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}


def test_the_plain_way_of_pruning_is_ours():
    from sparseft import Denoise, denoised

    deltas = random_differences([("a", (40, 24)), ("b", (24, 40))], CPU)
    given = [(n, x, torch.zeros_like(x)) for n, x in deltas.items()]
    for (_, value), (_, delta, _) in zip(
        denoised(given, Denoise(rank=4, residual=0.1)), given, strict=True
    ):
        plain = denoise.pruned(delta, cut_full(delta, 4), 0.1)
        assert torch.allclose(value, plain, atol=1e-6 * float(delta.abs().max()))


def test_list_and_partition_keeps_the_largest():
    generator = torch.Generator().manual_seed(0)
    pairs = {n: (torch.randn(s, generator=generator), torch.zeros(s)) for n, s in
             {"a": (5, 7), "b": (11,)}.items()}  # fmt: skip
    masks = select.list_and_partition(pairs, 9)
    sizes = torch.cat([new.abs().view(-1) for new, _ in pairs.values()])
    kept = torch.cat([mask.view(-1) for mask in masks.values()])
    assert int(kept.sum()) == 9
    assert float(sizes[kept].min()) > float(sizes[~kept].max())


def test_a_wrong_selection_is_not_timed(monkeypatch):
    real = select.select

    def worse(model, method, *, nnz, **options):
        if method == "magnitude":
            return real(model, "random", nnz=nnz)
        return real(model, method, nnz=nnz, **options)

    monkeypatch.setattr(select, "select", worse)
    [result] = run_suite([select_case("tiny", rank=8)], "cpu", rounds=2)
    assert result["status"] == "red"
    row = rows_of(result)[select.MAGNITUDE]
    assert "clocks" not in row
    assert "largest left out over smallest kept" in row["reason"]
    assert "competitor's masks lack" in row["reason"]


def test_worse_singular_vectors_are_not_timed(monkeypatch):
    real = denoise.plan_svd
    monkeypatch.setattr(
        denoise, "plan_svd", lambda s, rank: real(s, rank=rank, method="block", power_iterations=0)
    )
    case = denoise_cases("tiny", rank=8)[0]
    [result] = run_suite([case], "cpu", rounds=2)
    row = rows_of(result)[denoise.OURS]
    assert row["status"] == "red"
    assert "residual over" in row["reason"]


def test_extra_memory_is_the_peak():
    def touched(size):
        """Pages of the system's own: an allocator may have some left over in this process."""
        pages = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
        pages[:] = 1
        return pages

    def grown(run):
        # The system may take pages from the process meanwhile, after which it grew by less.
        sizes = [select.extra_bytes(run)[1] for _ in range(3)]
        if None in sizes:
            pytest.skip("this system does not say what a process's peak is")
        return max(sizes)

    assert 0.9 * 48_000_000 < grown(lambda: touched(48_000_000)) < 2 * 48_000_000

    def peak():
        touched(64_000_000)
        return 0

    assert grown(peak) > 0.9 * 64_000_000


def test_processor_time_needs_one_thread(one_thread):
    timing = rotate({"a": lambda: sum(range(1000))}, clock="cpu", rounds=2)
    assert timing.clock == "cpu"
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="needs one thread on a CPU, and this is 2 on cpu"):
        rotate({"a": lambda: None}, clock="cpu", rounds=2)
