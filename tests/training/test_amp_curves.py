"""Loss curves in mixed precision against dense-masked fp32: `run.py amp`, small and whole."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module")
def amp():
    """The modules of the benchmark, by name."""
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    names = ("amp_curves", "amp_study", "amp_ways")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def study(amp, real_data):
    """A random encoder on real sentences."""
    return amp["amp_study"].real_study(
        real_data, steps=24, batch=4, length=12, density=0.15, lr=1e-2, shape=SMALL
    )


@pytest.fixture(scope="module")
def found(amp, study, tmp_path_factory):
    """(rows by name, folder): what `run.py amp` wrote of all that is ours."""
    results = tmp_path_factory.mktemp("results")
    options = ["--steps", "24", "--only", "ours*", "--name", "some"]
    with mock.patch.object(amp["amp_curves"], "real_study", return_value=study):
        assert amp["amp_curves"].main(options, results=results) == 0
    folder = results / "scratch"  # fewer steps, not every way: nothing to commit
    rows = json.loads((folder / "some.json").read_text())["curves"]
    return {row["name"]: row for row in rows}, folder


def failed(row) -> set[str]:
    return {check["name"] for check in row["checks"] if not check["passed"]}


def test_ours_is_as_near_to_fp32_as_dense_training_is(found):
    rows = [row for row in found[0].values() if row["ours"] and not row["spoil"]]
    assert len(rows) == 4
    over = [c for row in rows for c in row["checks"] if not c["passed"]]
    assert not over
    assert all(len(row["checks"]) == 5 for row in rows)


def test_a_diff_in_bf16_and_another_mask_are_caught(found):
    rows = found[0]
    narrow = rows["ours bf16 base, diff kept in bf16"]
    assert narrow["good"]
    assert "lost" in failed(narrow)
    astray = rows["ours fp32, another mask"]
    assert astray["good"]
    assert failed(astray) >= {"diff", "entries outside the mask that changed"}


def test_a_stray_entry_is_seen(amp, study, tmp_path, monkeypatch):
    """One stray entry of one weight: the gate is not decoration."""
    ways = amp["amp_ways"]
    after_step = ways._Attached.after_step

    def stray(side):
        after_step(side)
        name = "roberta.encoder.layer.0.output.dense.weight"
        frozen = (~study.masks[name]).view(-1).nonzero()[0]
        side.attachment.model.get_parameter(name).data.view(-1)[frozen] += 1e-3

    monkeypatch.setattr(ways._Attached, "after_step", stray)
    rows = {row["name"]: row for row in amp["amp_curves"].curves(study, ways_of(amp, "ours fp32"))}
    assert not rows["ours fp32"]["good"]
    assert "entries outside the mask that changed" in failed(rows["ours fp32"])


def ways_of(amp, *names: str):
    """These ways, and the dense ones that their limits come from."""
    chosen = {way.name for name in names for way in amp["amp_curves"].chosen(name)}
    return [way for way in amp["amp_ways"].WAYS if way.name in chosen]


def test_the_page_shows_what_the_command_wrote(amp, found):
    _, folder = found
    page = importlib.import_module("page").Page(folder, draw=True)
    text = page.fill("{{precisions some.json}}\n{{plot some.json losses}}")
    assert (folder / "some.md").read_text().strip() in text
    assert "some_losses.png" in text
    assert (folder / "some_losses.png").stat().st_size > 10_000


@pytest.mark.slow
def test_300_steps_on_the_real_encoder(amp, real_encoder):
    """Without fp16 and the mistakes; `run.py amp` has them too. 20 minutes on one core."""
    whole = amp["amp_study"].real_study(real_encoder.parent, steps=300)
    ways = ways_of(amp, "ours fp32", "ours bf16 autocast", "ours bf16 base")
    rows = amp["amp_curves"].curves(
        whole, ways, progress=lambda text: sys.stderr.write(text + "\n")
    )
    assert {row["name"]: failed(row) for row in rows if failed(row)} == {}
    assert all(row["last"] < row["first"] - 0.2 for row in rows)
