"""The suite: it checks before it times, says what it left out, stops in time, and reports."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sparseft.benchmarking import rotation, suite_cases, suite_markdown, suite_source
from sparseft.benchmarking import suite as suite_module
from sparseft.benchmarking.cases import entries, sampled_grad, step_sides, topk, training_gates
from sparseft.benchmarking.checks import Check, as_accurate, equal_bits, rel_rms, worst
from sparseft.benchmarking.competitors import COMPILE
from sparseft.benchmarking.masks import packed_pattern, random_pattern, sectors_touched
from sparseft.benchmarking.rotation import Timing, rotate
from sparseft.benchmarking.suite import (
    Case,
    Contender,
    Prepared,
    at_most,
    attempt,
    faster,
    run_suite,
)
from sparseft.diff import SparsePattern

CPU = torch.device("cpu")
NAMES = [case.name for case in suite_cases(tiny=True)]
RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
# Why a contender may be left out of the tiny cases.
REASONS = ("peft is not installed", "torch has no kernel for it", f"{COMPILE}=0")


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setenv(COMPILE, "0")


def run_one(name: str, **options):
    [result] = run_suite(suite_cases(tiny=True), "cpu", only=name, rounds=2, **options)
    return result


def rows_of(result):
    return {row["name"]: row for row in result["contenders"]}


# Rotation.


def test_everyone_is_first_in_turn_and_runs_once_a_round():
    calls = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timing = rotate(contenders, rounds=6, warmup=0)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]
    assert all(len(timing.seconds[name]) == len(timing.host[name]) == 6 for name in "abc")


def test_rounds_end_with_the_time_but_not_before_the_least():
    assert len(rotate({"a": list}, rounds=50, least=5, seconds=0.0).seconds["a"]) == 5
    with pytest.raises(ValueError, match="rounds=1"):
        rotate({"a": list}, rounds=1)
    with pytest.raises(ValueError, match=r"clock='sun'.*device, wall, cpu"):
        rotate({"a": list}, rounds=2, clock="sun")


def test_ratios_compare_times_of_one_round():
    timing = Timing("wall", {"a": [1.0, 3.0, 1.0], "b": [2.0, 6.0, 2.0]})
    assert timing.ratio("b", "a") == 2.0
    assert timing.ratios("a", "b") == [0.5, 0.5, 0.5]


def test_on_a_gpu_events_enclose_the_work_alone(monkeypatch):
    """Flush, then keep the device busy, then the work between two events; then wait."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.0  # milliseconds

    class Buffer:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"busy {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *args, **options: Buffer())
    device = torch.device("cuda")
    watch = rotation.Stopwatch(device, "device")
    seconds, host = watch.time(lambda: log.append("work"), lead=1e-3)
    assert log == ["wait", "flush", "busy 2000000", "event", "work", "event", "wait"]
    assert seconds == 2e-3
    assert 0 < host < 1
    log.clear()
    seconds, host = rotation.Stopwatch(device, "wall").time(lambda: log.append("work"), lead=1e-3)
    assert log == ["wait", "flush", "wait", "work", "wait"]
    assert 0 < host <= seconds


# Checks and masks.


def test_checks_fail_on_nan_shape_and_one_wrong_bit():
    exact = torch.randn(1000, dtype=torch.float64)
    close = exact.float()
    assert as_accurate("x", close, close, exact).passed
    for wrong in (
        close.roll(1),
        close[:-1],
        torch.where(torch.arange(1000) == 3, torch.nan, close),
    ):
        assert not as_accurate("x", wrong, close, exact).passed
    assert equal_bits("x", close, close.clone()).passed
    signed = torch.zeros(3)
    assert equal_bits("x", -signed, signed).got == 3
    assert not equal_bits("x", close.half(), close).passed
    assert rel_rms(close[:0], exact[:0]) == 0.0
    assert worst([Check("a", 0.5, 1.0), Check("b", 2.0, 1.0), Check("c", 0.9, 1.0)]).name == "b"
    assert worst([Check("a", 0.5, 1.0), Check("c", 0.9, 1.0), Check("d", 0.0, 0.0)]).name == "c"


def test_packed_masks_keep_their_density_inside_a_tenth_of_the_tiles():
    mask = packed_pattern((1000, 1280), 0.01, device=CPU).to_mask()
    assert float(mask.float().mean()) == pytest.approx(0.01, rel=0.1)
    padded = torch.nn.functional.pad(mask, (0, 0, 0, 24))
    per_tile = padded.view(8, 128, 10, 128).sum((1, 3))
    assert int((per_tile > 0).sum()) == 8
    assert packed_pattern((5, 4), 1e-9, device=CPU).nnz > 0


