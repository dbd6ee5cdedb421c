"""The folder a merge writes: what it may replace, and what is left of a run that was killed."""

from __future__ import annotations

import pytest
import torch

from sparseft import Adapter, SparseDiff
from sparseft.composition import checkpoint as checkpoint_module
from sparseft.composition import merge_into_checkpoint
from sparseft.errors import CompositionError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

OUTPUT = "bert.encoder.layer.0.output.dense.weight"
CHANGE = Adapter({OUTPUT: SparseDiff.from_dense(torch.ones(8, 12))}, name="sw")


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def meanwhile(monkeypatch):
    """Do something between the first look at the target and the end of the merge."""

    def install(action):
        def write_recipe(*given):
            action()
            return written(*given)

        written = checkpoint_module.write_recipe
        monkeypatch.setattr(checkpoint_module, "write_recipe", write_recipe)

    return install


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_folder_that_appears_meanwhile_is_kept(base, meanwhile, live, full):
    out = base.parent / "out"

    def appear():
        out.mkdir()
        if full:
            (out / "thesis.tex").write_text("years of work")

    meanwhile(appear)
    model = transformers.AutoModelForMaskedLM.from_pretrained(base) if live else base
    with pytest.raises(FileExistsError, match="has appeared while .*complete and lies in"):
        merge_into_checkpoint(model, [CHANGE], None, out)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"] * full
    [spare] = base.parent.glob("out.*")
    assert (spare / "model.safetensors").is_file()
    assert (spare / "sparseft_composition.json").is_file()
    assert not hidden(base.parent)


def test_a_file_that_appears_meanwhile_is_kept(base, meanwhile):
    out = base.parent / "out"
    meanwhile(lambda: out.write_text("mine"))
    for overwrite in (False, True):
        out.unlink(missing_ok=True)
        with pytest.raises(FileExistsError, match="has appeared while"):
            merge_into_checkpoint(base, [CHANGE], None, out, overwrite=overwrite)
        assert out.read_text() == "mine"
    assert len(list(base.parent.glob("out.*"))) == 2
    assert not hidden(base.parent)


def test_overwrite_does_not_take_what_appears_either(base, meanwhile):
    out = base.parent / "out"

    def appear():
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")

    meanwhile(appear)
    with pytest.raises(FileExistsError, match=r"thesis.tex \(1 in all\) would be lost"):
        merge_into_checkpoint(base, [CHANGE], None, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    assert len(list(base.parent.glob("out.*"))) == 1


@pytest.mark.parametrize("extra", [(), ("config.json",), ("model.safetensors",)], ids=str)
def test_overwrite_replaces_models_only(base, extra):
    out = base.parent / "out"
    out.mkdir()
    names = sorted(["a.py", "b.py", "c.py", *extra])
    for name in names:
        (out / name).write_text(name)
    lost = rf"no model's folder .*: {', '.join(names[:3])}.*\({len(names)} in all\) would be lost"
    with pytest.raises(CompositionError, match=lost):
        merge_into_checkpoint(base, [CHANGE], None, out, overwrite=True)
    assert {p.name: p.read_text() for p in out.iterdir()} == {n: n for n in names}
    assert not hidden(base.parent)


def test_overwrite_replaces_an_empty_folder_a_merge_and_a_model(base):
    out = base.parent / "out"
    out.mkdir()
    merge_into_checkpoint(base, [CHANGE], None, out, overwrite=True)
    (out / "config.json").unlink()  # known by its recipe
    merge_into_checkpoint(base, [CHANGE], None, out, overwrite=True)
    (out / "sparseft_composition.json").unlink()  # known by its weights
    (out / "eval.txt").write_text("old")
    merge_into_checkpoint(base, [CHANGE], None, out, overwrite=True)
    assert not (out / "eval.txt").exists()
    assert sorted(p.name for p in base.parent.iterdir()) == ["base", "out"]


def test_nothing_is_written_into_the_base(base):
    before = sorted(base.rglob("*"))
    link = base.parent / "link"
    link.symlink_to(base)
    for out in (base / "merged", base / "a" / "b", link / "merged"):
        with pytest.raises(CompositionError, match="lies in the base's own folder"):
            merge_into_checkpoint(base, [CHANGE], None, out)
    assert sorted(base.rglob("*")) == before


def test_leftovers_of_the_same_target_are_named(base, caplog):
    work, tag = base.parent, "0123456789ab"
    for name in (f".out.{tag}.tmp", f".out.{tag}.old", f".out2.{tag}.tmp", ".out.mine.tmp"):
        (work / name).mkdir()
    merge_into_checkpoint(base, [CHANGE], None, work / "out")
    said = [r.getMessage() for r in caplog.records if "delete it" in r.getMessage()]
    assert [s.split()[0] for s in said] == [
        str(work / f".out.{tag}.old"),
        str(work / f".out.{tag}.tmp"),
    ]
    assert "was before" in said[0]
    assert "unfinished" in said[1]
    assert len(hidden(work)) == 4, "named, not touched"


def test_a_name_as_long_as_the_system_allows(base):
    out = base.parent / ("n" * 250)
    merge_into_checkpoint(base, [CHANGE], None, out)
    assert (out / "model.safetensors").is_file()
