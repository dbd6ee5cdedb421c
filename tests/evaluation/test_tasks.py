"""Every task from files in the layout of its release, written here with text of our own."""

from __future__ import annotations

import pytest

from sparseft.errors import DataError, UnknownNameError
from sparseft.evaluation import Task, get_task, register_task, task_names

XNLI_COLUMNS = (
    "language gold_label sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2 promptID pairID genre label1 label2 label3 label4 label5 "
    "sentence1_tokenized sentence2_tokenized match"
).split()


def tsv(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def nusax(root):
    for folder in ("balinese", "toba_batak", "english"):
        for split in ("train", "valid", "test"):
            file = root / folder / f"{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f'id,text,label\n7,"{folder}, {split}",positive\n8,b,negative\n')


def smsa(root):
    for split in ("train", "valid", "test"):
        tsv(root / f"{split}_preprocess.tsv", (f'"{split}" .', "negative"), ("bagus", "positive"))
    tsv(root / "trainvalid_minus_nusax_test.tsv", ("bagus", "positive"))


def americasnli(root):
    head = ("id", "language", "premise", "hypothesis", "label")
    tsv(root / "dev" / "quy.tsv", head, ("1", "quy", 'p "q', "h", "neutral"))
    joint = (("1", "quy", "p", "h", "neutral"), ("2", "aym", "p2", "h2", "contradiction"))
    tsv(root / "test" / "anli.test.tsv", head, *joint)
    tsv(root / "test" / "gn.tsv", head, ("3", "gn", "p3", "h3", "entailment"))


def xnli(root):
    rows = [XNLI_COLUMNS]
    for i, (language, label) in enumerate((("sw", "neutral"), ("en", "contradiction"))):
        row = dict.fromkeys(XNLI_COLUMNS, "")
        row |= {"language": language, "gold_label": label, "pairID": str(i)}
        row |= {"sentence1": f'one "{language}', "sentence2": "two"}
        rows.append([row[c] for c in XNLI_COLUMNS])
    tsv(root / "XNLI-1.0" / "xnli.dev.tsv", *rows)
    tsv(root / "XNLI-1.0" / "xnli.test.tsv", *rows)
    tsv(
        root / "XNLI-MT-1.0" / "multinli" / "multinli.train.sw.tsv",
        ("premise", "hypo", "label"),
        ("a", "b", "contradictory"),
        ("c", "", "neutral"),
        ("d", "e", "entailment"),
    )


def paws_x(root):
    head = ("id", "sentence1", "sentence2", "label")
    for language, train in (("en", "train.tsv"), ("ko", "translated_train.tsv")):
        tsv(root / language / train, head, ("1", "a", "b", "1"))
        for name in ("dev_2k.tsv", "test_2k.tsv"):
            tsv(root / language / name, head, ("1", "a", "b", "1"), ("2", "NS", "b", "0"))


def test_registry_has_the_tasks_with_their_references():
    assert set(task_names()) >= {"americasnli", "nusax_senti", "paws_x", "smsa", "xnli"}
    for name in task_names():
        task = get_task(name)
        assert task.name == name
        assert task.reference.startswith("https://")
        assert len(set(task.labels)) == len(task.labels) >= 2
        assert len(task.text_fields) in (1, 2)
    with pytest.raises(UnknownNameError, match="Did you mean 'nusax_senti'"):
        get_task("nusax-senti")


@pytest.mark.parametrize("below", ["", "sentiment", "datasets/sentiment", "nusax/sentiment"])
def test_nusax_from_any_root(tmp_path, below):
    nusax(tmp_path / below)
    task = get_task("nusax_senti")
    assert task.languages(tmp_path) == ["ban", "bbc", "eng"]
    for spelling in ("bbc", "toba_batak", "Toba Batak"):
        found = task.load(tmp_path, spelling, "valid")
        assert [(e.text, task.labels[e.label], e.id) for e in found] == [
            ("toba_batak, valid", "positive", "7"),
            ("b", "negative", "8"),
        ]


def test_nusax_takes_further_languages_by_folder(tmp_path):
    nusax(tmp_path)
    (tmp_path / "balinese").rename(tmp_path / "javanese")
    (tmp_path / "toba_batak").rename(tmp_path / "betawi")
    task = get_task("nusax_senti")
    assert task.languages(tmp_path) == ["betawi", "eng", "jav"]
    assert task.load(tmp_path, "betawi")[0].text == "toba_batak, test"


def test_smsa_has_the_label_order_of_nusax(tmp_path):
    smsa(tmp_path / "smsa")
    task = get_task("smsa")
    assert task.labels == get_task("nusax_senti").labels
    found = task.load(tmp_path, "ind", "train")
    assert [(e.text, task.labels[e.label]) for e in found] == [
        ('"train" .', "negative"),
        ("bagus", "positive"),
    ]
    assert len(task.load(tmp_path, "Indonesian", "train_leak_free")) == 1


def test_americasnli_from_single_and_joint_files(tmp_path):
    americasnli(tmp_path / "anli_final")
    task = get_task("americasnli")
    assert task.languages(tmp_path, "valid") == ["quy"]
    assert task.languages(tmp_path, "test") == ["aym", "gn", "quy"]
    (found,) = task.load(tmp_path, "quy", "valid")
    assert (found.text, found.pair, found.label, found.id) == ('p "q', "h", 1, "1")
    assert task.load(tmp_path, "aym")[0].label == task.labels.index("contradiction")
    assert task.load(tmp_path, "gn")[0].label == task.labels.index("entailment")
    with pytest.raises(DataError, match="no split 'train'; it has valid, test"):
        task.load(tmp_path, "quy", "train")


def test_xnli_dev_test_and_machine_translated_training(tmp_path):
    xnli(tmp_path)
    task = get_task("xnli")
    assert task.languages(tmp_path, "test") == ["en", "sw"]
    (found,) = task.load(tmp_path, "eng", "valid")
    assert (found.text, found.pair, found.label, found.id) == ('one "en', "two", 2, "1")
    assert task.languages(tmp_path, "train") == ["sw"]
    train = task.load(tmp_path, "swahili", "train")
    assert [(e.text, e.label) for e in train] == [("a", 2), ("d", 0)], "empty translations go"


def test_paws_x_drops_placeholders(tmp_path):
    paws_x(tmp_path / "x-final")
    task = get_task("paws_x")
    assert task.languages(tmp_path) == ["en", "ko"]
    assert [len(task.load(tmp_path, "ko", s)) for s in ("train", "valid", "test")] == [1, 1, 1]
    (found,) = task.load(tmp_path, "English", "train")
    assert (found.text, found.pair, found.label) == ("a", "b", 1)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("nusax_senti", nusax),
        ("smsa", smsa),
        ("americasnli", americasnli),
        ("xnli", xnli),
        ("paws_x", paws_x),
    ],
)
def test_language_without_data_names_those_that_have_some(tmp_path, name, make):
    make(tmp_path)
    task = get_task(name)
    with pytest.raises(DataError) as caught:
        task.load(tmp_path, "fi", "test")
    for code in task.languages(tmp_path, "test"):
        assert code in str(caught.value)
    with pytest.raises(DataError, match="no folder .*nowhere"):
        task.load(tmp_path / "nowhere", "fi", "test")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="none for any language"):
        task.load(tmp_path / "bare", "fi", "test")