def test_random_masks_have_an_entry_and_sectors_are_counted():
    assert random_pattern((4, 4), 0.0, device=CPU).nnz == 1
    assert random_pattern((400, 400), 0.1, device=CPU).density == pytest.approx(0.1, rel=0.1)
    flat = torch.tensor([0, 15, 16, 47, 48, 49])
    pattern = SparsePattern.from_indices(flat, (8, 8))
    assert sectors_touched(pattern, itemsize=2) == 4  # 16 bf16 in 32 bytes
    assert sectors_touched(pattern, itemsize=4) == 5


# The cases.


def test_names_are_unique_and_the_targets_come_first():
    full = [case.name for case in suite_cases()]
    assert len(set(full)) == len(full)
    assert len(set(NAMES)) == len(NAMES)
    assert full[:5] == [
        "sampled_grad/4096x4096x4096/bf16",
        "sampled_grad/11008x4096x4096/bf16",
        "sparse_step/32x4096x11008/fp32",
        "step_classification/12x768x250002x32x128/bf16",
        "step_classification/12x768x250002x128x128/bf16",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_case_runs_on_the_reference(name):
    result = run_one(name)
    assert result["status"] == "ok", result
    assert result["targets"] == []  # they are for GPUs
    for row in result["contenders"]:
        if row["status"] == "skipped":
            assert any(reason in row["reason"] for reason in REASONS)
            continue
        assert row["status"] == "ok"
        for clock in row["clocks"].values():
            assert clock["rounds"] == 2
            assert clock["seconds"]["median"] > 0
            assert clock["ratio"]["quartile1"] <= clock["ratio"]["quartile3"]
    ours = [row for row in result["contenders"] if "backend" in row["facts"]]
    assert ours
    for row in ours:
        assert row["checks"]
        assert all(check["passed"] for check in row["checks"])
    json.dumps(result)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_every_case_runs_on_the_gpu(name):
    [result] = run_suite(suite_cases(tiny=True), "cuda", only=name, rounds=2)
    assert result["status"] == "ok", result
    backends = {r["facts"]["backend"] for r in result["contenders"] if "backend" in r["facts"]}
    assert backends == {"triton"}


# A wrong result has no speed.


def spoil_sampled_grad(monkeypatch):
    real = sampled_grad.sampled_weight_grad
    monkeypatch.setattr(sampled_grad, "sampled_weight_grad", lambda *a: real(*a).roll(1))
    return "sampled_grad/*", "ours, 10%"


def spoil_optimizer(monkeypatch):
    class Forgetful(step_sides.SparseAdamW):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0][0] += 1.0

    monkeypatch.setattr(step_sides, "SparseAdamW", Forgetful)
    return "sparse_step/*/fp32", "ours, 10%"


def spoil_frozen_entries(monkeypatch):
    real = step_sides.Masked.check

    def check(self, optimizer, decay):
        step = optimizer.step

        def leaky():
            step()
            self.weights[0][0, 0] += 1.0

        optimizer.step = leaky
        return real(self, optimizer, decay)

    # Entry 0 is frozen, so that only the whole weight shows it.
    patterns = step_sides.random_pattern
    skip = torch.tensor([7])
    monkeypatch.setattr(
        step_sides,
        "random_pattern",
        lambda shape, *a, **k: (
            SparsePattern.from_indices(skip, shape) if k["seed"] == 0 else patterns(shape, *a, **k)
        ),
    )
    monkeypatch.setattr(step_sides.Masked, "check", check)
    return "sparse_step/*/bf16", "ours, 1%"


def spoil_topk(monkeypatch):
    real = topk.topk_differences

    def first(pairs, k, backend=None):
        if backend == "reference":
            return real(pairs, k, backend=backend)
        return real([(n, b, a + (a == a.max())) for n, a, b in pairs], k)

    monkeypatch.setattr(topk, "topk_differences", first)
    return "topk/*", "ours, 1%"


def spoil_entries(monkeypatch):
    real = entries.write_sum_

    def write(target, at, base, values, backend=None):
        real(target, at, base, values if backend else values * 1.5, backend=backend)

    monkeypatch.setattr(entries, "write_sum_", write)
    return "write_sum/*", "ours, 10%"


def spoil_model(monkeypatch):
    real = training_gates._gradients

    def other(*args):
        return {name: gradient.roll(1) for name, gradient in real(*args).items()}

    monkeypatch.setattr(training_gates, "_gradients", other)
    return "step_classification/*", "ours, 1%"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_sampled_grad,
        spoil_optimizer,
        spoil_frozen_entries,
        spoil_topk,
        spoil_entries,
        spoil_model,
    ],
)
def test_a_wrong_result_is_not_timed(monkeypatch, spoil):
    name, contender = spoil(monkeypatch)
    result = run_one(name)
    assert result["status"] == "red", result
    row = rows_of(result)[contender]
    assert row["status"] == "red"
    assert "clocks" not in row
    assert row["reason"]
    text = suite_markdown([result], suite_source(CPU))
    assert f"| {contender} |" in text
    assert "**red**" in text


