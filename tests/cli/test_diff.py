"""``sparseft diff``, and its way back through ``sparseft compose``."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from sparseft import Adapter
from sparseft.cli.main import BAD_INPUT, OK, main


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    work = tmp_path_factory.mktemp("models")
    return tiny.save_tiny(work / "base"), tiny.save_tiny(work / "tuned", num_labels=3, seed=1)


def test_there_and_back(folders, tmp_path, capsys, monkeypatch):
    base, tuned = map(str, folders)
    monkeypatch.chdir(tmp_path)
    assert main(["diff", base, tuned, "--all", "--mode", "set", "--out", "change"]) == OK
    adapter = Adapter.load("change")
    said = f"{adapter.nnz:,} entries in {len(adapter)} tensors, 4 kept whole (classifier"
    assert said in capsys.readouterr().out
    assert main(["compose", "--base", base, "--adapter", "change", "--out", "again"]) == OK
    wanted, got = load_file(f"{tuned}/model.safetensors"), load_file("again/model.safetensors")
    assert set(got) == set(wanted)
    assert all(torch.equal(got[n], t) for n, t in wanted.items())


def test_options(folders, tmp_path, capsys):
    base, tuned = folders
    words = ["diff", str(base), str(tuned), "--out", str(tmp_path / "a.safetensors")]
    more = ["--nnz", "50", "--exclude", "*embeddings*", "--new", "skip", "--name", "sw"]
    assert main([*words, *more]) == OK
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert (adapter.nnz, adapter.name, len(adapter.dense)) == (50, "sw", 0)
    assert not [n for n in adapter if "embeddings" in n]
    assert main([*words, "--all"]) == BAD_INPUT
    assert "exists already; add --overwrite" in capsys.readouterr().err
    assert main([*words, "--density", "0.01", "--overwrite"]) == OK
    assert Adapter.load(tmp_path / "a.safetensors").metadata.density == 0.01


def test_nothing_changed(folders, tmp_path, capsys):
    base, _ = folders
    assert main(["diff", str(base), str(base), "--all", "--out", str(tmp_path / "a")]) == OK
    assert "hold the same weights." in capsys.readouterr().out
    words = ["diff", str(base), str(base), "--all", "--out", str(tmp_path / "b")]
    assert main([*words, "--exclude", "*embeddings*"]) == OK
    assert "hold the same weights in all else." in capsys.readouterr().out


def test_nothing_asked_for(folders, tmp_path, capsys):
    words = ["diff", *map(str, folders), "--out", str(tmp_path / "a"), "--new", "skip"]
    assert main([*words, "--nnz", "0"]) == OK
    out = capsys.readouterr().out
    assert "--nnz 0 asks for no entry" in out
    assert "same weights" not in out


def test_what_is_not_given_back_is_said(folders, tmp_path, caplog):
    """A base with an old head, and a tuned encoder alone."""
    base, tuned = folders
    words = ["diff", str(tuned), str(base), "--all", "--mode", "set", "--new", "skip"]
    assert main([*words, "--out", str(tmp_path / "a")]) == OK
    assert "the tuned checkpoint lacks 4 tensors of the base (classifier.dense.bias" in caplog.text


def test_a_file_that_is_read_is_not_replaced(folders, tmp_path, capsys):
    base, tuned = (shutil.copytree(f, tmp_path / f.name) for f in folders)
    weights = tuned / "model.safetensors"
    before = weights.read_bytes()
    for given in (tuned, weights):
        words = ["diff", str(base), str(given), "--all", "--out", str(weights), "--overwrite"]
        assert main(words) == BAD_INPUT
        assert f"{given}, which is read, is or holds that file" in capsys.readouterr().err
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments --all --density --nnz is required"),
        (["--all", "--nnz", "3"], "not allowed with argument"),
        (["--density", "2"], "density is 2.0, wanted a fraction"),
        (["--all", "--exclude", "nothing"], "matches none"),
        (["--all", "--new", "error"], "--new dense (new='dense') takes such tensors whole"),
    ],
)
def test_bad_input(folders, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert main(["diff", *map(str, folders), "--out", str(out), *words]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_help_teaches(capsys):
    assert main(["diff", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("examples:", "what comes out", "--all --mode set"):
        assert word in out
