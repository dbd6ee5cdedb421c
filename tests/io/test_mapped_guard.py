"""Files that vanish, are replaced, cut short or rewritten while an adapter has them mapped."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from sparseft import Adapter, SparseDiff
from sparseft.errors import AdapterFormatError
from sparseft.io.mapped_guard import MappedGuard

NAME = "layer.0.weight"


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("check", ["lazy", "full"])
def test_a_deleted_file_is_still_there_for_who_has_it(adapter, saved, check):
    loaded = Adapter.load(saved, check=check)
    saved.unlink()
    assert loaded.equals(adapter)


@pytest.mark.parametrize("check", ["lazy", "full"])
def test_a_file_replaced_by_renaming(adapter, saved, check):
    loaded = Adapter.load(saved, check=check)
    other = Adapter({NAME: SparseDiff.from_dense(torch.full((3, 5), 9.0))}, name="other")
    other.save(saved)
    assert loaded.equals(adapter), "what was loaded is what was there then"
    assert Adapter.load(saved).equals(other)


@pytest.mark.parametrize("check", ["lazy", "full"])
@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_file_cut_short_is_named_and_not_touched(saved, check, left):
    """Without the look at its size this is a SIGBUS, which no `except` catches."""
    size = saved.stat().st_size
    loaded = Adapter.load(saved, check=check)
    left %= size
    os.truncate(saved, left)
    wanted = rf"{saved}: the file was cut short in place .* from {size:,} bytes to {left:,};"
    with pytest.raises(AdapterFormatError, match=wanted):
        loaded[NAME]
    with pytest.raises(AdapterFormatError, match="load the adapter again"):
        loaded.dense["head.weight"]


_CUT = """
import os, sys, torch
from sparseft import Adapter, SparseDiff
from sparseft.errors import AdapterFormatError
n = 1 << 20
Adapter({"w": SparseDiff.from_dense(torch.ones(n))}).save("a")
loaded = Adapter.load("a", check="lazy")
os.truncate("a/adapter.safetensors", 4096)
try:
    loaded["w"]
except AdapterFormatError:
    print("named")
"""


def test_a_cut_of_many_pages_does_not_kill_the_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _CUT], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "named"), done.stderr


def rewrite(path, edit):
    """Change bytes in place, at a time the file system tells from the one before."""
    data = bytearray(path.read_bytes())
    edit(data)
    with open(path, "r+b") as file:
        file.write(data)
    later = time.time_ns() + 10**9
    os.utime(path, ns=(later, later))


def test_bytes_rewritten_in_place_are_checked_again(saved):
    loaded = Adapter.load(saved, check="full")
    loaded[NAME]

    def damage(data):
        for i in range(8 + int.from_bytes(data[:8], "little"), len(data)):
            data[i] ^= 0x01

    rewrite(saved, damage)
    with pytest.raises(AdapterFormatError, match=r"rewritten in place .* load the adapter again"):
        loaded[NAME]
    with pytest.raises(AdapterFormatError, match="rewritten in place"):
        loaded.dense["head.weight"]


def test_the_same_bytes_written_again_are_accepted(adapter, saved):
    loaded = Adapter.load(saved, check="full")
    rewrite(saved, lambda data: None)
    assert loaded.equals(adapter)


def test_a_larger_file_is_no_danger(adapter, saved):
    loaded = Adapter.load(saved, check="lazy")
    with open(saved, "ab") as file:
        file.write(b"tail")
    assert loaded.equals(adapter)


def test_what_was_forgotten_is_what_was_registered(saved):
    with open(saved, "rb") as file:
        guard = MappedGuard(file.fileno(), saved)
    one, other = {"a": 1}, {"b": 2}
    guard.forgets(one)
    guard.check()
    assert one
    assert not guard.rewritten
    rewrite(saved, lambda data: None)
    guard.check()
    assert (one, other) == ({}, {"b": 2})
    assert guard.rewritten
    one["a"] = 1
    guard.check()
    assert one, "one write is noticed once"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_descriptors_are_given_back(saved):
    before = open_descriptors()
    loaded = Adapter.load(saved)
    assert open_descriptors() - before
    del loaded
    assert open_descriptors() <= before
