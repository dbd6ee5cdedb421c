"""A base on disk is streamed: the bits of a Composer, in the base's own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparseft import Adapter, Composer, SparseDiff
from sparseft.adapter import AdapterMetadata
from sparseft.composition import merge_into_checkpoint, methods
from sparseft.errors import CompositionError
from sparseft.modules import ParameterIndex, fingerprint_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

OUTPUT = "bert.encoder.layer.0.output.dense.weight"
EMBED = "bert.embeddings.word_embeddings.weight"
HEAD = "cls.predictions.transform.dense.weight"


def config(**options):
    small = {
        "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 8,
    }  # fmt: skip
    return transformers.BertConfig(**{**small, **options})


def make(kind="BertForMaskedLM", dtype=torch.float32, **options):
    torch.manual_seed(0)
    return getattr(transformers, kind)(config(**options)).to(dtype)


def change(model, seed, *, name=None, names=(EMBED, OUTPUT, HEAD), mode="add", dense=None):
    """An adapter of a third of the entries of some parameters."""
    generator = torch.Generator().manual_seed(100 + seed)
    index = ParameterIndex(model)
    diffs = {}
    for parameter in names:
        weight = index.get(parameter)
        values = torch.randn(weight.shape, generator=generator)
        mask = torch.rand(weight.shape, generator=generator) < 0.3
        values = values.to(weight.dtype) if mode == "set" else values
        diffs[parameter] = SparseDiff.from_dense(values, mask, mode)
    metadata = AdapterMetadata(base_name="tiny", fingerprint=fingerprint_model(model, names))
    return Adapter(diffs, name=name or f"a{seed}", dense=dense, metadata=metadata)


def composed(kind, base, adapters, coeffs, **options):
    """The state of a live model with the adapters on it, by file names."""
    model = getattr(transformers, kind).from_pretrained(base, dtype="auto")
    composer = Composer(model, adapters)
    composer.apply(coeffs, **options)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    composer.revert()
    return state


def stored(folder) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        out |= load_file(file)
    return out


def raw(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a, b):
    return all(raw(a[n]) == raw(b[n]) for n in a)


def layout(folder):
    """File -> what its header says, contents aside."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            names = handle.keys()
            shapes = {
                n: (str(handle.get_tensor(n).dtype), handle.get_slice(n).get_shape()) for n in names
            }
            found[file.name] = handle.metadata(), shapes
    return found


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_bits_of_a_composer_in_the_bases_files(tmp_path, dtype, shards):
    model = make(dtype=dtype)
    size = "1KB" if shards else "1GB"
    model.save_pretrained(tmp_path / "base", max_shard_size=size)
    adapters = {"sw": change(model, 0), "qu": change(model, 1), "st": change(model, 2, mode="set")}
    given = {"sw": 0.3, "qu": -1.2, "st": 1}
    out = merge_into_checkpoint(tmp_path / "base", adapters, given, tmp_path / "out")
    wanted = composed("BertForMaskedLM", tmp_path / "base", adapters, given)
    got = stored(out)
    assert same(got, wanted)
    assert not same(got, stored(tmp_path / "base"))
    assert layout(out) == layout(tmp_path / "base")
    again = transformers.AutoModelForMaskedLM.from_pretrained(out, dtype="auto")
    assert same(again.state_dict(), wanted)
    index = "model.safetensors.index.json"
    if shards:
        assert len(layout(out)) > 3
        assert json.loads((out / index).read_text()) == json.loads(
            (tmp_path / "base" / index).read_text()
        )
    # What no adapter touches is the same file, byte for byte.
    untouched = [
        f for f, (_, names) in layout(out).items()
        if not {EMBED, OUTPUT, HEAD} & set(names)
    ]  # fmt: skip
    assert bool(untouched) == shards
    for file in untouched:
        assert (out / file).read_bytes() == (tmp_path / "base" / file).read_bytes()


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method(tmp_path, method):
    model = make()
    model.save_pretrained(tmp_path / "base")
    adapters = {"sw": change(model, 0), "qu": change(model, 1), "nli": change(model, 2)}
    given = {"sw": 1, "qu": 0.5, "nli": 0}
    required = dict.fromkeys(methods()[method].required, 0.5)
    out = merge_into_checkpoint(
        tmp_path / "base", adapters, given, tmp_path / "out", method=method, **required
    )
    wanted = composed(
        "BertForMaskedLM", tmp_path / "base", adapters, given, method=method, **required
    )
    assert same(stored(out), wanted)


