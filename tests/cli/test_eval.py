"""``sparseft eval`` on a tiny encoder: settings, errors, files."""

from __future__ import annotations

import json

import pytest
import torch

from sparseft import Adapter, SparseDiff
from sparseft.cli.main import main

LANGUAGES = {"balinese": "ban", "minangkabau": "min", "indonesian": "ind"}


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny):
    root = tmp_path_factory.mktemp("nusax")
    for k, folder in enumerate(LANGUAGES):
        (root / folder).mkdir()
        labels = ("negative", "neutral", "positive")
        rows = [
            f"{i},{' '.join(tiny.WORDS[i + k : 2 * i + k + 1])},{labels[i % 3]}" for i in range(12)
        ]
        (root / folder / "test.csv").write_text("id,text,label\n" + "\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny):
    return tiny.save_tiny(tmp_path_factory.mktemp("base"), initializer_range=1.0)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base):
    """A task adapter with a head, and two language adapters."""
    from sparseft.evaluation import load_model

    home = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(3)
    model = load_model(base, num_labels=3)
    name = next(n for n, _ in model.named_parameters() if n.endswith("query.weight"))
    head = {n: torch.randn_like(p) for n, p in model.named_parameters() if n.startswith("classif")}
    shape = model.get_parameter(name).shape

    def diff(scale):
        mask = torch.rand(shape) < 0.3
        return SparseDiff.from_dense(torch.randn(shape) * scale, mask)

    Adapter({name: diff(1.0)}, name="task", dense=head).save(home / "task")
    for code in ("ban", "min"):
        Adapter({name: diff(3.0)}, name=code).save(home / code)
    return home


def scores(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {(r["setting"], r["language"], r["metric"]): r["value"] for r in rows}


def given(base, data, adapters, *more):
    pairs = [f"{name}={adapters / name}" for name in ("task", "ban", "min")]
    return [
        *("eval", "--base", str(base), "--task", "nusax_senti", "--data", str(data)),
        *("--languages", "ban", "min", "--adapter", *pairs, *more),
    ]


def test_settings_scores_and_files(base, data, adapters, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(given(base, data, adapters, "--out", str(out), "--predictions")) == 0
    printed = capsys.readouterr().out
    assert "task + language over task: " in printed
    assert "macro_f1 x 100" in printed
    found = scores(out)
    assert {s for s, _, _ in found} == {"task", "task + language"}
    assert {c for _, c, _ in found} == {"ban", "min"}
    assert (out / "results.png").stat().st_size > 1000
    lines = (out / "predictions-task-language-ban.jsonl").read_text().splitlines()
    right = [json.loads(line) for line in lines]
    share = sum(r["label"] == r["prediction"] for r in right) / len(right)
    assert share == pytest.approx(found["task + language", "ban", "accuracy"])

    again = tmp_path / "again"
    assert main(given(base, data, adapters, "--out", str(again))) == 0
    assert (out / "results.json").read_bytes() == (again / "results.json").read_bytes()


def test_same_scores_as_composing_by_hand(base, data, adapters, tmp_path):
    from sparseft import Composer
    from sparseft.evaluation import evaluate_classifier, load_model, load_tokenizer

    assert main(given(base, data, adapters, "--coeff", "ban=0.5", "--out", str(tmp_path))) == 0
    model = load_model(base, num_labels=3)
    paths = {name: adapters / name for name in ("task", "ban")}
    Composer(model, paths).apply({"task": 1.0, "ban": 0.5})
    mine = evaluate_classifier(model, load_tokenizer(base), "nusax_senti", "ban", root=data)
    assert scores(tmp_path)["task + language", "ban", "macro_f1"] == mine["macro_f1"]


def test_fine_tuned_base_in_every_language_it_has_data_for(tiny, data, tmp_path, capsys):
    base = tiny.save_tiny(tmp_path / "whole", num_labels=3)
    words = ("eval", "--base", str(base), "--task", "nusax_senti", "--data", str(data))
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert {c for _, c, _ in scores(tmp_path / "out")} == {"ban", "min", "ind"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["source_language"] == "ind"


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        ({"--task": "nusax"}, ["unknown task 'nusax'", "nusax_senti"]),
        ({"--base": "/nowhere/base"}, ["no folder /nowhere/base"]),
        ({"--data": "/nowhere/data"}, ["no folder /nowhere/data"]),
        ({"--languages": "sun"}, ["no test data for language 'sun'", "ban (Balinese)"]),
        ({"--languages": "bann"}, ["'bann'", "'ban'"]),
        ({"--split": "dev"}, ["no split 'dev'"]),
        ({"--adapter": "task"}, ["NAME=VALUE"]),
        ({"--adapter": "task=/nowhere"}, ["/nowhere"]),
        ({"--coeff": "tsk=1"}, ["'tsk'", "Did you mean 'task'"]),
        ({"--coeff": "task=x"}, ["task=x: not a number"]),
        ({"--device": "cpuu"}, ["--device is 'cpuu', wanted auto, cpu, cuda or cuda:N"]),
        ({"--device": "cuda:99"}, ["--device is 'cuda:99', but torch sees"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(base, data, adapters, capsys, change, needles):
    options = {
        "--base": str(base),
        "--task": "nusax_senti",
        "--data": str(data),
        "--languages": "ban",
        "--adapter": f"task={adapters / 'task'}",
        "--setting": "task",
    }
    words = [word for option in {**options, **change}.items() for word in option]
    assert main(["eval", *words]) == 2
    err = capsys.readouterr().err
    for needle in needles:
        assert needle in err
    assert "Traceback" not in err


def test_a_head_that_nobody_trained_is_refused(base, data, adapters, capsys):
    words = ("eval", "--base", str(base), "--task", "nusax_senti", "--data", str(data))
    assert main([*words]) == 2
    err = capsys.readouterr().err
    assert "classifier.dense.weight" in err
    assert "would be random" in err
    assert main([*words, "--adapter", f"ban={adapters / 'ban'}", "--setting", "task+language"]) == 2
    assert "an adapter for ind, min" in capsys.readouterr().err


def test_what_is_missing_without_a_recipe(capsys):
    assert main(["eval", "--task", "xnli"]) == 2
    assert "--base is missing. Give a RECIPE" in capsys.readouterr().err
    assert main(["eval", "no-such-recipe"]) == 2
    assert "no-such-recipe" in capsys.readouterr().err
