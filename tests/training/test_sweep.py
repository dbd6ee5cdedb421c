"""A sweep on a tiny base: one dense phase a seed, nested masks, tables, resuming, bad input."""

from __future__ import annotations

import json

import pytest
import torch

from sparseft import Adapter
from sparseft.cli.main import main
from sparseft.errors import RecipeError, ResumeError
from sparseft.evaluation import Results
from sparseft.training import loop
from sparseft.training.recipe import load_recipe
from sparseft.training.sweep import run_sweep, sweep_units

METHODS = {
    "LT-SFT": {},
    "DeFT-X": {"denoise": {"rank": 2, "residual": 0.1}},
    "LIFT": {"selector": "low_rank", "selector_options": {"rank": 2}},
    "random": {"selector": "random"},
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


@pytest.fixture
def sweep_data(recipe_data):
    recipe_data["sweep"] = {"densities": [0.05, 0.2], "methods": METHODS}
    recipe_data["language"]["texts"] = {}
    for key in ("density", "steps"):
        recipe_data["task"].pop(key)
    recipe_data["task"]["steps"] = [3, 2]
    recipe_data["evaluation"].update(languages=["ind", "ban"], settings=["full", "task"])
    return recipe_data


@pytest.fixture(scope="module")
def trained_steps():
    """Count optimizer steps by phase folder."""
    counts: dict[str, int] = {}
    plain = loop.LoopTrainer.train

    def train(self, *args, **kwargs):
        result = plain(self, *args, **kwargs)
        place = "/".join(self.output_dir.parts[-4:])
        counts[place] = counts.get(place, 0) + 1
        return result

    patch = pytest.MonkeyPatch()
    patch.setattr(loop.LoopTrainer, "train", train)
    yield counts
    patch.undo()


def test_a_sweep_end_to_end(sweep_data, tmp_path, trained_steps, capsys):
    trained_steps.clear()
    recipe = load_recipe(sweep_data)
    result = run_sweep(recipe)
    assert not result.missing
    dense = {place for place in trained_steps if place.endswith("/dense")}
    assert dense == {f"out/phase1-seed{s}/iteration-0/dense" for s in (0, 1)}
    assert set(trained_steps.values()) == {1}
    assert len(trained_steps) == 2 + 2 * 4 * 2

    settings = {(r.setting, r.density) for r in result.results.rows}
    assert settings == {
        ("full fine-tuning", None), *((name, d) for name in METHODS for d in (0.05, 0.2))
    }  # fmt: skip
    masks = set()
    for name in ("lt-sft", "deft-x", "lift", "random"):
        home = tmp_path / "out" / name / "seed0"
        files = json.loads((home / "unit.json").read_text())["adapters"]
        small, large = (Adapter.load(home / files[repr(d)]) for d in (0.05, 0.2))
        for key, diff in small.diffs.items():
            assert torch.isin(diff.indices, large.diffs[key].indices).all(), "masks nest"
        assert large.nnz > 3 * small.nnz
        masks.add(frozenset((n, i) for n, d in small.diffs.items() for i in d.indices.tolist()))
    assert len(masks) == 4, "each method has a mask of its own"

    written = {path.name for path in result.files}
    assert written == {
        "results.json", "results.md", "results.png", "comparison.md", "densities.png"
    }  # fmt: skip
    text = (tmp_path / "out/results/comparison.md").read_text()
    assert "| DeFT-X | 5 % |" in text
    assert "Against LT-SFT" in text
    assert (tmp_path / "out/results/densities.png").read_bytes().startswith(b"\x89PNG")
    assert Results.load(tmp_path / "out/results/results.json").rows == result.results.rows

    # The same command again does nothing; another density trains only that.
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(sweep_data))  # JSON is YAML
    trained_steps.clear()
    assert main(["sweep", str(path)]) == 0
    assert not trained_steps
    out = capsys.readouterr().out
    assert "DeFT-X @ 0.05" in out
    assert main(["sweep", str(path), "--list"]) == 0
    listed = capsys.readouterr().out.split("\n")
    assert listed[0].split() == ["done", "phase1-seed0"]
    assert all("to do" not in line for line in listed)

    sweep_data["sweep"]["densities"] = [0.05, 0.1, 0.2]
    more = run_sweep(load_recipe(sweep_data))
    assert sorted(place.rpartition("-")[2] for place in trained_steps) == sorted(
        [str(round(large.nnz / 2))] * 8
    ), "one more density trains just its own masks"
    assert {r.density for r in more.results.rows} == {None, 0.05, 0.1, 0.2}

    changed = load_recipe(sweep_data, ["task.lr=[1e-3, 2e-3]"])
    with pytest.raises(ResumeError, match=r"task.lr: was \[0.001, 0.001\], now \[0.001, 0.002\]"):
        run_sweep(changed)
    changed = load_recipe(sweep_data, ["sweep.methods.LIFT.selector_options.rank=3"])
    with pytest.raises(ResumeError, match="LIFT.selector_options.rank: was 2, now 3"):
        run_sweep(changed)


def test_languages_get_the_same_treatment(recipe_data, tmp_path):
    recipe_data["sweep"] = {
        "densities": [0.2],
        "methods": {"LT-SFT": {}, "random": METHODS["random"]},
    }
    recipe_data["task"]["seeds"] = [0]
    recipe_data["evaluation"].update(languages=["ban"], settings=["task", "task+language"])
    result = run_sweep(load_recipe(recipe_data))
    assert {(r.setting, r.language) for r in result.results.rows} == {
        (setting, "ban")
        for name in ("LT-SFT", "random")
        for setting in (name, f"{name} + language")
    }
    assert (tmp_path / "out/phase1-language-ban/iteration-0/dense.safetensors").is_file()
    gains = {gain.setting for _, gain in result.results.composed_gains()}
    assert gains == {"LT-SFT + language", "random + language"}


def test_bad_sweeps_are_named(sweep_data):
    def refused(match, **sweep):
        changed = {**sweep_data, "sweep": {**sweep_data["sweep"], **sweep}}
        with pytest.raises(RecipeError, match=match):
            sweep_units(load_recipe(changed))

    refused(r"sweep.densities must be in \(0, 1\]", densities=[0.0])
    refused("sweep.baseline is 'LTSFT'.*LT-SFT", baseline="LTSFT")
    refused("stands for composition", methods={"a + b": {}})
    refused("'A!' and 'a' would share|'a' and 'A!' would share", methods={"a": {}, "A!": {}})
    refused("rank", methods={"x": {"denoise": {"rank": 0.5}}})
    refused("selector is 'magnitud'", methods={"x": {"selector": "magnitud"}})
    refused("needs a task section and sweep.methods", methods={})


def test_a_dense_phase_of_other_settings_is_refused(sweep_data):
    recipe = load_recipe(sweep_data, ["task.seeds=[0]", "evaluation.languages=[]"])
    run_sweep(recipe, only=["phase1-*"])
    changed = load_recipe(
        sweep_data,
        ["task.seeds=[0]", "evaluation.languages=[]", "task.exclude=['*LayerNorm*', '*bias']"],
    )
    with pytest.raises(
        ResumeError, match=r"finished unit with other settings:\n  task.exclude: was"
    ):
        run_sweep(changed, only=["lt-sft-*"])
