"""The ops there are, and from what is typed to cases: everything wrong is refused by name."""

from __future__ import annotations

import functools
import math
import textwrap
import types

import pytest
import torch

from sparseft import benchmarking
from sparseft.benchmarking import OPS, cases
from sparseft.benchmarking.catalogue import DTYPES, SIZES
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.competitors import COMPILE, absent, compiled, compiled_for_any_size
from sparseft.benchmarking.planning import choose_ops, parse_shape, plan_cases
from sparseft.benchmarking.suite import Contender, attempt
from sparseft.errors import OptionError, UnknownNameError


def test_every_op_says_what_it_is_and_has_all_sizes():
    assert "sampled_grad" in OPS
    for name, op in OPS.items():
        assert name == op.name
        assert set(SIZES) == set(op.shapes), name
        assert op.dtypes
        assert set(op.dtypes) <= set(DTYPES)
        assert list(op.densities) == sorted(op.densities)
        assert all(0 < density <= 1 for density in op.densities)
        assert op.summary
        for shapes in op.shapes.values():
            assert shapes, name
            assert {len(shape) for shape in shapes} == {len(op.dims.split("x"))}
        # Nothing is allocated before a case is built, not even for the largest.
        for size, shapes in op.shapes.items():
            for shape in shapes:
                case = op.case(shape, op.densities, op.dtypes[0])
                assert case.name.startswith(f"{name}/"), size
                assert (case.op, case.shape, case.dtype) == (name, shape, op.dtypes[0])


def test_every_op_is_found_in_its_file():
    for name in OPS:
        assert name in {bench.name for bench in cases.benches_of(cases.file_of(name))}
    with pytest.raises(KeyError, match="nothing"):
        cases.file_of("nothing")


def test_two_ops_of_one_name_are_refused(adding, monkeypatch):
    monkeypatch.setattr(cases, "_files", lambda: ["one", "two"])
    monkeypatch.setattr(cases, "benches_of", lambda name: (adding(),))
    with pytest.raises(ValueError, match=r"op 'adding'; one is two\.py"):
        cases.find_ops()


def test_a_case_file_may_have_one_several_or_no_benches(adding, monkeypatch):
    one, two = adding("one"), adding("two")
    module = types.SimpleNamespace()
    monkeypatch.setattr(cases.importlib, "import_module", lambda name: module)
    assert cases.benches_of("x") == ()
    module.BENCH = one
    assert cases.benches_of("x") == (one,)
    module.BENCHES = (one, two)
    assert cases.benches_of("x") == (one, two)


def test_the_package_gives_what_it_names_and_its_example_runs(monkeypatch):
    monkeypatch.setenv(COMPILE, "0")
    quick = functools.partial(benchmarking.measure_ceilings, quick=True)
    monkeypatch.setattr(benchmarking, "measure_ceilings", quick)
    for name in benchmarking.__all__:
        assert getattr(benchmarking, name) is not None
        assert name in dir(benchmarking)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        benchmarking.nothing  # noqa: B018
    shown = benchmarking.__doc__.split("in Python:\n")[1].split("\nand to time")[0]
    lines = textwrap.dedent(shown).replace("(768, 768, 4096)", "(32, 16, 8)")
    names = {}
    exec(compile(lines, "example", "exec"), names)
    assert names["result"]["status"] == "ok"
    assert any(row.get("speed") for row in names["result"]["contenders"])


# What is typed.


def test_ops_are_chosen_by_name_each_once(adding):
    ops = {name: adding(name) for name in ("one", "two", "three")}
    assert [op.name for op in choose_ops(["two", "one", "two"], ops)] == ["two", "one"]
    assert [op.name for op in choose_ops(["two", "all"], ops)] == ["one", "two", "three"]
    with pytest.raises(UnknownNameError, match=r"'thre'. Did you mean 'three'.*one, two, three"):
        choose_ops(["thre"], ops)


@pytest.mark.parametrize("text", ["", "8xa", "8x", "x8", "8x0", "-8x8", "8.5x8", "8 x8", "٣x3"])
def test_shapes_of_anything_but_positive_numbers_are_refused(text):
    with pytest.raises(OptionError, match="wanted whole numbers of 1 or more"):
        parse_shape(text)


def test_a_shape_is_numbers():
    assert parse_shape("768x3072X16") == (768, 3072, 16)
    assert parse_shape("7") == (7,)


