"""The state file: settings that may not change, tensors on disk, one process a folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sparseft.errors import ResumeError
from sparseft.training.rng import derive_seed, rng_state, seed_everything, set_rng_state
from sparseft.training.state import (
    RunState,
    TensorFile,
    differences,
    exclusive,
    save_tensors,
)


def test_a_state_comes_back_with_its_finished_phases(tmp_path):
    path = tmp_path / "state.json"
    state = RunState(path, {"a": 1, "b": {"c": [1, 2]}})
    state.start("dense", {"lr": 1.0})
    assert not state.done("dense")
    state.finish("dense", history=[{"loss": 0.5}])
    again = RunState(path, {"a": 1, "b": {"c": [1, 2]}})
    assert again.done("dense")
    assert again.phases["dense"]["history"] == [{"loss": 0.5}]
    assert not again.done("sparse")


def test_other_settings_are_refused_key_by_key(tmp_path):
    path = tmp_path / "state.json"
    RunState(path, {"seed": 0, "l1": {"dense": 0.1, "sparse": 0.1}})
    with pytest.raises(ResumeError, match=r"l1\.sparse: was 0\.1, now 0\.2") as caught:
        RunState(path, {"seed": 0, "l1": {"dense": 0.1, "sparse": 0.2}})
    assert "seed" not in str(caught.value)
    assert "resume=False" in str(caught.value)


def test_other_trainer_settings_are_refused(tmp_path):
    state = RunState(tmp_path / "s.json", {})
    state.start("dense", {"lr": 1.0, "steps": 5})
    state.start("dense", {"steps": 5, "lr": 1.0})
    with pytest.raises(ResumeError, match=r"'dense'.*\n  steps: was 5, now 6"):
        state.start("dense", {"lr": 1.0, "steps": 6})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}}'])
def test_a_damaged_state_is_refused_by_name(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(ResumeError, match=r"state\.json is not a state file"):
        RunState(path, {})


def test_a_state_of_another_format_is_refused(tmp_path):
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"format_version": 99, "settings": {}, "phases": {}}))
    with pytest.raises(ResumeError, match="format 99"):
        RunState(path, {})


def test_differences_name_added_and_removed_keys():
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == [
        "b: was 2, now '(absent)'",
        "c: was '(absent)', now 3",
    ]


def test_tensors_come_back_bit_for_bit(tmp_path):
    values = {"x": torch.randn(4, 3).t(), "h": torch.randn(2).to(torch.bfloat16)}
    save_tensors(tmp_path / "t.safetensors", values)
    file = TensorFile(tmp_path / "t.safetensors")
    assert set(file) == set(values)
    assert all(torch.equal(file[n], values[n]) for n in values)
    with pytest.raises(KeyError):
        file["y"]


def test_two_processes_cannot_run_in_one_folder(tmp_path):
    code = f"""
import sys
from pathlib import Path
from sparseft.training.state import exclusive

def attempt():
    try:
        with exclusive(Path({str(tmp_path)!r})):
            print("entered", flush=True)
    except Exception as error:
        print(str(error).replace(chr(10), " "), flush=True)

attempt()
sys.stdin.readline()
attempt()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        with exclusive(tmp_path):
            held = other.stdout.readline()
        free, error = other.communicate("go\n", timeout=120)
    assert "another process is running" in held, error
    assert free == "entered\n", error


def test_debris_of_a_killed_write_is_removed(tmp_path):
    debris = tmp_path / "iteration-0" / ".adapter.safetensors.0a1b.tmp"
    debris.parent.mkdir()
    debris.write_text("half")
    mine = tmp_path / "iteration-0" / "notes.tmp"
    mine.write_text("keep")
    with exclusive(tmp_path):
        assert not debris.exists()
        assert mine.exists()


def test_random_state_comes_back():
    import random

    import numpy as np

    cpu = torch.device("cpu")
    seed_everything(3)
    np.random.standard_normal()  # leaves a cached second normal behind
    state = rng_state(cpu)

    def draw():
        return (
            random.random(),
            np.random.standard_normal(3).tolist(),
            torch.rand(3).tolist(),
        )

    first = draw()
    set_rng_state(state, cpu)
    assert draw() == first
    assert draw() != first


def test_derived_seeds_differ_by_name_and_are_stable():
    assert derive_seed(0, "dense") == derive_seed(0, "dense")
    assert len({derive_seed(s, n) for s in range(4) for n in ("dense", "sparse", "head")}) == 12
    assert derive_seed(0, "iteration-0/dense") == DERIVED


# Written down, so that a change of the rule, which would change every result, is seen.
DERIVED = 1101754999
