"""Paired comparisons: tests against scipy and enumeration, pairing, the tables."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparseft.errors import DataError
from sparseft.evaluation import Results
from sparseft.evaluation.comparison import (
    compare,
    comparison_markdown,
    sign_flip_p,
    student_p,
)
from sparseft.evaluation.density_plot import plot_densities


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 30])
def test_student_agrees_with_scipy(n):
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed: pip install scipy")
    for shift in (0.0, 0.4, 2.0):
        values = (torch.randn(n, generator=torch.Generator().manual_seed(n)) + shift).tolist()
        assert student_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=1e-10)


def test_student_without_spread():
    assert student_p([0.0, 0.0]) is None
    assert student_p([0.3 - 0.2, 0.4 - 0.3, 0.5 - 0.4]) is None, "equal but for rounding"


def test_sign_flips_are_counted():
    values = [0.3, -0.1, 0.2, 0.4, 0.05]
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True)))
            for signs in itertools.product((1, -1), repeat=5)]  # fmt: skip
    expected = sum(s >= abs(sum(values)) - 1e-12 for s in sums) / 32
    assert sign_flip_p(values) == expected
    assert sign_flip_p([1.0] * 6) == 2 / 64
    assert sign_flip_p([0.0] * 4) == 1.0
    assert sign_flip_p([0.01, 0.02, -0.03, 0.04, -0.04]) == 1.0, "a sum of rounding is 0"


def test_many_pairs_are_drawn():
    generator = torch.Generator().manual_seed(3)
    none = torch.randn(40, generator=generator).tolist()
    p = sign_flip_p(none)
    assert p == sign_flip_p(none)
    assert abs(p - student_p(none)) < 0.05
    assert sign_flip_p([v + 2 for v in none]) < 1e-3


@pytest.fixture
def results():
    made = Results(source_language="ind", title="A sweep")
    for seed in range(3):
        for k, language in enumerate(("ind", "ban", "min")):
            cell = {"language": language, "seed": seed, "metric": "f1"}
            for density in (0.01, 0.1):
                value = 0.5 + 0.01 * k + density
                made.add(setting="plain", value=value, density=density, **cell)
                value += 0.02 + 0.001 * seed
                made.add(setting="better", value=value, density=density, **cell)
            made.add(setting="full", value=0.6, **cell)
    return made


def test_pairs_are_languages_and_seeds_without_the_source(results):
    found = {(c.setting, c.density): c for c in compare(results, "plain")}
    assert set(found) == {("better", 0.01), ("better", 0.1), ("full", 0.01), ("full", 0.1)}
    better = found["better", 0.1]
    assert better.pairs == 6
    assert better.won == 6
    assert better.mean == pytest.approx(0.021)
    assert better.p_pairs == 2 / 64
    assert better.p_seeds == pytest.approx(student_p([0.02, 0.021, 0.022]))
    assert found["full", 0.1].mean == pytest.approx(0.6 - 0.615)
    with pytest.raises(DataError, match=r"no setting 'plane'.*plain"):
        compare(results, "plane")


def test_composed_settings_meet_the_baseline_composed_alike(results):
    for seed in range(3):
        for setting, value in (("plain", 0.9), ("better", 0.8)):
            results.add(setting=f"{setting} + language", language="ban", seed=seed, metric="f1",
                        value=value + 0.01 * seed * (setting == "plain"), density=0.1)  # fmt: skip
    found = {(c.setting, c.density): c for c in compare(results, "plain")}
    composed = found["better + language", 0.1]
    assert composed.baseline == "plain + language"
    assert composed.mean == pytest.approx(-0.11)
    assert ("plain + language", 0.1) not in found
    assert "| better + language (ban) |" in comparison_markdown(results, "plain")


def test_only_the_source_language(tmp_path):
    made = Results(source_language="ind", title="A|B costs $5 and $6")
    for seed, value in enumerate((0.5, 0.6)):
        for name, more in (("a|b", 0.0), ("$c$", 0.1 * seed)):
            made.add(setting=name, language="ind", seed=seed, metric="f1", value=value + more,
                     density=0.1)  # fmt: skip
    text = comparison_markdown(made, "a|b")
    assert "mean over the source language" in text
    assert "| a\\|b | 55.0 ± 7.1 |" in text
    assert "| $c$ | 10 % | +5.0 |" in text
    plot_densities(made, tmp_path / "a.png", "f1")


def test_tables_and_plot(results, tmp_path):
    text = comparison_markdown(results, "plain")
    assert "| method | 1 % | 10 % | all weights |" in text
    assert "| better | 10 % | +2.1 | 0.1 | 6 of 6 | 0.031 | 0.001 |" in text
    plot_densities(results, tmp_path / "a.png", "f1")
    plot_densities(results, tmp_path / "b.png", "f1")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
