"""``sparseft overlap``."""

from __future__ import annotations

import json

import pytest
import torch

from sparseft import Adapter, SparseDiff, overlap_report
from sparseft.adapter import AdapterMetadata
from sparseft.cli.main import BAD_INPUT, OK, main
from sparseft.fingerprint import Fingerprint, fingerprint_tensor

NAMES = ("encoder.layer.2.q.weight", "encoder.layer.10.q.weight", "encoder.layer.10.q.bias")


def save(folder, name, seed, base=0.0):
    generator = torch.Generator().manual_seed(seed)
    diffs = {
        n: SparseDiff.from_dense(
            torch.randn(30, generator=generator) * (torch.rand(30, generator=generator) < 0.4)
        )
        for n in NAMES
    }
    prints = {n: fingerprint_tensor(n, torch.full((30,), base)) for n in NAMES}
    adapter = Adapter(diffs, name=name, metadata=AdapterMetadata(fingerprint=Fingerprint(prints)))
    adapter.save(folder / name)
    return str(folder / name)


@pytest.fixture
def paths(tmp_path):
    return [save(tmp_path, name, i) for i, name in enumerate(("sw", "qu", "nli"))]


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_pairs(paths, capsys):
    assert main(["overlap", *paths]) == OK
    out = capsys.readouterr().out
    report = overlap_report(paths)
    for (a, b), path in zip(report.pairs, paths, strict=True):
        assert path in out
        [row] = [r for r in rows(out) if r[:3] == [a, "|", b]]
        pair = report.pair(a, b)
        assert row[3:6] == [f"{pair.common:,}", f"{pair.union:,}", f"{pair.jaccard:.4f}"]
        assert row[7] == f"{pair.opposed:,}"
        assert row[9] == f"{pair.cosine:+.4f}"
    assert not any(name in out for name in NAMES)


def test_rows_of_two(paths, capsys):
    assert main(["overlap", *paths[:2], "--per-tensor"]) == OK
    out = capsys.readouterr().out
    found = overlap_report(paths[:2]).by("tensor", "sw", "qu")
    shown = [r for r in rows(out) if r[0] in NAMES]
    assert [r[0] for r in shown] == [NAMES[0], NAMES[2], NAMES[1]], "layer 10 comes after layer 2"
    assert [r[1] for r in shown] == [str(found[r[0]].common) for r in shown]


def test_means_and_one_pair_of_three(paths, capsys):
    assert main(["overlap", *paths, "--per-layer"]) == OK
    out = capsys.readouterr().out
    assert "Means over all pairs" in out
    assert [r[0] for r in rows(out) if r[0].startswith("encoder")] == [
        "encoder.layer.2",
        "encoder.layer.10",
    ]
    assert main(["overlap", *paths, "--per-layer", "--pair", "qu", "nli"]) == OK
    out = capsys.readouterr().out
    found = overlap_report(paths).pair("qu", "nli", "*layer.10*")
    [row] = [r for r in rows(out) if r[0] == "encoder.layer.10"]
    assert row[1:4] == [str(found.common), str(found.union), f"{found.jaccard:.4f}"]


def test_groups(paths, capsys):
    assert main(["overlap", *paths[:2], "--group", "*weight", "*bias"]) == OK
    out = capsys.readouterr().out
    found = overlap_report(paths[:2]).pair("sw", "qu", "*bias")
    [row] = [r for r in rows(out) if r[0] == "*bias"]
    assert row[1] == str(found.common)


def test_files(paths, tmp_path, capsys):
    png, text = tmp_path / "o.png", tmp_path / "o.json"
    assert main(["overlap", *paths, "--png", str(png), "--json", str(text)]) == OK
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 10_000
    assert json.loads(text.read_text()) == overlap_report(paths).to_json()
    out = capsys.readouterr().out
    assert f"{png}: heat map" in out
    assert f"{text}: 3 pairs in 3 tensors" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--group", "*wieght"], "no tensor's name matches '*wieght'"),
        (["--pair", "sw", "que"], "no adapter is called 'que'. Did you mean 'qu'?"),
        (["--pair", "sw", "sw"], "got 'sw' twice"),
        (["--per-layer", "--per-tensor"], "not allowed with argument --per-layer"),
        (["--per-tensr"], "Did you mean '--per-tensor'"),
    ],
)
def test_bad_words(paths, tmp_path, capsys, extra, message):
    png = tmp_path / "o.png"
    assert main(["overlap", *paths, "--png", str(png), *extra]) == BAD_INPUT
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out
    assert not png.exists()


def test_bad_adapters(paths, tmp_path, capsys):
    assert main(["overlap", paths[0]]) == BAD_INPUT
    assert "wanted two or more" in capsys.readouterr().err
    assert main(["overlap", paths[0], str(tmp_path / "swa")]) == BAD_INPUT
    assert "no adapter at" in capsys.readouterr().err
    other = save(tmp_path, "other", 5, base=1.0)
    assert main(["overlap", paths[0], other]) == BAD_INPUT
    assert "'sw' and 'other' were made on different bases" in capsys.readouterr().err
    assert main(["overlap", paths[0], other, "--no-check-base"]) == OK
