"""Recipes: reading, overriding, errors that name key, allowed values and the nearest."""

from __future__ import annotations

import pytest
import yaml

from sparseft.errors import RecipeError
from sparseft.training.recipe import Recipe, load_recipe, packaged_recipes

MINIMAL = {
    "name": "mine",
    "model": {"base": "some-model"},
    "task": {"name": "nusax_senti", "source": "ind"},
    "evaluation": {"data": "nusax", "languages": ["ind"]},
}


def read(*overrides: str, **changes) -> Recipe:
    return load_recipe({**MINIMAL, **changes}, overrides)


def test_a_minimal_recipe_has_defaults():
    recipe = read()
    assert recipe.output_dir == "runs/mine"
    assert recipe.task.steps == (500, 500)
    assert recipe.task.density == 0.1
    assert recipe.task.nnz is None
    assert recipe.task.seeds == [0, 1, 2]


def test_a_file_and_overrides_in_order(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    recipe = load_recipe(
        path,
        ["task.lr=1e-4", "task.steps=[3, 5]", "task.lr=2e-4", "task.seeds=7", "model.base=/x/y"],
    )
    assert recipe.task.lr == (2e-4, 2e-4)  # YAML 1.1 alone would have read text
    assert recipe.task.steps == (3, 5)
    assert recipe.task.seeds == [7]
    assert recipe.model.base == "/x/y"


def test_an_override_makes_a_missing_section():
    recipe = read("language.texts.ban=ban.txt", "language.mask_rate=0.3")
    assert recipe.language.texts == {"ban": ["ban.txt"]}
    assert recipe.language.mask_rate == 0.3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["task.lrr=1"],
            r"unknown key 'task\.lrr'.*Did you mean 'lr'.*Known keys here: .*weight_decay",
        ),
        (["tsk.lr=1"], r"unknown key 'tsk'.*Did you mean 'task'"),
        (["task.lr=fast"], r"task\.lr must be a number, got 'fast'"),
        (["task.lr=0"], r"task\.lr must be above 0 in each phase, got \(0\.0, 0\.0\)"),
        (["task.lr=.inf"], r"task\.lr must be a number"),
        (["task.batch_size=2.5"], r"task\.batch_size must be a whole number, got 2\.5"),
        (["task.batch_size=true"], r"task\.batch_size must be a whole number, got True"),
        (["task.steps=[1, 2, 3]"], r"task\.steps must be one value or \[dense, sparse\]"),
        (
            ["task.schedule=lineer"],
            r"'lineer', allowed: linear, constant, cosine.*Did you mean 'linear'",
        ),
        (["task.density=1.5"], r"task\.density must be in \(0, 1\], got 1\.5"),
        (["task.density=0.1", "task.nnz=5"], r"both density and nnz"),
        (
            ["evaluation.settings=[task+languages]"],
            r"allowed: full, task, task\+language.*Did you mean",
        ),
        (["evaluation.data=null"], r"evaluation\.data is not"),
        (
            ["evaluation.languages=[no]"],
            r"evaluation\.languages must be text, got False .*quote it",
        ),
        (["model=x"], r"model must be a section of keys, got 'x'"),
        (["model.base.x=1"], r"model\.base is a value, not a section"),
        (["model.device=gpu"], r"model\.device must be auto, cpu, cuda"),
        (["model.device=cuda:x"], r"model\.device must be .*cuda:N, got 'cuda:x'"),
        (["task.seeds=[1, 1]"], r"task\.seeds must be without repetitions"),
        (["task.source_language_adapter=true"], r"needs language\.texts\.ind"),
        (["language.texts.ban=[]"], r"language\.texts\.ban lists no file"),
        (["task"], r"override 'task' is not key=value"),
        (["task.lr=[1"], r"not YAML"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(overrides, message):
    with pytest.raises(RecipeError, match=message):
        read(*overrides)


def test_missing_keys_files_and_empty_recipes_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"missing key 'task\.source'"):
        load_recipe({**MINIMAL, "task": {"name": "x"}})
    with pytest.raises(RecipeError, match="trains nothing"):
        load_recipe({"name": "a", "model": {"base": "b"}})
    with pytest.raises(RecipeError, match="ships with sparseft .*Did you mean 'nusax_senti'"):
        load_recipe("nusax_sent")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(RecipeError, match="not a YAML file"):
        load_recipe(bad)
    for empty in ("", "# nothing yet\n"):
        bad.write_text(empty)
        with pytest.raises(RecipeError, match=r"bad\.yaml is empty.*nusax_senti"):
            load_recipe(bad)
    bad.write_text("- 1\n- 2")
    with pytest.raises(RecipeError, match="holds list"):
        load_recipe(bad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nmodel: {base: b}\nname: c\n", r"gives 'name' twice, in lines 1 and 3"),
        ("task:\n  lr: 1\n  nnz: 5\n  lr: 2\n", r"gives 'task\.lr' twice, in lines 2 and 4"),
        ("language: {texts: {ban: a, ban: b}}", r"gives 'language\.texts\.ban' twice"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path, text, message):
    """YAML alone would keep the last without a word."""
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_anchors_are_no_repetition(tmp_path):
    path = tmp_path / "r.yaml"
    common = "{steps: &n 3, batch_size: 4}"
    path.write_text(
        f"name: a\nmodel: {{base: b}}\nlanguage:\n  <<: &common {common}\n  texts: {{ban: x}}\n"
        "task:\n  <<: *common\n  name: nusax_senti\n  source: ind\n"
    )
    recipe = load_recipe(path)
    assert recipe.task.steps == recipe.language.steps == (3, 3)


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_every_recipe_that_ships_is_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe({**recipe.as_dict()}) == recipe


def test_at_least_one_recipe_ships():
    assert "nusax_senti" in packaged_recipes()


def test_relative_paths_start_at_data_dir(tmp_path):
    recipe = read(f"data_dir={tmp_path}")
    assert recipe.path("a/b.txt") == tmp_path / "a" / "b.txt"
    assert str(recipe.path("/abs")) == "/abs"
