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
        "results.json", "results.md", "comparison.md", "densities.png"
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
    refused(
        r"sweep.methods.x.denoise has the key 'rnk'.*'rank'", methods={"x": {"denoise": {"rnk": 1}}}
    )
    refused("uses itself", methods={"Phase1": {}})
    refused("uses itself", methods={"full fine-tuning": {}})
    refused("selector is 'n:m', which keeps a number", methods={"x": {"selector": "n:m"}})
    refused("'function', which a recipe cannot", methods={"x": {"selector": "function"}})
    for options in ({"seed": 3}, {"base": "x"}):
        method = {"selector": "random", "selector_options": options}
        refused("filled in or cannot come", methods={"x": method})
    both = {"denoise": {"rank": 4}, "selector_options": {"rank": 3}}
    refused("'rank', which denoise gives too", methods={"x": both})

    def refused_keys(match, *overrides):
        with pytest.raises(RecipeError, match=match):
            sweep_units(load_recipe(sweep_data, overrides))

    refused_keys("task.iterations is 3, but masks of a sweep", "task.iterations=3")
    refused_keys("task.selector is 'random'", "task.selector=random")
    refused_keys("evaluation.metric is 'f1'.*macro_f1", "evaluation.metric=f1")
    source = "language.texts={ind: ind.txt}"
    refused_keys("each method would need", source, "task.source_language_adapter=true")


def test_a_dot_is_no_way_out_of_the_folder(sweep_data, tmp_path):
    sweep_data["sweep"]["methods"] = {"..": {}}
    units = sweep_units(load_recipe(sweep_data))
    assert units[2].name == "method-seed0"


def test_settings_are_scored_as_asked_for_and_nothing_else_is_reported(recipe_data, tmp_path):
    methods = {"A": {}, "R": {"selector": "random"}}
    recipe_data["sweep"] = {"densities": [0.05, 0.2], "methods": methods}
    recipe_data["task"]["seeds"] = [0]
    recipe_data["evaluation"].update(languages=["ban", "ind"], settings=["task+language"])
    del recipe_data["task"]["density"], recipe_data["language"]["density"]

    def swept(*overrides):
        result = run_sweep(load_recipe(recipe_data, overrides))
        assert not result.missing
        return {(r.setting, r.density, r.language) for r in result.results.rows}

    composed = {(f"{n} + language", d, "ban") for n in methods for d in (0.05, 0.2)}
    assert swept() == composed
    assert "| R + language | 5 % |" in (tmp_path / "out/results/comparison.md").read_text()
    alone = {(n, d, c) for n in methods for d in (0.05, 0.2) for c in ("ban", "ind")}
    assert swept("evaluation.settings=[task,task+language]") == composed | alone
    few = swept("evaluation.settings=[full,task]", "sweep.densities=[0.05]")
    full = {("full fine-tuning", None, code) for code in ("ban", "ind")}
    assert few == full | {place for place in alone if place[1] == 0.05}
    assert swept("evaluation.settings=[full]") == full


def test_other_data_is_not_mixed_in(sweep_data, tmp_path):
    small = ["task.seeds=[0]", "evaluation.languages=[]"]
    run_sweep(load_recipe(sweep_data, small), only=["phase1-*", "lt-sft-*"])
    with (tmp_path / "data/smsa.tsv").open("a") as file:
        file.write("w1 w2\tpositive\n")
    with pytest.raises(ResumeError, match="metadata.data.examples: was 30, now 31"):
        run_sweep(load_recipe(sweep_data, small), only=["random-*"])


def test_what_was_lost_is_named(sweep_data, tmp_path):
    small = load_recipe(sweep_data, ["task.seeds=[0]", "evaluation.languages=[]"])
    run_sweep(small, only=["phase1-*", "random-*"])
    adapter = next((tmp_path / "out/random").rglob("adapter.safetensors"))
    adapter.unlink()
    with pytest.raises(ResumeError, match=r"adapter.safetensors is gone(.|\n)*delete"):
        run_sweep(small, only=["random-*"])
    (tmp_path / "out/phase1-seed0/iteration-0/dense.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"dense.safetensors is gone(.|\n)*delete"):
        run_sweep(small, only=["phase1-*"])
    (tmp_path / "out/phase1-seed0/unit.json").write_text("")
    with pytest.raises(ResumeError, match="unit.json is no file of a finished unit"):
        run_sweep(small, only=["phase1-*"])


def test_a_key_added_to_a_finished_method_is_refused(sweep_data):
    small = ["task.seeds=[0]", "evaluation.languages=[]", "sweep.densities=[0.05]"]
    sweep_data["sweep"]["methods"] = {"R": {"selector": "low_rank"}}
    run_sweep(load_recipe(sweep_data, small))
    sweep_data["sweep"]["methods"]["R"]["selector_options"] = {"rank": 2}
    with pytest.raises(ResumeError, match="selector_options.rank: was '.absent.', now 2"):
        run_sweep(load_recipe(sweep_data, small))


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
