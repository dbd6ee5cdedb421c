"""``sparseft bench``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sparseft.benchmarking import cases, ceilings, limits, read_records
from sparseft.benchmarking.ceilings import Ceilings
from sparseft.cli import main as cli

BENCHES = Path(__file__).resolve().parents[1] / "benchmarking" / "_benches.py"


@pytest.fixture
def adding():
    spec = importlib.util.spec_from_file_location("_benches", BENCHES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adding


@pytest.fixture
def bench(monkeypatch, adding, capsys):
    """Runs the command on ops of a few microseconds; returns (exit code, stdout, stderr)."""
    plain = adding("plain", densities=(), dtypes=("fp32",), dims="AxBxC", shapes=dict(
        cuda=((2, 2, 2),), cpu=((2, 2, 2),), tiny=((2, 2, 2),)
    ))  # fmt: skip
    ops = {"adding": adding(), "wrong": adding("wrong", wrong=True), "plain": plain}
    monkeypatch.setitem(vars(cases), "OPS", ops)  # without loading the real ones

    def measure(device, dtypes, *, quick, clock):
        seen.append(clock)
        return Ceilings(copy=1e10, gemm=dict.fromkeys(dtypes, 1e12))

    seen = []
    monkeypatch.setattr(ceilings, "measure_ceilings", measure)

    def run(*words):
        code = cli.main(["bench", "--device", "cpu", *words])
        out, err = capsys.readouterr()
        return code, out, err

    run.clocks = seen
    return run


def test_the_list_says_what_there_is(bench):
    code, out, _ = bench("--list")
    assert code == 0
    for word in ("adding", "ROWSxCOLS", "fp32", "bf16", "0.01", "64x64", "8x8", "a sum against"):
        assert word in out
    assert "wrong" not in bench("--list", "--op", "adding")[1]


def test_a_run_says_where_it_ran_and_shows_every_contender(bench):
    code, out, _ = bench("--op", "adding", "--size", "tiny", "--threads", "1")
    assert code == 0
    for line in ("device: ", "threads: 1", "commit: ", "versions: python", "seed: 0"):
        assert line in out
    assert "ceilings: copy 10 GB/s; GEMM fp32 1 TFLOP/s" in out
    assert out.count("adding/8x8/fp32") == 1
    lines = [line for line in out.splitlines() if "ours, 10%" in line]
    assert len(lines) == 2  # two shapes
    assert lines[0].count("us (") == 1
    assert lines[0].count("%)") == 2
    assert "1 passed" in lines[0]
    assert "2 cases, 2 ok" in out


def test_the_devices_size_is_the_default(bench):
    assert "adding/32x32/fp32" in bench("--op", "adding", "--device", "cpu", "--rounds", "2")[1]


def test_a_wrong_contender_is_not_timed_and_is_the_exit_code(bench):
    code, out, _ = bench("--op", "wrong", "adding", "--size", "tiny")
    assert code == 1
    [line] = [x for x in out.splitlines() if "ours, 10%" in x and "RED" in x and "16" in x]
    assert "us (" not in line
    assert "entries that differ: 16, at most 0" in line
    assert "WRONG: wrong/8x8/fp32, wrong/4x4/fp32" in out
    assert "adding/8x8/fp32\n" in out


def test_out_holds_lines_tables_and_pictures(bench, tmp_path):
    folder = tmp_path / "new"
    words = ("--op", "adding", "--shape", "4x4", "--rounds", "2", "--out", str(folder))
    assert bench(*words)[0] == 0
    names = ["bench.jsonl", "bench.md", "density.png", "roofline.png", "speedups.png"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert len(read_records(folder / "bench.jsonl")) == 3
    text = (folder / "bench.md").read_text()
    assert "## adding/4x4/fp32" in text
    assert "% of copy" in text
    assert bench(*words, "--no-plot")[0] == 0
    assert len(read_records(folder / "bench.jsonl")) == 3  # of this run alone
    words = (*words[:-1], str(tmp_path / "other"), "--no-plot")
    assert bench(*words)[0] == 0
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == names[:2]


def test_json_goes_to_a_file_that_grows_or_alone_to_the_output(bench, tmp_path):
    path = tmp_path / "all.jsonl"
    for _ in range(2):
        assert bench("--op", "adding", "--size", "tiny", "--json", str(path))[0] == 0
    assert len(read_records(path)) == 12
    code, out, err = bench("--op", "adding", "--size", "tiny", "--json", "-")
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 6
    assert {line["ceilings"]["copy"] for line in lines} == {1e10}
    assert "ours, 10%" in err


def test_all_skips_what_an_op_does_not_take(bench):
    code, out, _ = bench("--op", "all", "--size", "tiny", "--dtype", "bf16", "--json", "-")
    lines = [json.loads(line) for line in out.splitlines()]
    [skipped] = [line for line in lines if line["status"] == "skipped"]
    assert (skipped["op"], skipped["reason"]) == ("plain", "plain takes fp32, not bf16")
    assert code == 1  # "wrong" is


def test_too_little_memory_is_a_skip_with_the_number(bench, monkeypatch, adding):
    def build(shape, densities, dtype):
        def make(device):
            limits.require_memory(1 << 60, device)

        return cases.OPS["adding"].build(shape, densities, dtype).__class__("big", make)

    monkeypatch.setitem(cases.OPS, "big", adding("big", build=build))
    code, out, _ = bench("--op", "big", "--shape", "4x4")
    assert code == 0
    assert "big: SKIPPED: needs 1048576.0 TiB of memory; cpu has" in out
    assert "1 cases, 0 ok, 1 skipped" in out


def test_a_smoke_test_compiles_nothing_and_leaves_the_environment(bench, monkeypatch):
    from sparseft.benchmarking.competitors import COMPILE

    monkeypatch.delenv(COMPILE, raising=False)
    seen = []
    build = cases.OPS["adding"].build

    def watching(*words):
        import os

        seen.append(os.environ.get(COMPILE))
        return build(*words)

    from dataclasses import replace

    monkeypatch.setitem(cases.OPS, "adding", replace(cases.OPS["adding"], build=watching))
    bench("--op", "adding", "--size", "tiny")
    bench("--op", "adding", "--size", "cpu", "--rounds", "2")
    monkeypatch.setenv(COMPILE, "1")
    bench("--op", "adding", "--size", "tiny")
    assert seen == ["0", "0", None, "1", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--op addin", "no op 'addin'. Did you mean 'adding'"),
        ("--op x", "no op 'x'. Ops: adding, wrong, plain, or all."),
        ("--size tiny", "--op is missing: adding, wrong, plain, or all"),
        ("--op adding --shape 4x4x4", "4x4x4 has 3 numbers; adding wants 2: ROWSxCOLS"),
        ("--op adding --shape 4x0", "--shape '4x0': wanted whole numbers of 1 or more"),
        ("--op adding --shape 4xfour", "--shape '4xfour': wanted whole numbers"),
        ("--op adding plain --shape 4x4", "different numbers of dims"),
        ("--op all --shape 4x4", "different numbers of dims"),
        ("--op adding --density 0", "--density 0: wanted more than 0 and at most 1"),
        ("--op adding --density 0.1 1.5", "--density 1.5: wanted"),
        ("--op adding --density -0.1", "--density -0.1: wanted"),
        ("--op plain --density 0.1", "--density: plain has none"),
        ("--op adding --dtype fp61", "no dtype 'fp61'. Did you mean 'fp16'"),
        ("--op plain --dtype bf16", "--dtype: plain takes fp32, not bf16"),
        ("--op adding --size big", "--size is 'big'; wanted one of cuda, cpu, tiny"),
        ("--op adding --rounds 1", "--rounds 1: a spread needs 2 or more"),
        ("--op adding --seconds 0", "--seconds 0: wanted more than 0"),
        ("--op adding --seconds nan", "--seconds nan: wanted more than 0"),
        ("--op adding --threads 0", "--threads 0: wanted 1 or more"),
        ("--op adding --clock cpu --threads 2 --device cpu", "needs one thread on a CPU"),
        ("--op adding --plot", "--plot draws into a folder: add --out DIR"),
        ("--op adding --device tpu", "--device is 'tpu'"),
        ("--op adding --compare ..", "--compare '..': wanted a revision"),
        ("--op adding --clock sun", "invalid choice: 'sun'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(bench, words, message):
    code, out, err = bench(*words.split())
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_a_machine_without_cuda_says_so(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = bench("--op", "adding", "--device", "cuda")
    assert code == 2
    assert "--device is 'cuda', but torch sees no such device; use cpu" in err


def test_what_cannot_be_written_is_said_before_measuring(bench, tmp_path):
    (tmp_path / "file").write_text("x")
    code, out, err = bench("--op", "adding", "--out", str(tmp_path / "file"))
    assert (code, out) == (2, "")
    assert "is a file; wanted a folder" in err
    code, out, err = bench("--op", "adding", "--json", str(tmp_path / "file"))
    assert (code, out) == (2, "")
    assert "the last line is cut off" in err
    code, out, err = bench("--op", "adding", "--json", str(tmp_path / "file" / "x.jsonl"))
    assert (code, out) == (2, "")
    assert "--json" in err
    code, out, err = bench("--op", "adding", "--json", str(tmp_path))
    assert (code, out) == (2, "")
    assert f"--json {tmp_path} is a folder; wanted a file" in err
    code, out, err = bench("--op", "adding", "--out", str(tmp_path / "file" / "x"))
    assert (code, out) == (2, "")
    assert "--out" in err


def test_ceilings_are_of_the_clock_of_the_times(bench):
    bench("--op", "adding", "--size", "tiny", "--threads", "1", "--clock", "cpu")
    bench("--op", "adding", "--size", "tiny")
    assert bench.clocks == ["cpu", None]


def test_no_revision_is_no_run_without_one(bench):
    code, out, err = bench("--op", "adding", "--size", "tiny", "--compare", "")
    assert code == 2
    assert "--compare '': wanted a revision" in err


def test_threads_are_as_before_afterwards(bench, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    before = torch.get_num_threads()
    bench("--op", "adding", "--size", "tiny", "--threads", "3", "--clock", "wall")
    assert set_to == [3, before]


# --compare.

SPREAD = {"median": 0.5, "quartile1": 0.4, "quartile3": 0.8, "min": 0.3}


@pytest.fixture
def compared(monkeypatch):
    """What the comparison finds."""
    from sparseft.benchmarking import revisions
    from sparseft.benchmarking.trees import Tree

    found = []

    def compare_revisions(text, planned, device, *, started, progress, **options):
        assert options["files"] is cases.file_of
        started(Tree(text, "abc", False, Path()), Tree("here", "def", True, Path()))
        for result in found:
            progress(result)
        return found

    monkeypatch.setattr(revisions, "compare_revisions", compare_revisions)
    return found


def test_a_comparison_prints_ratios_and_the_control(bench, compared, tmp_path):
    sides = {"before_seconds": SPREAD, "after_seconds": SPREAD, "ratio": SPREAD, "rounds": 5}
    rows = [
        {"name": "dense", "control": True, "ours": False, "status": "ok", "reason": "", **sides},
        {"name": "ours, 1%", "control": False, "ours": True, "status": "ok", "reason": "", **sides},
        {"name": "new", "control": False, "ours": True, "status": "not in v1", "reason": "absent"},
    ]
    compared += [
        {"name": "a/4/fp32", "status": "ok", "contenders": rows},
        {"name": "b/4/fp32", "status": "not in v1", "reason": "ImportError: no new_op"},
    ]
    words = ["--op", "adding", "--compare", "v1", "--out", str(tmp_path), "--json"]
    code, out, _ = bench(*words, str(tmp_path / "all.jsonl"))
    assert code == 0
    assert "before: v1 (abc)\nafter: here (def with uncommitted changes)" in out
    assert "below 1 is faster now" in out
    [control] = [line for line in out.splitlines() if "dense (control)" in line]
    assert "0.500 (0.400-0.800)" in control
    assert "not in v1: absent" in out
    assert "b/4/fp32: not in v1: ImportError: no new_op" in out
    assert "2 cases, 1 ok, 1 not in v1" in out
    records = read_records(tmp_path / "all.jsonl")
    assert [r["contender"] for r in records] == ["dense", "ours, 1%", "new", None]
    assert records[0]["ratio"] == SPREAD
    assert records[0]["provenance"]["seed"] == 0
    assert read_records(tmp_path / "compare.jsonl") == records


def test_a_comparison_with_something_wrong_fails(bench, compared):
    compared += [{"name": "a/4/fp32", "status": "error", "reason": "RuntimeError: no"}]
    code, out, _ = bench("--op", "adding", "--compare", "v1")
    assert code == 1
    assert "WRONG: a/4/fp32" in out