def test_defaults_are_the_sizes_shapes_and_the_first_dtype(adding):
    planned = plan_cases([adding()], "tiny")
    assert [plan.shape for plan in planned] == [(8, 8), (4, 4)]
    assert {plan.dtype for plan in planned} == {"fp32"}
    assert {plan.densities for plan in planned} == {(0.01, 0.1)}
    assert [plan.case.name for plan in planned] == ["adding/8x8/fp32", "adding/4x4/fp32"]


def test_what_is_asked_for_replaces_the_defaults(adding):
    planned = plan_cases(
        [adding()], "cpu", shapes=["2x3", "2x3"], densities=[0.5, 0.2, 0.5], dtypes=["bf16", "fp32"]
    )
    assert [(p.shape, p.dtype, p.densities) for p in planned] == [
        ((2, 3), "bf16", (0.2, 0.5)),
        ((2, 3), "fp32", (0.2, 0.5)),
    ]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_densities_outside_are_refused(adding, density):
    with pytest.raises(OptionError, match=r"--density .*more than 0 and at most 1"):
        plan_cases([adding()], "cpu", densities=[density])


def test_a_density_for_an_op_without_one_is_refused_unless_all_were_asked_for(adding):
    plain = adding("plain", densities=())
    with pytest.raises(OptionError, match="--density: plain has none"):
        plan_cases([plain], "cpu", densities=[0.1])
    [plan, other] = plan_cases([plain, adding()], "cpu", densities=[0.1], every=True)
    assert plan.densities == ()
    assert other.densities == (0.1,)


def test_a_dtype_that_an_op_does_not_take_is_refused_or_with_all_skipped(adding):
    op = adding(dtypes=("fp32",))
    with pytest.raises(OptionError, match="--dtype: adding takes fp32, not bf16"):
        plan_cases([op], "cpu", dtypes=["bf16"])
    [plan] = plan_cases([op], "cpu", dtypes=["bf16"], every=True)
    assert plan.result["status"] == "skipped"
    assert plan.result["reason"] == "adding takes fp32, not bf16"
    with pytest.raises(UnknownNameError, match="no dtype 'bf61'. Did you mean 'bf16'.*fp32, bf16"):
        plan_cases([op], "cpu", dtypes=["bf61"])


def test_shapes_need_the_dims_of_every_op(adding):
    with pytest.raises(OptionError, match=r"2x3x4 has 3 numbers; adding wants 2: ROWSxCOLS"):
        plan_cases([adding()], "cpu", shapes=["2x3x4"])
    other = adding("other", dims="AxBxC")
    with pytest.raises(OptionError, match=r"adding ROWSxCOLS, other AxBxC"):
        plan_cases([adding(), other], "cpu", shapes=["2x3"])


def test_an_unknown_size_is_refused(adding):
    with pytest.raises(OptionError, match="'huge'; wanted one of cuda, cpu, tiny"):
        plan_cases([adding()], "huge")


# Competitors.


def test_compiling_can_be_left_out(monkeypatch):
    monkeypatch.setenv(COMPILE, "0")
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("compiled"))
    contender = compiled(torch.add, 1, 2, density=0.5)
    assert contender.status == "skipped"
    assert contender.skipped == "SPARSEFT_BENCH_COMPILE=0"
    assert contender.density == 0.5


def test_what_cannot_be_compiled_is_skipped(monkeypatch):
    monkeypatch.delenv(COMPILE, raising=False)

    def broken(run, dynamic):
        def call(*arguments):
            raise RuntimeError("no C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert compiled(torch.add, 1, 2).skipped == "torch.compile failed: no C++ compiler"


@pytest.mark.parametrize("compiled", [compiled, lambda run: compiled_for_any_size(run, each_once)])
def test_no_memory_is_not_the_compilers_failure(monkeypatch, compiled):
    monkeypatch.delenv(COMPILE, raising=False)

    def full(run, dynamic):
        def call(*arguments):
            raise torch.OutOfMemoryError("Tried to allocate 3.00 GiB")

        return call

    monkeypatch.setattr(torch, "compile", full)
    assert attempt(lambda: compiled(list)).skipped.startswith("out of memory: asked for 3.00 GiB")


def each_once(run):
    return Contender(run, [Check("ran", float(run() is None), 0.0)])


def test_an_absent_package_is_named():
    assert absent("torch") == ""
    assert absent("no_such_package_here").startswith("no_such_package_here is not installed")
