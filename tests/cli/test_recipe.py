"""``sparseft train`` and ``sparseft eval`` with a recipe, on a tiny encoder."""

from __future__ import annotations

import json

import pytest
import yaml

from sparseft.cli.main import main


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny):
    home = tmp_path_factory.mktemp("study")
    tiny.save_tiny(home / "base")
    labels = ("negative", "neutral", "positive")
    for folder in ("indonesian", "balinese"):
        (home / "nusax" / folder).mkdir(parents=True)
        for split in ("train", "valid", "test"):
            rows = [f"{i},{tiny.WORDS[i]} {tiny.WORDS[2 * i]},{labels[i % 3]}" for i in range(18)]
            text = "id,text,label\n" + "\n".join(rows) + "\n"
            (home / "nusax" / folder / f"{split}.csv").write_text(text)
    (home / "ban.txt").write_text("\n".join(" ".join(tiny.WORDS[i : i + 7]) for i in range(40)))
    common = {"steps": 3, "batch_size": 4, "max_length": 12, "density": 0.2, "save_every": 0}
    content = {
        "name": "tiny",
        "data_dir": str(home),
        "output_dir": str(home / "run"),
        "model": {"base": "base", "device": "cpu"},
        "task": {"name": "nusax_senti", "source": "ind", "seeds": [0, 1], **common},
        "language": {"texts": {"ban": "ban.txt"}, **common},
        "evaluation": {"data": "nusax", "languages": ["ind", "ban"], "max_length": 12},
    }
    (home / "tiny.yaml").write_text(yaml.safe_dump(content))
    return home / "tiny.yaml"


def test_train_then_eval(recipe, capsys):
    home = recipe.parent / "run"
    assert main(["eval", str(recipe)]) == 2, "nothing has been trained"
    assert "task-seed0" in capsys.readouterr().err

    assert main(["train", str(recipe)]) == 0
    trained = capsys.readouterr().out
    files = [home / "results" / f"results.{ending}" for ending in ("json", "md", "png")]
    before = [path.read_bytes() for path in files]
    rows = json.loads(before[0])["rows"]
    assert {r["setting"] for r in rows} == {"full fine-tuning", "task", "task + language"}
    assert {r["seed"] for r in rows} == {0, 1}
    assert "task + language" in trained

    assert main(["eval", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "task + language over task" in printed
    assert all(f"wrote {path}" in printed for path in files)
    assert [path.read_bytes() for path in files] == before

    assert main(["eval", str(recipe), "evaluation.split=valid", "evaluation.batch_size=3"]) == 0
    assert json.loads(files[0].read_text())["rows"][0]["split"] == "valid"


def test_bad_recipes_are_named(recipe, capsys):
    assert main(["eval", str(recipe), "evaluation.splt=valid"]) == 2
    assert "Did you mean 'split'" in capsys.readouterr().err
    assert main(["eval", str(recipe), "evaluation.languages=[]"]) == 2
    assert "has nothing to score" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("train",), ("eval",), ("train", "--list")], ids=" ".join)
@pytest.mark.parametrize("name", ["nusax_senti", None], ids=["shipped", "own"])
def test_a_data_dir_that_is_not_there_is_named_and_no_name_is_looked_up(
    recipe, tmp_path, capsys, monkeypatch, words, name
):
    """Without its folder the base would be taken for a name on the hub."""

    def looked_up(*args, **kwargs):
        raise AssertionError("the base was looked up")

    for loader in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(f"sparseft.training.setups.{loader}", looked_up)
    out = f"output_dir={tmp_path / 'out'}"
    command, *options = words
    assert main([command, name or str(recipe), "data_dir=/nope", out, *options]) == 2
    err = capsys.readouterr().err
    assert "data_dir '/nope' does not exist (recipe key data_dir)" in err
    assert "multilingual" not in err

    monkeypatch.chdir(tmp_path)
    assert main([command, name or str(recipe), "data_dir=nope", out, *options]) == 2
    assert f"data_dir 'nope' does not exist, seen from {tmp_path}" in capsys.readouterr().err


def test_a_finished_study_needs_no_data(recipe, capsys):
    assert main(["train", str(recipe)]) == 0
    capsys.readouterr()
    assert main(["train", str(recipe), "data_dir=/nope", "--list"]) == 0
    assert "to do" not in capsys.readouterr().out


def test_other_settings_on_a_begun_run_are_bad_input(recipe, tmp_path, capsys, monkeypatch):
    """And the way out is one that the command line has."""
    from sparseft.training.loop import LoopTrainer

    def interrupt(self, batches):
        raise KeyboardInterrupt

    words = ["train", str(recipe), f"output_dir={tmp_path}", "--only", "language-ban"]
    with monkeypatch.context() as patch:
        patch.setattr(LoopTrainer, "_accumulated_loss", interrupt)
        assert main(words) == 130
    capsys.readouterr()
    for change in ("language.steps=4", "language.seed=9"):
        assert main([*words, change]) == 2
        err = capsys.readouterr().err
        assert str(tmp_path / "language-ban") in err
        assert f"{change.partition('.')[2].partition('=')[0]}: was " in err
        assert "use another output_dir, or delete that folder to start over" in err
        assert "resume=False" not in err