# Budget, errors, targets.


def simple(name, build=None):
    return Case(name, build or (lambda device: Prepared({"a": Contender(list)}, "a")))


def test_the_budget_stops_and_lists_the_rest(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(suite_module.time, "monotonic", lambda: now[0])

    def slow(device):
        now[0] += 100.0
        return Prepared({"a": Contender(list)}, "a")

    seen = []
    results = run_suite(
        [simple("one", slow), simple("two", slow), simple("three", slow)],
        "cpu",
        minutes=3,
        rounds=2,
        progress=lambda done: seen.append(len(done)),
    )
    assert [r["status"] for r in results] == ["ok", "ok", "not run"]
    assert seen == [1, 2]
    text = suite_markdown(results, suite_source(CPU))
    assert "- three: the budget of 3 minutes was spent" in text


def test_an_error_costs_only_its_own_figures():
    def broken(device):
        raise RuntimeError("no such kernel")

    def half(device):
        return Prepared({"a": Contender(list), "b": attempt(lambda: broken(device))}, "a")

    results = run_suite([simple("x", broken), simple("y", half), simple("z")], "cpu", rounds=2)
    assert [r["status"] for r in results] == ["error", "error", "ok"]
    assert "no such kernel" in results[0]["reason"]
    assert rows_of(results[1])["a"]["clocks"]
    assert "clocks" not in rows_of(results[1])["b"]
    text = suite_markdown(results, suite_source(CPU))
    assert text.count("RuntimeError: no such kernel") == 2


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'top/\*'.*there are: one, two"):
        run_suite([simple("one"), simple("two")], "cpu", only="top/*")


def test_targets_are_judged_on_ratios_of_rounds():
    timing = Timing("device", {"ours": [1.0, 1.0], "theirs": [2.0, 2.0]})
    assert at_most(0.7, "ours", "theirs").judge(timing, {})["met"] is True
    assert at_most(0.4, "ours", "theirs").judge(timing, {})["met"] is False
    assert faster(2.0, "ours", "theirs").judge(timing, {})["measured"] == 2.0
    assert faster(2.1, "ours", "theirs").judge(timing, {})["met"] is False
    missing = faster(2.0, "ours", "nobody").judge(timing, {})
    assert missing["measured"] is missing["met"] is None


def test_targets_are_shown_with_what_was_measured():
    target = faster(2.0, "ours", "theirs")
    timing = Timing("device", {"ours": [1.0, 1.0], "theirs": [1.5, 1.5]})
    result = {"name": "x", "status": "error", "reason": "r", "targets": [target.judge(timing, {})]}
    text = suite_markdown([result], suite_source(CPU))
    assert "| x | ours: at least 2x the speed of theirs | 1.5 | NO |" in text


# The runner.


@pytest.fixture
def runner():
    spec = importlib.util.spec_from_file_location("benchmarks_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_command_writes_a_report_with_provenance(runner, tmp_path, capsys):
    arguments = ["suite", "--device", "cpu", "--only", "capture/*", "--rounds", "2"]
    assert runner.main([*arguments, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "suite.json").read_text())
    assert [case["status"] for case in document["cases"]] == ["ok"]
    assert document["provenance"]["versions"]["torch"] == torch.__version__
    assert {"device", "commit", "versions", "note"} <= set(document["suite"])
    text = (tmp_path / "suite.md").read_text()
    assert f"torch {torch.__version__}" in text
    assert "the figures mean nothing" in text
    assert text in capsys.readouterr().out


def test_results_of_a_cpu_go_to_scratch(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "HERE", tmp_path)
    assert runner.main(["suite", "--device", "cpu", "--only", "capture/*", "--rounds", "2"]) == 0
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["scratch"]


def test_a_red_case_fails_the_command(runner, tmp_path, monkeypatch):
    name, _ = spoil_entries(monkeypatch)
    arguments = ["suite", "--device", "cpu", "--only", name, "--rounds", "2"]
    assert runner.main([*arguments, "--out", str(tmp_path)]) == 1


def test_the_table_of_steps_is_still_the_default(runner, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "step", lambda arguments: seen.append(arguments) or 0)
    for arguments in (["--batch", "16"], ["step", "--batch", "16"]):
        assert runner.main(arguments) == 0
    assert seen == [["--batch", "16"]] * 2


def test_a_copy_without_its_checkout_states_its_commit(monkeypatch):
    from sparseft.benchmarking import suite_report

    bare = {**suite_report.provenance(), "git": None}
    monkeypatch.setattr(suite_report, "provenance", lambda: bare)
    assert suite_source(CPU)["commit"] == "no checkout"
    assert suite_source(CPU, commit="abc")["commit"] == "abc (as stated; no checkout here)"