class TestPickles:
    @pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
    def test_become_safetensors(self, tmp_path, shards):
        model = make()
        model.save_pretrained(tmp_path / "safe")
        base = tmp_path / "base"
        base.mkdir()
        shutil.copy(tmp_path / "safe" / "config.json", base)
        state = model.state_dict()  # the tied head too, as these files have it
        names = list(state)
        parts = [names[:7], names[7:]] if shards else [names]
        table = {}
        for i, part in enumerate(parts):
            file = f"pytorch_model-{i + 1:05}-of-00002.bin" if shards else "pytorch_model.bin"
            torch.save({n: state[n] for n in part}, base / file)
            table |= dict.fromkeys(part, file)
        if shards:
            index = {"metadata": {"total_size": 1}, "weight_map": table}
            (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        adapters = {"sw": change(model, 0)}
        out = merge_into_checkpoint(base, adapters, None, tmp_path / "out")
        wanted = composed("BertForMaskedLM", tmp_path / "safe", adapters, {"sw": 1})
        assert same(stored(out), wanted)
        assert not list(out.glob("*.bin*"))
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert sorted(layout(out)) == (files if shards else ["model.safetensors"])
        again = transformers.AutoModelForMaskedLM.from_pretrained(out)
        assert same(again.state_dict(), wanted)
        # A tied weight is where the base had it: both of its names.
        assert raw(stored(out)[EMBED]) == raw(stored(out)["cls.predictions.decoder.weight"])


def test_one_file_by_another_name(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "weights.safetensors")
    out = merge_into_checkpoint(tmp_path / "base", [change(model, 0)], None, tmp_path / "out")
    assert sorted(layout(out)) == ["model.safetensors"]
    transformers.AutoModelForMaskedLM.from_pretrained(out)


class TestTied:
    def test_copies_that_differ(self, tmp_path):
        model = make()
        model.save_pretrained(tmp_path / "base")
        state = load_file(tmp_path / "base" / "model.safetensors")
        state["cls.predictions.decoder.weight"] = state[EMBED] + 1
        save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
        with pytest.raises(CompositionError, match="one tied parameter .* different values"):
            merge_into_checkpoint(tmp_path / "base", [change(model, 0)], None, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        # A diff of another tensor is nobody's trouble.
        other = change(model, 0, names=(OUTPUT,))
        out = merge_into_checkpoint(tmp_path / "base", [other], None, tmp_path / "out")
        assert raw(stored(out)[EMBED]) == raw(state[EMBED])

    def test_a_diff_under_the_heads_name(self, tmp_path):
        model = make()
        model.save_pretrained(tmp_path / "base")
        adapter = change(model, 0, names=("cls.predictions.decoder.weight",))
        out = merge_into_checkpoint(tmp_path / "base", [adapter], None, tmp_path / "out")
        wanted = composed("BertForMaskedLM", tmp_path / "base", {"a": adapter}, "a")
        assert raw(stored(out)[EMBED]) == raw(wanted[EMBED])
        assert "cls.predictions.decoder.weight" not in stored(out)


def classifier_head(labels=3, dtype=torch.float32):
    return {
        "classifier.weight": torch.randn(labels, 8).to(dtype),
        "classifier.bias": torch.zeros(labels, dtype=dtype),
        "bert.pooler.dense.weight": torch.eye(8, dtype=dtype),
        "bert.pooler.dense.bias": torch.zeros(8, dtype=dtype),
    }


class TestHeads:
    def test_a_sharded_masked_lm_becomes_a_classifier(self, tmp_path):
        model = make(dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "base", max_shard_size="3KB")
        nli = change(model, 0, names=(OUTPUT,), dense=classifier_head())
        out = merge_into_checkpoint(tmp_path / "base", {"n": nli}, None, tmp_path / "out")
        table = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(table["weight_map"]) == set(stored(out))
        assert not any(name.startswith("cls.") for name in stored(out))
        assert table["metadata"]["total_size"] == sum(t.nbytes for t in stored(out).values())
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
        loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            out, dtype="auto", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert loaded.dtype == torch.bfloat16
        head = nli.dense["classifier.weight"].bfloat16()
        assert raw(loaded.classifier.weight.detach()) == raw(head)

    def test_a_bare_encoder_gets_the_prefix_of_the_headed_model(self, tmp_path):
        model = make("BertModel", add_pooling_layer=None)
        model.save_pretrained(tmp_path / "base")
        inner = change(model, 0, names=("encoder.layer.0.output.dense.weight",))
        head = {n: t for n, t in classifier_head().items() if n.startswith("classifier")}
        nli = Adapter(dict(inner), name="nli", dense=head, metadata=inner.metadata)
        out = merge_into_checkpoint(tmp_path / "base", [nli], None, tmp_path / "out")
        names = set(stored(out)) - set(head)
        assert all(name.startswith("bert.") for name in names)
        _, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            out, output_loading_info=True
        )
        assert not info["missing_keys"]
        before = stored(tmp_path / "base")["encoder.layer.0.output.dense.weight"]
        assert not torch.equal(stored(out)[OUTPUT], before)

    def test_a_head_of_another_size_replaces_the_bases(self, tmp_path):
        model = make("BertForSequenceClassification")  # two labels
        model.save_pretrained(tmp_path / "base")
        head = {n: t for n, t in classifier_head(5).items() if n.startswith("classifier")}
        adapter = change(model, 0, names=(OUTPUT,), dense=head)
        out = merge_into_checkpoint(tmp_path / "base", [adapter], None, tmp_path / "out")
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        assert torch.equal(loaded.classifier.weight, head["classifier.weight"])
        assert loaded.config.num_labels == 5

    def test_with_coefficient_zero_it_is_not_there(self, tmp_path):
        model = make()
        model.save_pretrained(tmp_path / "base")
        nli = change(model, 0, names=(OUTPUT,), dense=classifier_head())
        out = merge_into_checkpoint(tmp_path / "base", [nli], 0, tmp_path / "out")
        assert same(stored(out), stored(tmp_path / "base"))
        assert (out / "config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()

    def test_a_value_that_the_dtype_cannot_hold(self, tmp_path):
        model = make(dtype=torch.float16)
        model.save_pretrained(tmp_path / "base")
        head = classifier_head()
        head["classifier.bias"][1] = 1e6
        adapter = change(model, 0, names=(OUTPUT,), dense=head)
        with pytest.raises(CompositionError, match=r"'classifier.bias' does not fit torch.float16"):
            merge_into_checkpoint(tmp_path / "base", [adapter], None, tmp_path / "out")

    def test_contradictions(self, tmp_path):
        model = make()
        model.save_pretrained(tmp_path / "base")
        a = change(model, 0, names=(OUTPUT,), dense=classifier_head())
        b = change(model, 1, names=(OUTPUT,), dense=classifier_head())
        with pytest.raises(CompositionError, match="both hold all of"):
            merge_into_checkpoint(tmp_path / "base", [a, b], None, tmp_path / "out")
        whole = change(model, 2, names=(EMBED,), dense={OUTPUT: torch.ones(8, 12)})
        with pytest.raises(CompositionError, match="'a2' holds all of .* while 'a0' has a diff"):
            merge_into_checkpoint(
                tmp_path / "base", [change(model, 0), whole], None, tmp_path / "out"
            )


class TestBeside:
    def test_card_and_recipe_say_what_was_done(self, tmp_path):
        model = make()
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "README.md").write_text("the base's own card")
        (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
        sw = change(model, 0, name="sw|a")
        given = {"sw": 0.5}
        out = merge_into_checkpoint(tmp_path / "base", {"sw": sw}, given, tmp_path / "out")
        card = (out / "README.md").read_text()
        said = ("library_name: transformers", "`base`", "| sw | 0.5 |", sw.digest, "`linear`")
        for text in (*said, "https://", "BertForMaskedLM.from_pretrained", "torch 2"):
            assert text in card
        assert str(tmp_path) not in card
        assert "base_model" not in card, "a folder's name is no name on the hub"
        recipe = json.loads((out / "sparseft_composition.json").read_text())
        assert recipe["base"] == "base"
        assert recipe["adapters"] == [{"name": "sw", "digest": sw.digest, "coeff": 0.5}]
        assert set(recipe["versions"]) == {"sparseft", "torch"}
        assert (out / "preprocessor_config.json").is_file()
        # Equal work, equal bytes: no time, no path.
        again = merge_into_checkpoint(tmp_path / "base", {"sw": sw}, given, tmp_path / "b" / "out")
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {
            p.name: p.read_bytes() for p in again.iterdir()
        }

    def test_what_was_left_out_is_said(self, tmp_path):
        model = make()
        model.save_pretrained(tmp_path / "base")
        nli = change(model, 1, names=(OUTPUT,), dense=classifier_head(), name="nli")
        out = merge_into_checkpoint(
            tmp_path / "base", [change(model, 0), nli], None, tmp_path / "o"
        )
        assert (
            f"Left out of `a0`, for want of a place in the model: `{HEAD}`."
            in (out / "README.md").read_text()
        )
        assert json.loads((out / "sparseft_composition.json").read_text())["skipped"] == {
            "a0": [HEAD]
        }

    def test_a_live_model_gets_them_too(self, tmp_path):
        model = make()
        out = merge_into_checkpoint(model, {"sw": change(model, 0)}, None, tmp_path / "out")
        assert "| sw | 1 |" in (out / "README.md").read_text()


def test_files_narrower_than_the_model(tmp_path):
    """fp16 files under a config that says fp32, as some are published: composed in fp32."""
    model = make(dtype=torch.float16)
    model.save_pretrained(tmp_path / "base")
    content = json.loads((tmp_path / "base" / "config.json").read_text())
    content["dtype"] = content["torch_dtype"] = "float32"
    (tmp_path / "base" / "config.json").write_text(json.dumps(content))
    adapters = {"sw": change(model, 0), "st": change(model, 1, mode="set")}
    out = merge_into_checkpoint(tmp_path / "base", adapters, None, tmp_path / "out")
    wanted = composed("BertForMaskedLM", tmp_path / "base", adapters, ["sw", "st"])
    assert {t.dtype for t in wanted.values()} == {torch.float32}
    assert same(stored(out), wanted)
    # The other way round nothing is narrowed.
    content["dtype"] = content["torch_dtype"] = "bfloat16"
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    again = merge_into_checkpoint(
        out, {"sw": adapters["sw"]}, None, tmp_path / "again", check_base=False
    )
    assert {t.dtype for t in stored(again).values()} == {torch.float32}


def test_old_names_of_layer_norms(tmp_path):
    """transformers renames them when it loads; the file keeps what it has."""
    model = make()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in load_file(file).items()
    }
    save_file(old, file, {"format": "pt"})
    norm = "bert.encoder.layer.0.output.LayerNorm.weight"
    adapter = change(model, 0, names=(norm,))
    out = merge_into_checkpoint(tmp_path / "base", [adapter], None, tmp_path / "out")
    assert set(stored(out)) == set(old)
    wanted = model.get_parameter(norm).detach() + adapter[norm].to_dense()
    assert raw(stored(out)[norm.replace("weight", "gamma")]) == raw(wanted)


def test_tensors_that_transformers_fuses_are_loaded_whole(tmp_path, caplog):
    """Experts lie one by one in the files and stacked in the model."""
    torch.manual_seed(0)
    small = transformers.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_local_experts=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(small)
    model.save_pretrained(tmp_path / "base")
    names = [n for n, _ in model.named_parameters() if "experts" in n]
    inside = any(n in stored(tmp_path / "base") for n in names)
    if not names or inside:
        pytest.skip("this transformers keeps experts in the files as in the model")
    plain = change(model, 0, names=("model.embed_tokens.weight",))
    out = merge_into_checkpoint(tmp_path / "base", {"a": plain}, None, tmp_path / "out")
    assert "loaded whole" not in caplog.text
    assert layout(out) == layout(tmp_path / "base")
    fused = change(model, 1, names=(names[0],))
    out = merge_into_checkpoint(tmp_path / "base", {"a": fused}, None, tmp_path / "fused")
    assert "loaded whole instead of streamed" in caplog.text
    wanted = composed("MixtralForCausalLM", tmp_path / "base", {"a": fused}, "a")
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert same(again.state_dict(), wanted)
    assert "| a | 1 |" in (out / "README.md").read_text()