def test_label_outside_the_task_names_file_and_row(tmp_path):
    nusax(tmp_path)
    (tmp_path / "balinese" / "test.csv").write_text("id,text,label\n1,a,good\n")
    with pytest.raises(DataError, match=r"balinese/test\.csv, line 2: label 'good'.*'neutral'"):
        get_task("nusax_senti").load(tmp_path, "ban")


def test_through_datasets_offline(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    home = tmp_path / "mirror" / "sw"
    home.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (home / f"{split}.csv").write_text("premise,hypothesis,label\na,b,2\nc,d,0\n")
    (tmp_path / "mirror" / "README.md").write_text(
        "---\nconfigs:\n- config_name: sw\n  data_files:\n"
        + "".join(
            f"  - split: {s}\n    path: sw/{s}.csv\n" for s in ("train", "validation", "test")
        )
        + "---\n"
    )
    found = get_task("xnli").load(f"hf:{tmp_path / 'mirror'}", "Swahili", "valid")
    assert [(e.text, e.pair, e.label) for e in found] == [("a", "b", 2), ("c", "d", 0)]
    with pytest.raises(DataError, match="facebook/xnli.*cannot be loaded.*--data FOLDER"):
        get_task("xnli").load("hf:", "sw")


def test_a_new_task_is_one_class(monkeypatch):
    from sparseft.evaluation import task as module

    monkeypatch.setattr(module, "_TASKS", dict(module._TASKS))

    @register_task("mine", reference="https://example.org")
    class Mine(Task):
        labels = ("no", "yes")
        source_language = "eng"
        layout = "anything"

        def languages(self, root, split="test"):
            return ["eng"]

        def _read(self, root, language, split):
            return []

    assert "mine" in task_names()
    with pytest.raises(DataError, match="eng test in .* is empty"):
        get_task("mine").load(".", "en")
    with pytest.raises(UnknownNameError, match="registered already"):
        register_task("mine", reference="https://example.org")(type("Other", (Mine,), {}))
