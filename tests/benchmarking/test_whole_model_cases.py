"""Every case of composing, selecting, decomposing and denoising: tiny shapes run, wrong results are
red, bad shapes are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from sparseft.adapter import Adapter
from sparseft.benchmarking.cases import (
    benches_of,
    cholesky_inverse,
    composable_sft,
    compose_diffs,
    compose_methods,
    denoise,
    low_rank,
    residual,
    select,
    sketch,
    topk,
    truncated_svd,
)
from sparseft.benchmarking.cases.encoders import config_of, matrix_shapes, parameter_shapes
from sparseft.benchmarking.catalogue import SIZES, OpBench, case_name
from sparseft.benchmarking.suite import run_suite
from sparseft.composition import Composer
from sparseft.diff import SparseDiff

FILES = (
    "compose", "load", "compose_diffs", "compose_methods", "topk", "truncated_svd", "residual",
    "cholesky_inverse", "sketch", "low_rank", "denoise", "select",
)  # fmt: skip
BENCHES = {bench.name: bench for name in FILES for bench in benches_of(name)}
ALL = pytest.mark.parametrize("bench", BENCHES.values(), ids=BENCHES)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setenv("SPARSEFT_BENCH_COMPILE", "0")


def run(bench: OpBench, **changes):
    """One density; the first tiny shape."""
    shape, densities = bench.shapes["tiny"][0], bench.densities[-1:]
    case = bench.case(shape, densities, changes.get("dtype", bench.dtypes[0]))
    [result] = run_suite([case], "cpu", rounds=2, case_seconds=1, warmup=0)
    return result


@ALL
def test_a_tiny_case_is_green_on_both_sides(bench):
    result = run(bench)
    assert result["status"] == "ok", result
    assert result["op"] == bench.name
    assert result["name"] == case_name(bench.name, bench.shapes["tiny"][0], bench.dtypes[0])
    timed = [row for row in result["contenders"] if "clocks" in row]
    assert {row["ours"] for row in timed} == {True, False}
    assert result["baseline"] in {row["name"] for row in timed}
    for row in timed:
        assert row["checks"], f"{row['name']} is not gated"
    if bench.densities:
        assert {row["density"] for row in timed if row["ours"]} <= {bench.densities[-1], None}
        assert any(row["density"] for row in timed)
    for row in result["contenders"]:
        if row["status"] == "skipped":
            assert "=0" in row["reason"] or "not installed" in row["reason"]
    json.dumps(result)


@ALL
def test_shapes_that_are_none_are_refused_with_the_dims(bench):
    good = bench.shapes["tiny"][0]
    for shape in (good[:-1], (*good, 1), (*good[:-1], 0)):
        with pytest.raises(ValueError, match=rf"{bench.name}: .*wanted {bench.dims}"):
            bench.build(shape, bench.densities, bench.dtypes[0])
    with pytest.raises(ValueError, match=f"dtype is 'fp8'; wanted one of {bench.dtypes[0]}"):
        bench.build(good, bench.densities, "fp8")
    if bench.densities:
        for density in (0.0, 1.5, -0.1):
            with pytest.raises(ValueError, match=r"a number in \(0, 1\]"):
                bench.build(good, (density,), bench.dtypes[0])


@ALL
def test_shapes_of_every_size_are_taken(bench):
    assert set(bench.shapes) == set(SIZES)
    for shapes in bench.shapes.values():
        for shape in shapes:
            assert bench.build(shape, bench.densities, bench.dtypes[0]).name.startswith(bench.name)


# A wrong result, for each: what is spoilt, and whose row is red then.


def times(factor: float, real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **options: real(*args, **options) * factor


def spoil_composer(patch):
    real = Composer.switch

    def switch(self, which, *rest, **options):
        given = which if isinstance(which, dict) else dict.fromkeys(which, 1.0)
        real(self, {name: 0.7 * coeff for name, coeff in given.items()}, *rest, **options)

    patch.setattr(Composer, "switch", switch)
    return "Composer"


def spoil_load(patch):
    real = Adapter.load

    def negated(path, **options):
        adapter = real(path, **options)
        return Adapter({n: SparseDiff(d.indices, -d.values, d.shape) for n, d in adapter.items()})

    patch.setattr(Adapter, "load", negated)
    return "Adapter.load"


def spoil_diffs(patch):
    def without_one(weight, diffs, coeffs, packed):
        return real(weight, diffs, coeffs * torch.tensor([1.0, 0.0]), packed=packed)

    real = compose_diffs.compose_diffs
    patch.setattr(compose_diffs, "compose_diffs", without_one)
    return "ours"


def spoil_merged(patch):
    real = compose_methods.compose_adapters
    patch.setattr(
        compose_methods, "compose_adapters", lambda a, method, **o: real(a, method="linear", **o)
    )
    return "compose_adapters"


def spoil_topk(patch):
    real = topk.topk_differences

    def turned(pairs, k, backend=None):
        pairs = list(pairs)
        if backend is None:
            pairs[0] = (pairs[0][0], pairs[0][1] * 2, pairs[0][2])
        return real(pairs, k, backend=backend)

    patch.setattr(topk, "topk_differences", turned)
    return "ours"


def spoil_single(patch):
    real = topk.topk_single
    patch.setattr(
        topk,
        "topk_single",
        lambda s, k, per_row, backend=None: real(
            s if backend else s.flip(0), k, per_row=per_row, backend=backend
        ),
    )
    return "ours"


def spoil_svd(patch):
    real = truncated_svd.truncated_svd

    def less(*args, **options):
        found = real(*args, **options)
        return found._replace(S=found.S * 0.8)

    patch.setattr(truncated_svd, "truncated_svd", less)
    return "ours"


def spoil_plan(patch):
    real = denoise.plan_svd
    patch.setattr(denoise, "plan_svd", lambda s, rank, **o: real(s, rank=1, method="block", **o))
    return "ours"


def spoil_denoise(patch):
    patch.setattr(
        denoise, "denoised", lambda pairs, how: [(n, torch.zeros_like(x)) for n, x, _ in pairs]
    )
    return "ours"


def spoil_difference(patch):
    real = residual.difference_
    patch.setattr(residual, "difference_", lambda out, new, old: real(out, new * 2, old))
    return "difference_"


def spoil_prune(patch):
    real = residual.prune_residual_
    patch.setattr(residual, "prune_residual_", lambda d, u, v, k: real(d, u, v, k - 1))
    return "prune_residual_"


def spoil_cholesky(patch):
    real = cholesky_inverse.cholesky_inverse

    def transposed(*args):
        inverse, failed = real(*args)
        return inverse.mT.contiguous(), failed

    patch.setattr(cholesky_inverse, "cholesky_inverse", transposed)
    return "cholesky_inverse"


def spoil_sketch(patch):
    patch.setattr(sketch, "sign_sketch", times(-1, sketch.sign_sketch))
    return "sign_sketch"


def spoil_low_rank(patch):
    """The right result with the gradient of the identity."""
    real = low_rank.low_rank_approximation

    def straight(matrices, rank):
        return matrices + (real(matrices.detach(), rank=rank) - matrices.detach())

    patch.setattr(low_rank, "low_rank_approximation", straight)
    return "low_rank_approximation"


def spoil_select(patch):
    real = select.select
    patch.setattr(
        select, "select", lambda model, method, *, nnz, **options: real(model, "random", nnz=nnz)
    )
    return "select"


SPOILT = {
    "compose_switch": spoil_composer,
    "compose_language": spoil_composer,
    "compose_grid": spoil_composer,
    "compose_methods": spoil_composer,
    "compose_methods, merged": spoil_merged,
    "load": spoil_load,
    "compose_diffs": spoil_diffs,
    "topk": spoil_topk,
    "topk_single": spoil_single,
    "truncated_svd": spoil_svd,
    "svd_plan": spoil_plan,
    "denoise": spoil_denoise,
    "difference": spoil_difference,
    "prune_residual": spoil_prune,
    "cholesky_inverse": spoil_cholesky,
    "sketch": spoil_sketch,
    "low_rank": spoil_low_rank,
    "select": spoil_select,
}


def test_every_case_is_spoilt_below():
    assert {name.partition(",")[0] for name in SPOILT} == set(BENCHES)


SLOW = ("compose_language", "compose_grid")  # much as compose_switch


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SPOILT]
)
def test_a_wrong_result_is_red_and_has_no_time(name, monkeypatch):
    whose = SPOILT[name](monkeypatch)
    result = run(BENCHES[name.partition(",")[0]])
    assert result["status"] == "red", result
    red = [row for row in result["contenders"] if row["status"] == "red"]
    assert red
    for row in red:
        assert row["name"].startswith(whose)
        assert "at most" in row["reason"]
        assert "clocks" not in row


def test_a_wrong_competitor_is_red_too(monkeypatch):
    monkeypatch.setattr(compose_methods, "_PLAIN", {"linear": compose_methods.elected})
    result = run(BENCHES["compose_methods"])
    rows = {row["name"]: row for row in result["contenders"]}
    assert rows["torch, dense task vectors, linear"]["status"] == "red"
    assert rows["Composer, linear, 10%"]["status"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["compose_methods", "truncated_svd", "load", "sketch"])
def test_other_dtypes_are_green(name, dtype):
    assert run(BENCHES[name], dtype=dtype)["status"] == "ok"


# Encoders by three numbers.


def test_a_shape_of_three_numbers_is_xlmr_base():
    assert parameter_shapes((12, 768, 250_002)) == parameter_shapes("xlmr_base")
    assert matrix_shapes((12, 768)) == matrix_shapes("xlmr_base")


def test_any_width_makes_an_encoder():
    assert config_of((1, 50, 7))["num_attention_heads"] == 1
    shapes = parameter_shapes((1, 50, 7))
    assert shapes["embeddings.word_embeddings.weight"] == (7, 50)
    assert shapes["encoder.layer.0.intermediate.dense.weight"] == (200, 50)


# What the plain methods mean.


def test_plain_ties_elects_a_sign_and_takes_the_mean_of_those_that_have_it():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    one, other = base + torch.tensor([2.0, -1.0, 0.0, 4.0]), base + torch.tensor([4.0, 3.0, 0.0, 0])
    assert compose_methods.elected(base, one, other).tolist() == [4.0, 4.0, 1.0, 5.0]
    assert compose_methods.summed(base, one, other).tolist() == [7.0, 3.0, 1.0, 5.0]


def test_too_little_memory_skips_the_case_with_both_numbers(monkeypatch):
    from sparseft.benchmarking import limits

    monkeypatch.setattr(limits, "memory_free", lambda device: 1000)
    for name in ("compose_switch", "topk", "denoise"):
        result = run(BENCHES[name])
        assert result["status"] == "skipped"
        assert "of memory; cpu has 1000" in result["reason"]


def test_the_competitor_is_no_part_of_the_catalogue():
    assert benches_of(composable_sft.__name__.rpartition(".")[2]) == ()
