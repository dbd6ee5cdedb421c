"""A whole study on a tiny base: units, resuming, sharing, report, and what bad input says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from sparseft import Adapter
from sparseft.cli.main import main
from sparseft.errors import DataError, RecipeError, ResumeError
from sparseft.training.recipe import load_recipe
from sparseft.training.study import run_study, study_units


@pytest.fixture(autouse=True)
def quiet() -> None:
    """The loading report of transformers fills the captured output of a failure."""
    import transformers

    transformers.logging.set_verbosity_error()


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def test_a_study_runs_end_to_end_and_a_second_call_does_nothing_again(recipe_data, tmp_path):
    recipe = load_recipe(recipe_data)
    units = []
    result = run_study(recipe, on_unit=lambda unit, i, n: units.append(unit.name))
    names = ["language-ban", "task-seed0", "task-seed1", "evaluate-seed0", "evaluate-seed1"]
    assert units == names == result.finished
    assert not result.missing
    rows = {(r.setting, r.language, r.seed) for r in result.results.rows}
    assert rows == {
        (setting, language, seed)
        for seed in (0, 1)
        for setting, languages in (
            ("full fine-tuning", ("ind", "ban", "sun")),
            ("task", ("ind", "ban", "sun")),
            ("task + language", ("ban",)),
        )
        for language in languages
    }
    assert result.results.metrics[0] == "macro_f1"
    assert {p.name for p in result.files} == {"results.json", "results.md", "results.png"}
    content = json.loads((tmp_path / "out" / "results" / "results.json").read_text())
    assert str(tmp_path) not in json.dumps(content)
    assert content["provenance"]["recipe"]["task"]["lr"] == [1e-3, 1e-3]

    language = Adapter.load(tmp_path / "out" / "language-ban" / "adapter")
    assert not language.dense
    assert all(name.startswith("bert.") for name in language)
    task = Adapter.load(tmp_path / "out" / "task-seed0" / "adapter")
    new = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"}
    assert set(task.dense) == new | {"bert.pooler.dense.bias"}  # what a masked LM has not
    assert task.metadata.density == pytest.approx(0.1, abs=1e-3)

    adapters = {k: v for k, v in files(tmp_path / "out").items() if "results" not in k}
    units.clear()
    again = run_study(recipe, on_unit=lambda unit, i, n: units.append(unit.name))
    assert units == []
    assert again.results.rows == result.results.rows
    assert adapters == {k: v for k, v in files(tmp_path / "out").items() if "results" not in k}


def test_parts_of_a_study_run_apart_and_say_what_they_lack(recipe_data):
    recipe = load_recipe(recipe_data)
    with pytest.raises(RecipeError, match=r"evaluate-seed0 reads .*task-seed0, language-ban"):
        run_study(recipe, only=["evaluate-seed0"])
    with pytest.raises(
        RecipeError, match=r"no unit matches 'task-sed0'.*Did you mean 'task-seed0'"
    ):
        run_study(recipe, only=["task-sed0"])
    part = run_study(recipe, only=["task-seed0", "language-*"])
    assert part.finished == ["language-ban", "task-seed0"]
    assert part.results is None
    assert not part.files
    scored = run_study(recipe, only=["evaluate-seed0"])
    assert {r.seed for r in scored.results.rows} == {0}
    assert scored.missing == ["task-seed1", "evaluate-seed1"]


def test_the_source_language_adapter_lies_beneath_the_task(recipe_data, tmp_path):
    recipe_data["language"]["texts"] = {"ind": "ind.txt", "ban": "ban.txt"}
    recipe_data["task"].update(source_language_adapter=True, seeds=[0])
    result = run_study(load_recipe(recipe_data))
    source = Adapter.load(tmp_path / "out" / "language-ind" / "adapter")
    task = Adapter.load(tmp_path / "out" / "task-seed0" / "adapter")
    assert task.metadata.parents == (source.digest,)
    assert not result.missing


def test_other_data_under_the_same_name_is_refused(recipe_data, tmp_path):
    run_study(load_recipe(recipe_data), only=["task-seed0"])
    (tmp_path / "out" / "task-seed0" / "adapter" / "adapter.safetensors").unlink()
    with (tmp_path / "data" / "smsa.tsv").open("a") as file:
        file.write("w1 w2\tpositive\n")
    with pytest.raises(ResumeError, match=r"data\.digest: was (.|\n)*data\.examples: was 30"):
        run_study(load_recipe(recipe_data), only=["task-seed0"])


def test_a_finished_unit_of_another_recipe_is_not_passed_off(recipe_data):
    """A changed rate is refused; the folder of log lines, seeds and other languages is not."""
    recipe_data["task"]["seeds"] = [0]
    run_study(load_recipe(recipe_data), only=["language-*"])
    again = load_recipe(recipe_data, ["language.log_every=2", "task.lr=0.5"])
    assert run_study(again, only=["language-*"]).finished == ["language-ban"]
    with pytest.raises(ResumeError, match="language.lr: was"):
        run_study(load_recipe(recipe_data, ["language.lr=0.5"]), only=["language-*"])


def test_scores_are_made_anew_when_the_adapters_or_settings_change(recipe_data, tmp_path):
    run_study(load_recipe(recipe_data))
    recipe = load_recipe(recipe_data, ["evaluation.language_coeff=0.5"])
    todo = [u.name for u in study_units(recipe) if not u.done()]
    assert todo == ["evaluate-seed0", "evaluate-seed1"]
    recipe = load_recipe(recipe_data, ["evaluation.settings=[task]"])
    assert [u.name for u in study_units(recipe) if not u.done()] == []


def test_bad_input_is_named(recipe_data, tmp_path, monkeypatch):
    # Read at import by the hub client, so an environment variable would come too late here.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'no-such/model' cannot be loaded(.|\n)*give the path"):
        run_study(load_recipe(recipe_data, ["model.base=no-such/model"]), only=["task-seed0"])
    (tmp_path / "data" / "smsa.tsv").write_text("w1 w2\thappy\n")
    with pytest.raises(DataError, match=r"smsa\.tsv, line 1: label 'happy' is not one of"):
        run_study(load_recipe(recipe_data), only=["task-seed0"])
    (tmp_path / "data" / "smsa.tsv").write_text("")
    with pytest.raises(DataError, match=r"smsa\.tsv"):
        run_study(load_recipe(recipe_data), only=["task-seed0"])
    (tmp_path / "data" / "ban.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"ban\.txt: the file is blank"):
        run_study(load_recipe(recipe_data), only=["language-ban"])
    recipe_data["evaluation"]["languages"] = ["jav"]
    recipe_data["language"]["texts"] = {}
    (tmp_path / "data" / "smsa.tsv").write_text("w1 w2\tpositive\nw3\tneutral\n")
    with pytest.raises(DataError, match=r"no test data for language 'jav'"):
        run_study(load_recipe(recipe_data), only=["task-seed0", "evaluate-seed0"])


@pytest.mark.parametrize(
    ("unit", "key", "value"),
    [
        ("task-seed0", "task.exclude", "['*LayrNorm*']"),
        ("task-seed0", "task.full_params", "['clasifier.weight']"),
        ("language-ban", "language.exclude", "['lm_heads.*']"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_by_its_key(recipe_data, unit, key, value):
    recipe = load_recipe(recipe_data, [f"{key}={value}"])
    with pytest.raises(RecipeError, match=rf"^{key}: pattern '.*' matches none of \d+ names"):
        run_study(recipe, only=[unit])


def test_the_command_lists_runs_and_reports(recipe_data, tmp_path, capsys, monkeypatch):
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_data))
    assert main(["train", str(path), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "to do   language-ban"
    assert main(["train", str(path), "task.lrr=1"]) == 2
    assert "Did you mean 'lr'" in capsys.readouterr().err
    assert main(["train", str(path), "density=0.05", "seeds=[0]"]) == 0
    out, err = capsys.readouterr()
    assert "[1/3] language-ban" in err
    assert "step 3 of 3: loss" in err
    assert "task + language" in out
    assert str(Path("results") / "results.md") in out
    task = Adapter.load(tmp_path / "out" / "task-seed0" / "adapter")
    assert task.metadata.density == pytest.approx(0.05, abs=1e-3)


def test_an_interrupted_command_says_how_to_go_on(recipe_data, tmp_path, capsys, monkeypatch):
    import yaml

    from sparseft.training import loop

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_data))
    steps = iter(range(100))

    def interrupt(self, batches):
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C
        return original(self, batches)

    original = loop.LoopTrainer._accumulated_loss
    monkeypatch.setattr(loop.LoopTrainer, "_accumulated_loss", interrupt)
    # A shell that starts the tests in the background has the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["train", str(path), "--only", "task-seed0"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"sparseft train {path} --only task-seed0" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["train", str(path), "--only", "task-seed0"]) == 0
    whole = dict(recipe_data, output_dir=str(tmp_path / "whole"))
    run_study(load_recipe(whole), only=["task-seed0"])
    a, b = (
        tmp_path / f / "task-seed0" / "adapter" / "adapter.safetensors" for f in ("out", "whole")
    )
    assert a.read_bytes() == b.read_bytes()


def test_selectors_and_denoising_come_from_the_recipe(recipe_data, tmp_path):
    """Without a dense phase there is no full fine-tuning to score; denoised masks have one."""
    recipe_data["task"].update(seeds=[0], selector="low_rank", selector_options={"rank": 2})
    recipe_data["language"].update(denoise={"rank": 2, "residual": 0.1})
    recipe_data["evaluation"]["languages"] = ["ban"]
    result = run_study(load_recipe(recipe_data))
    assert {r.setting for r in result.results.rows} == {"task", "task + language"}
    task = Adapter.load(tmp_path / "out/task-seed0/adapter")
    assert task.metadata.method == "lottery_ticket/low_rank"
    assert not (tmp_path / "out/task-seed0/iteration-0/dense.safetensors").exists()
    language = Adapter.load(tmp_path / "out/language-ban/adapter")
    assert language.metadata.method == "lottery_ticket/deltas_svd"
    assert language.metadata.extra["selector_options"]["rank"] == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"denoise": {"rnk": 2}}, r"task.denoise has the key 'rnk'.*'rank'"),
        ({"denoise": {"rank": 2, "energy": 0.5}}, "task.denoise"),
        (
            {"denoise": {"rank": 2}, "selector": "random"},
            "is for selector 'deltas_svd'.*got 'random'",
        ),
        ({"selector": "lowrank"}, "task.selector is 'lowrank'.*'low_rank'"),
        ({"selector": "low_rank", "selector_options": {"rnk": 2}}, "'rnk'.*Did you mean 'rank'"),
        ({"selector": "rows", "selector_options": {"score": "fishr"}}, "'fishr'.*'fisher'"),
    ],
)
def test_a_wrong_way_to_choose_is_named_when_the_recipe_is_read(recipe_data, values, message):
    recipe_data["task"].update(values)
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_data)
