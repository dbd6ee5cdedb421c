"""`benchmarks/run.py`: each command writes its results where they belong; the GPU suite's flow."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

from sparseft.benchmarking.ceilings import Ceilings
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner, with its results in a folder of the test."""
    module = loaded("run")
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def case(name: str, *, right: bool = True) -> Case:
    def build(device):
        checks = [Check("entries that differ", 0.0 if right else 3.0, 0.0)]
        ours = Contender(list, checks, ours=True, density=0.1, bytes=8.0, flops=8.0)
        return Prepared({"theirs": Contender(dict), "ours": ours}, "theirs")

    return Case(name, build, op=name, dtype="fp32")


@pytest.fixture
def suite(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``suite(*arguments, cases=..., test=...)`` -> (status, folder), on two quick cases."""

    ceilings = Ceilings(copy=1e9, gemm={"fp32": 1e9})
    monkeypatch.setattr(runner.gpu_suite, "measure_ceilings", lambda *a, **k: ceilings)

    def run(*arguments, cases=None, test="def test_it():\n    pass\n"):
        chosen = cases or [case("one"), case("two")]
        monkeypatch.setattr(runner.gpu_suite, "every_case", lambda tiny: chosen)
        file = tmp_path / "test_made_up.py"
        file.write_text(textwrap.dedent(test))
        options = ["suite", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path / "out")]
        status = runner.main([*options, "--tests", str(file), *arguments])
        return status, tmp_path / "out"

    return run


# The commands.


def test_an_unknown_command_is_refused_with_the_known_ones(runner, capsys):
    with pytest.raises(SystemExit):
        runner.main(["suit"])
    said = capsys.readouterr().err
    assert all(command in said for command in runner.COMMANDS)


def test_every_command_says_what_it_takes(runner, capsys):
    for command in runner.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            runner.main([command, "--help"])
        assert ended.value.code == 0
        assert f"run.py {command}" in capsys.readouterr().out


def test_operations_are_kept_as_lines_and_tables(runner, tmp_path):
    arguments = ["ops", "--op", "capture", "--size", "tiny", "--device", "cpu"]
    assert runner.main([*arguments, "--out", str(tmp_path / "kept")]) == 0
    lines = (tmp_path / "kept" / "ops.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["op"] for record in records} == {"capture"}
    assert {record["ours"] for record in records} == {True, False}
    assert "## capture/" in (tmp_path / "kept" / "ops.md").read_text()
    # Tiny shapes and part of the operations are no committed result.
    assert runner.main(arguments) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["scratch"]


def test_steps_are_cases_by_task_and_batch(runner, tmp_path, monkeypatch):
    asked = []

    def step_case(*arguments):
        asked.append(arguments)
        return case(f"step_{len(asked)}")

    training_step = importlib.import_module("sparseft.benchmarking.cases.training_step")
    monkeypatch.setattr(training_step, "step_case", step_case)
    options = ["--task", "mlm", "causal", "--batch", "4", "8", "--density", "0.1", "--rounds", "2"]
    assert runner.main(["step", *options, "--out", str(tmp_path)]) == 0
    assert [a[:2] for a in asked] == [
        ("mlm", (12, 384, 25_000, 4, 64)),
        ("mlm", (12, 384, 25_000, 8, 64)),
        ("causal", (6, 512, 16_000, 4, 64)),
        ("causal", (6, 512, 16_000, 8, 64)),
    ]
    assert {a[2:] for a in asked} == {((0.1,), "fp32")}
    document = json.loads((tmp_path / "step.json").read_text())
    assert [found["name"] for found in document["cases"]] == [f"step_{n}" for n in range(1, 5)]


def test_scaling_is_one_result_with_its_picture(runner, tmp_path, monkeypatch):
    scaling = importlib.import_module("sparseft.benchmarking.scaling")
    asked = []
    monkeypatch.setattr(scaling, "scaling_cases", lambda *a: asked.append(a) or [case("middle")])
    assert runner.main(["scaling", "--task", "mlm", "--size", "tiny", "--rounds", "2"]) == 0
    assert asked == [("mlm", "tiny", "fp32")]
    folder = tmp_path / "results" / "scratch"  # tiny shapes are no committed result
    assert json.loads((folder / "scaling.json").read_text())["cases"][0]["name"] == "middle"

    def plot(results, path):
        path.write_bytes(b"picture of " + results[0]["name"].encode())
        return path

    monkeypatch.setattr(scaling, "scaling_plot", plot)
    loaded("page").Page(folder, draw=True).fill("{{plot scaling.json scaling}}")
    assert (folder / "scaling_scaling.png").read_bytes() == b"picture of middle"


def test_profiles_of_models_are_one_result(runner, tmp_path, monkeypatch):
    profiles = importlib.import_module("sparseft.profiling.profiles")
    here = profiles.measure_here
    monkeypatch.setattr(profiles, "measure", lambda *a, threads, **k: here(*a, **k))
    models = ["tiny-decoder"]
    options = ["--density", "0.1", "--ways", "attached", "--batch", "2", "--length", "8"]
    assert runner.main(["profile", "--model", *models, *options, "--steps", "2"]) == 0
    folder = tmp_path / "results" / "scratch"
    document = json.loads((folder / "profile.json").read_text())
    assert [found["workload"]["model"] for found in document["profiles"]] == models
    assert document["provenance"]["versions"]["torch"]
    for found in document["profiles"]:
        [row] = found["rows"]
        assert row["measured"]["peak"] > 0
        assert row["seconds"]["median"] > 0
    # The page shows such a file: a table a model, and one picture.
    page = loaded("page").Page(folder, draw=True)
    text = page.fill("{{profile profile.json}}\n\n{{plot profile.json memory}}")
    assert text.count("| attached 10% |") == 1
    assert (folder / "profile_memory.png").read_bytes().startswith(b"\x89PNG")


# The GPU suite's flow.


def test_the_suite_writes_one_flat_folder_whatever_its_tests_say(suite, monkeypatch, runner):
    monkeypatch.setattr(runner.gpu_suite, "_DENSITIES", (0.1,))
    monkeypatch.setattr(runner.gpu_suite, "_WAYS", ("attached",))
    test = """
        def test_right():
            pass
        def test_wrong():
            raise RuntimeError("kernel differs")
    """
    status, folder = suite(test=test)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["bench.jsonl", "plots.png", "suite.json", "suite.md", "tests.txt", "tests.xml"]
    document = json.loads((folder / "suite.json").read_text())
    assert status == 1
    assert document["tests"]["status"] == "failed"
    assert document["tests"]["counts"] == {"tests": 2, "failures": 1, "errors": 0, "skipped": 0}
    assert [name.rpartition("::")[2] for name in document["tests"]["failed"]] == ["test_wrong"]
    assert "kernel differs" in (folder / "tests.txt").read_text()
    # The timings ran all the same.
    assert [found["status"] for found in document["cases"]] == ["ok", "ok"]
    speeds = document["cases"][0]["contenders"][1]["speed"]
    assert {"GB/s", "% of copy", "TFLOP/s", "% of GEMM"} <= set(speeds)
    [row] = document["memory"][0]["rows"]
    assert row["label"] == "attached 10%"
    assert row["measured"]["peak"] > 0
    assert len((folder / "bench.jsonl").read_text().splitlines()) == 4
    text = (folder / "suite.md").read_text()
    assert "## Tests\nfailed: 2 tests, 1 failures" in text
    assert "::test_wrong" in text
    assert "## one" in text
    assert "## Memory: tiny-encoder" in text


def test_tests_end_with_their_share_of_the_minutes(suite):
    test = "import time\ndef test_long():\n    time.sleep(60)\n"
    status, folder = suite("--parts", "tests", "cases", "--minutes", "0.08", test=test)
    document = json.loads((folder / "suite.json").read_text())
    assert status == 1
    assert document["tests"]["status"] == "cut off"
    assert document["tests"]["seconds"] < 40


def test_what_there_is_no_time_for_is_listed(suite):
    status, folder = suite("--parts", "cases", "memory", "--minutes", "0")
    document = json.loads((folder / "suite.json").read_text())
    assert status == 0
    assert [found["status"] for found in document["cases"]] == ["not run", "not run"]
    assert document["memory"][0]["reason"] == "the minutes were spent"
    assert "## Not run\n- one: " in (folder / "suite.md").read_text()


def test_a_case_that_takes_too_long_costs_only_itself(suite):
    def build(device):
        def sleep():
            time.sleep(60)

        return Prepared({"a": attempt(lambda: sleep() or Contender(list))}, "a")

    cases = [Case("long", build, op="long", dtype="fp32"), case("one")]
    status, folder = suite("--parts", "cases", "--case-cap", "4", cases=cases)
    long, one = json.loads((folder / "suite.json").read_text())["cases"]
    assert status == 0
    assert (long["status"], long["reason"]) == ("not run", "cut off after 4 s (--case-cap)")
    assert long["took_seconds"] < 40
    assert one["status"] == "ok"


def test_without_pytest_the_suite_says_so(suite, monkeypatch, runner):
    find = importlib.util.find_spec
    tests = sys.modules["gpu_tests"]
    monkeypatch.setattr(
        tests.importlib.util, "find_spec", lambda n, *a: None if n == "pytest" else find(n, *a)
    )
    status, folder = suite("--parts", "tests")
    document = json.loads((folder / "suite.json").read_text())
    assert status == 1
    assert document["tests"]["status"] == "not run"
    assert "pytest is not installed" in (folder / "tests.txt").read_text()


def test_a_wrong_case_fails_the_suite(suite):
    status, folder = suite("--parts", "cases", cases=[case("one", right=False), case("two")])
    document = json.loads((folder / "suite.json").read_text())
    assert status == 1
    assert [found["status"] for found in document["cases"]] == ["red", "ok"]
    assert "clocks" not in document["cases"][0]["contenders"][1]


def test_a_part_of_the_cases_alone(suite):
    status, folder = suite("--only", "tw*")
    assert status == 0
    assert [
        found["name"] for found in json.loads((folder / "suite.json").read_text())["cases"]
    ] == ["two"]
    assert not (folder / "tests.txt").exists()


def test_the_suite_has_every_operation_once(runner):
    from sparseft.benchmarking.cases import OPS

    for tiny in (True, False):
        names = [found.name for found in runner.gpu_suite.every_case(tiny=tiny)]
        assert len(set(names)) == len(names)
        ops = {found.op for found in runner.gpu_suite.every_case(tiny=tiny)}
        assert set(OPS) <= ops


@pytest.mark.slow
def test_the_whole_flow_runs_from_a_checkout(tmp_path):
    command = [sys.executable, str(HERE / "run.py"), "suite", "--device", "cpu", "--rounds", "2"]
    command += ["--case-seconds", "0.1", "--tests", "tests/test_layering.py"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list((tmp_path / "out").iterdir())) == 6
