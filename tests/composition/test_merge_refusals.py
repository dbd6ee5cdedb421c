"""What a merge refuses: before anything is written, or with what was there left as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseft import Adapter, SparseDiff
from sparseft.adapter import AdapterMetadata
from sparseft.composition import checkpoint_stream as stream_module
from sparseft.composition import merge_into_checkpoint
from sparseft.errors import BaseMismatchError, CompositionError, UnknownNameError
from sparseft.modules import fingerprint_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

OUTPUT = "bert.encoder.layer.0.output.dense.weight"
EMBED = "bert.embeddings.word_embeddings.weight"


def make(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).to(dtype)


def change(model, seed, *, names=(EMBED, OUTPUT), mode="add"):
    """An adapter of a third of the entries of some parameters."""
    generator = torch.Generator().manual_seed(100 + seed)
    diffs = {}
    for name in names:
        weight = model.get_parameter(name)
        values = torch.randn(weight.shape, generator=generator)
        mask = torch.rand(weight.shape, generator=generator) < 0.3
        diffs[name] = SparseDiff.from_dense(values, mask, mode)
    metadata = AdapterMetadata(base_name="tiny", fingerprint=fingerprint_model(model, names))
    return Adapter(diffs, name=f"a{seed}", metadata=metadata)


@pytest.fixture
def base(tmp_path):
    make().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def refused(base, adapters, match, error=CompositionError, coeffs=None, **options):
    out = base.parent / "out"
    with pytest.raises(error, match=match):
        merge_into_checkpoint(base, adapters, coeffs, out, **options)
    assert not out.exists()
    assert not [p for p in base.parent.iterdir() if p.name.startswith(".")]


def test_another_base_before_anything_is_written(base, monkeypatch):
    other = make(seed=7)
    monkeypatch.setattr(stream_module, "write_safetensors", lambda *a: pytest.fail("written"))
    refused(base, [change(other, 0)], r"made on another base \(tiny\)", BaseMismatchError)


def test_set_entries_that_contradict(base):
    model = make()
    both = [change(model, 0, mode="set"), change(model, 1, mode="set")]
    refused(base, both, "both replace entry")
    refused(base, both[:1], "has no meaning", coeffs=0.5)


def test_a_sum_that_overflows(tmp_path):
    make(dtype=torch.float16).save_pretrained(tmp_path / "base")
    model = make(dtype=torch.float16)
    refused(tmp_path / "base", [change(model, 0)], "overflows", coeffs=1e6)


def test_a_replacement_that_overflows(tmp_path):
    make(dtype=torch.float16).save_pretrained(tmp_path / "base")
    huge = Adapter({OUTPUT: SparseDiff.from_dense(torch.full((8, 12), 1e6), mode="set")})
    refused(tmp_path / "base", [huge], "overflows torch.float16")


def test_unknown_method_and_option(base):
    refused(base, [change(make(), 0)], "no composition method", UnknownNameError, method="t")
    refused(base, [change(make(), 0)], "no option 'x'", UnknownNameError, x=1)


def test_config_of_another_size(base):
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "intermediate_size": 13}))
    adapter = change(make(), 0, names=(EMBED,))
    refused(base, [adapter], "do not belong together", BaseMismatchError)


def test_quantised_base(base):
    content = json.loads((base / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(content))
    refused(base, [change(make(), 0)], "is quantised")


def test_integers_under_a_diff(base):
    state = load_file(base / "model.safetensors")
    state[OUTPUT] = torch.ones(8, 12, dtype=torch.int8)
    save_file(state, base / "model.safetensors", {"format": "pt"})
    adapter = change(make(), 0, names=(OUTPUT,))
    refused(base, [adapter], "is I8", check_base=False)


def test_no_config_and_no_weights(base):
    (base / "model.safetensors").unlink()
    refused(base, [change(make(), 0)], "no weights in")
    (base / "config.json").unlink()
    refused(base, [change(make(), 0)], "no config.json")


def test_a_full_disk(base, monkeypatch):
    monkeypatch.setattr(
        stream_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1)
    )
    refused(base, [change(make(), 0)], "1 B free")


def test_a_failure_in_the_middle_leaves_the_old_folder(base, monkeypatch):
    out = merge_into_checkpoint(base, [change(make(), 0)], None, base.parent / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def torn(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream_module, "compose_into_", torn)
    with pytest.raises(OSError, match="No space left"):
        merge_into_checkpoint(base, [change(make(), 1)], None, out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in base.parent.iterdir()) == ["base", "out"]


def test_nothing_that_is_read_is_replaced(base, monkeypatch):
    adapter = change(make(), 0)
    inside = base.parent / "sw"
    adapter.save(inside)
    monkeypatch.chdir(base)
    for out, adapters, what in (
        (base, [adapter], "base, which is read,"),
        (base.parent, [adapter], "base, which is read,"),
        (inside, {"sw": inside}, "sw, which is read,"),
    ):
        with pytest.raises(CompositionError, match=f"replaced as a whole, but .*{what}"):
            merge_into_checkpoint(base, adapters, None, out, overwrite=True)
    with pytest.raises(CompositionError, match="the working folder lies in it"):
        merge_into_checkpoint(make(), [adapter], None, base.parent, overwrite=True)
    with pytest.raises(CompositionError, match="config.json is a file"):
        merge_into_checkpoint(make(), [adapter], None, base / "config.json", overwrite=True)
    assert (base / "model.safetensors").is_file()


def test_a_linked_folder_is_replaced_where_it_lies(base):
    real, link = base.parent / "real", base.parent / "link"
    real.mkdir()
    link.symlink_to(real)
    merge_into_checkpoint(base, [change(make(), 0)], None, link, overwrite=True)
    assert link.is_symlink()
    assert (real / "model.safetensors").is_file()
    assert sorted(p.name for p in base.parent.iterdir()) == ["base", "link", "real"]


def test_a_tensor_that_is_there_twice(base):
    """Under two names that become one where the head changes, and with it the names."""
    state = load_file(base / "model.safetensors")
    state[OUTPUT.removeprefix("bert.")] = state[OUTPUT].clone()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    head = {"classifier.weight": torch.ones(3, 8), "classifier.bias": torch.zeros(3)}
    head |= {"bert.pooler.dense.weight": torch.eye(8), "bert.pooler.dense.bias": torch.zeros(8)}
    nli = Adapter(dict(change(make(), 0)), name="nli", dense=head)
    refused(base, [nli], "both 'bert.encoder.layer.0.output.dense.weight' in the model")
