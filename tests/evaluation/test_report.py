"""Summaries by hand, files that round-trip, the same bytes for the same results."""

from __future__ import annotations

import json
import struct

import pytest

from sparseft.errors import DataError
from sparseft.evaluation import Results, provenance

SCORES = {  # setting -> language -> score of seed 0, 1
    "task": {"ind": (0.80, 0.70), "ban": (0.60, 0.50), "min": (0.70, 0.60)},
    "task + language": {"ban": (0.62, 0.54), "min": (0.74, 0.60)},
}


@pytest.fixture
def results():
    out = Results(source_language="ind", title="A | study", provenance={"sparseft": "1"})
    for setting, by_language in SCORES.items():
        for language, values in by_language.items():
            for seed, value in enumerate(values):
                out.add(setting=setting, language=language, seed=seed, metric="f1", value=value)
    return out


def test_summary_by_hand(results):
    task, both = results.summary("f1")
    assert list(task.languages) == ["ind", "ban", "min"], "the source first"
    assert task.languages["ban"].mean == pytest.approx(0.55)
    assert task.languages["ban"].sd == pytest.approx(0.1 / 2**0.5)
    assert task.languages["ban"].seeds == 2
    assert task.mean.mean == pytest.approx(0.60), "over ban and min; ind is the source"
    assert task.mean.sd == pytest.approx(0.1 / 2**0.5), "of the per-seed means 0.65 and 0.55"
    assert task.worst == "ban"
    assert task.gap == pytest.approx(0.75 - 0.60)
    assert both.gap is None, "no score in the source language"


def test_one_seed_has_no_deviation_and_missing_seeds_are_shown(results):
    results.add(setting="full", language="ban", seed=0, metric="f1", value=0.9)
    results.add(setting="full", language="min", seed=0, metric="f1", value=0.7)
    results.add(setting="full", language="min", seed=1, metric="f1", value=0.5)
    full = results.summary()[-1]
    assert full.languages["ban"].sd is None
    assert full.mean.mean == pytest.approx(0.75)
    assert (full.mean.sd, full.mean.seeds) == (None, 1), "only seed 0 has every language"
    row = next(line for line in results.to_markdown().splitlines() if line.startswith("| full "))
    assert row.split("|")[-2].strip() == "1-2"
    assert "90.0 |" in row


def test_gain_is_paired(results):
    gain = results.gain("task + language", "task")
    assert gain.languages == {"ban": pytest.approx(0.03), "min": pytest.approx(0.02)}
    assert gain.mean == pytest.approx(0.025)
    assert gain.standard_error == pytest.approx(0.005)
    assert gain.pairs == 4
    assert results.gain("task + language", "task", languages=["min"]).standard_error is None
    with pytest.raises(DataError, match="Did you mean 'task'"):
        results.gain("task + language", "tsk")
    with pytest.raises(DataError, match="share no language"):
        results.gain("task + language", "task", languages=["ind"])


def test_gain_at_one_of_several_densities():
    out = Results()
    for density, value in ((None, 0.5), (0.1, 0.6), (0.01, 0.4)):
        setting = "full" if density is None else "task"
        out.add(setting=setting, language="ban", seed=0, metric="f1", value=value, density=density)
    assert out.gain("task", "full", density=0.1).mean == pytest.approx(0.1)
    with pytest.raises(DataError, match="give density"):
        out.gain("task", "full")
    assert [s.label for s in out.summary()] == ["full", "task @ 0.1", "task @ 0.01"]


def test_files(results, tmp_path):
    paths = results.save(tmp_path / "a")
    assert [p.name for p in paths] == ["results.json", "results.md", "results.png"]
    data = json.loads(paths[0].read_text())
    assert data["seeds"] == [0, 1]
    assert data["provenance"] == {"sparseft": "1"}
    assert len(data["rows"]) == 10
    assert data["gains"]["f1"][0]["mean"] == pytest.approx(0.025)
    again = Results.load(paths[0])
    assert again == results
    again.save(tmp_path / "b")
    for path in paths:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in paths)


def test_markdown(results):
    text = results.to_markdown("f1")
    assert (
        "| task | 75.0 ± 7.1 | 55.0 ± 7.1 | 65.0 ± 7.1 | 60.0 ± 7.1 | ban 55.0 | 15.0 | 2 |" in text
    )
    assert "| task + language | - | 58.0 ± 5.7 |" in text
    assert (
        "task + language over task: +2.5, standard error 0.5; ban +3.0, min +2.0 "
        "(languages: 2, pairs: 4)."
    ) in text
    assert "ban Balinese" in text
    assert "Made by sparseft 1" in text


def test_many_languages_go_down_the_table():
    out = Results(source_language="ind")
    codes = ["ind", "ban", "min", "sun", "jav", "ace", "bug", "mad"]
    for i, code in enumerate(codes):
        for setting in ("task", "full"):
            out.add(setting=setting, language=code, seed=0, metric="f1", value=0.5 + i / 100)
    lines = out.to_markdown().splitlines()
    assert "| language | task | full |" in lines
    assert "| mad | 57.0 | 57.0 |" in lines
    assert "| worst | ban 51.0 | ban 51.0 |" in lines


def test_plot_is_a_png_that_differs_with_the_scores(results, tmp_path):
    results.to_png(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 500
    assert height > 400
    results.add(setting="full", language="ban", seed=0, metric="f1", value=0.9)
    results.to_png(tmp_path / "b.png")
    assert content != (tmp_path / "b.png").read_bytes()


def test_plot_leaves_matplotlib_alone(results, tmp_path):
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    results.to_png(tmp_path / "a.png")
    assert matplotlib.get_backend(auto_select=False) == before


def test_rows_that_do_not_belong(results):
    again = {"setting": "task", "language": "ban", "seed": 0, "metric": "f1"}
    with pytest.raises(DataError, match="there already"):
        results.add(value=0.1, **again)
    with pytest.raises(DataError, match="nan"):
        results.add(value=float("nan"), **{**again, "seed": 9})
    with pytest.raises(DataError, match="Did you mean 'f1'"):
        results.summary("f2")
    with pytest.raises(DataError, match="no results"):
        Results().summary()


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 9}', '{"format_version": 1}'])
def test_other_files_are_refused(text):
    with pytest.raises(DataError):
        Results.from_json(text)


def test_provenance_has_versions_and_no_path(tmp_path):
    made = provenance(seeds=[0, 1], recipe={"lr": 1e-4})
    assert made["sparseft"]
    assert {"python", "torch", "transformers"} <= set(made["versions"])
    assert made["seeds"] == [0, 1]
    text = json.dumps(made)
    assert "/home" not in text
    assert str(tmp_path.parent) not in text
