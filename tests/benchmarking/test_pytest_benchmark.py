"""`pytest benchmarks`: a row a contender, a group a case; what is not right fails, untimed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]

# An operation beside the real ones, so that every outcome of a contender occurs.
PLUGIN = """
from sparseft.benchmarking import cases
from sparseft.benchmarking.catalogue import OpBench, case_name
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.suite import Case, Contender, Prepared


def build(shape, densities, dtype):
    def prepare(device):
        contenders = {
            "right": Contender(
                list, [Check("same", 0.0, 0.0)], {"entries": 3}, ours=True, density=0.5, bytes=8.0
            ),
            "wrong": Contender(list, [Check("entries that differ", 2.0, 0.0)]),
            "broken": Contender(error="RuntimeError: no such kernel"),
            "absent": Contender(skipped="thing is not installed"),
        }
        return Prepared(contenders, "right", facts={"of the case": 1})

    return Case(case_name("made_up", shape, dtype), prepare)


cases.OPS["made_up"] = OpBench(
    name="made_up", summary="", dims="N", shapes={"tiny": ((4,),)}, dtypes=("fp32",),
    densities=(0.5,), build=build,
)
"""


def run(folder: Path, *arguments: str, made_up: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q"]
    if made_up:
        (folder / "made_up_plugin.py").write_text(PLUGIN)
        command += ["-p", "made_up_plugin"]
    path = [str(folder), str(ROOT), str(ROOT / "kernels")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "SPARSEFT_BENCH_COMPILE": "0",
        "PYTEST_ADDOPTS": "",
        "COLUMNS": "400",
    }
    options = ["-p", "no:cacheprovider", "--bench-size", "tiny", *arguments]
    return subprocess.run(
        command + options, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_each_contender_is_a_row_and_a_wrong_one_has_no_time(tmp_path: Path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    written = tmp_path / "out.json"
    done = run(
        tmp_path,
        *("--bench-op", "made_up", "--bench-op", "capture"),
        *("--benchmark-json", str(written), "--benchmark-min-rounds", "2"),
        made_up=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not timed, as it is not right" in done.stdout
    assert "RuntimeError: no such kernel" in done.stdout
    assert "thing is not installed" in done.stdout
    assert "2 failed" in done.stdout
    rows = json.loads(written.read_text())["benchmarks"]
    made_up = [row for row in rows if row["group"] == "made_up/4/fp32"]
    assert [row["extra_info"]["contender"] for row in made_up] == ["right"]
    extra = made_up[0]["extra_info"]
    assert extra["density"] == 0.5
    assert extra["bytes"] == 8.0
    assert extra["flops"] is None
    assert extra["facts"] == {"of the case": 1, "entries": 3}
    assert extra["provenance"]["versions"]["torch"]
    real = [row for row in rows if row["group"].startswith("capture/")]
    assert {row["extra_info"]["ours"] for row in real} == {True, False}
    assert all(row["stats"]["rounds"] == 2 and row["stats"]["median"] > 0 for row in real)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bench_op": ["captured"]}, "--bench-op captured: no such operation; there are: sampled"),
        ({"bench_size": "cuda"}, "--bench-size cuda: torch sees no CUDA or ROCm device"),
    ],
)
def test_wrong_options_are_refused(monkeypatch: pytest.MonkeyPatch, options, message):
    spec = importlib.util.spec_from_file_location("bench_conftest", ROOT / "benchmarks/conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = SimpleNamespace(
        getoption=options.get, pluginmanager=SimpleNamespace(hasplugin=lambda name: True)
    )
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(config)


def test_without_pytest_benchmark_it_says_what_to_install(tmp_path: Path):
    done = run(tmp_path, "-p", "no:benchmark")
    assert done.returncode != 0
    assert "pip install 'sparseft[bench]'" in done.stderr


def test_the_default_run_leaves_benchmarks_out():
    if sys.version_info < (3, 11):
        pytest.skip("no tomllib before Python 3.11")
    tomllib = importlib.import_module("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]
