"""Adapters into one adapter, and onto a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparseft import Adapter, Composer, SparseDiff, compose_adapters
from sparseft.adapter import AdapterMetadata
from sparseft.composition import merge_into_checkpoint
from sparseft.errors import BaseMismatchError, CompositionError, UnknownNameError


def diff(values, mode="add"):
    tensor = torch.tensor(values)
    return SparseDiff.from_dense(tensor, tensor != 0, mode)


class TestComposeAdapters:
    def test_union_and_sums(self):
        a = Adapter({"w": diff([1.0, 2.0, 0.0, 0.0]), "x": diff([1.0])}, name="a")
        b = Adapter({"w": diff([0.0, 10.0, 20.0, 0.0])}, name="b")
        merged = compose_adapters([a, b], [2, -1])
        assert merged["w"].indices.tolist() == [0, 1, 2]
        assert merged["w"].values.tolist() == [2.0, -6.0, -20.0]
        assert merged["x"].values.tolist() == [2.0]
        assert merged.name == "a+b"

    def test_recipe_is_recorded(self, make_model, make_adapter):
        model = make_model()
        a, b = make_adapter(model, 0, name="a"), make_adapter(model, 1, name="b")
        merged = compose_adapters({"sw": b, "nli": a}, {"sw": 0.5, "nli": 1})
        meta = merged.metadata
        assert meta.parents == (a.digest, b.digest)
        assert meta.extra["composition"]["adapters"] == [
            {"name": "nli", "digest": a.digest, "coeff": 1.0},
            {"name": "sw", "digest": b.digest, "coeff": 0.5},
        ]
        assert meta.base_name == "net"
        assert set(meta.fingerprint.tensors) == set(a)
        assert meta.method == "compose/linear"

    def test_saved_and_loaded(self, make_model, make_adapter, tmp_path):
        model = make_model()
        parts = [make_adapter(model, 0, dense=True), make_adapter(model, 1)]
        merged = compose_adapters(parts)
        again = Adapter.load(merged.save(tmp_path / "m"))
        assert again.equals(merged)
        assert again.metadata == merged.metadata
        assert set(again.dense) == {"classifier.weight", "classifier.bias"}

    def test_zero_leaves_no_trace(self, make_model, make_adapter):
        model = make_model()
        a, b = make_adapter(model, 0, dense=True), make_adapter(model, 1)
        merged = compose_adapters([a, b], [0, 1])
        assert merged.equals(b)
        assert merged.dense == {}
        assert merged.metadata.parents == (b.digest,)

    def test_the_same_adapter_twice(self):
        a = Adapter({"w": diff([1.0, 2.0])}, name="a")
        merged = compose_adapters([a, a], [1, 2])
        assert merged["w"].values.tolist() == [3.0, 6.0]
        assert merged.name == "a+a-2"

    def test_negation_cancels_but_keeps_entries(self):
        a = Adapter({"w": diff([1.0, 2.0])}, name="a")
        merged = compose_adapters({"x": a, "y": a}, {"x": 1, "y": -1})
        assert merged["w"].nnz == 2
        assert merged["w"].values.tolist() == [0.0, 0.0]

    def test_set_mode(self):
        a = Adapter({"w": diff([1.0, 2.0, 0.0], "set")}, name="a")
        b = Adapter({"w": diff([0.0, 2.0, 3.0], "set")}, name="b")
        merged = compose_adapters([a, b])
        assert merged["w"].mode == "set"
        assert merged["w"].values.tolist() == [1.0, 2.0, 3.0]
        clash = Adapter({"w": diff([0.0, 9.0, 3.0], "set")}, name="c")
        with pytest.raises(CompositionError, match="both replace entry 1 of 'w'"):
            compose_adapters([a, clash])
        with pytest.raises(CompositionError, match=r"coefficient 0.5 has no meaning"):
            compose_adapters([a, b], 0.5)
        with pytest.raises(CompositionError, match="one merged diff cannot hold both"):
            compose_adapters([a, Adapter({"w": diff([1.0, 0.0, 0.0])})])

    def test_refusals(self, make_model, make_adapter):
        model = make_model()
        a = make_adapter(model, 0, dense=True)
        with pytest.raises(BaseMismatchError, match="made on different bases"):
            compose_adapters([a, make_adapter(make_model(seed=1), 1)])
        with pytest.raises(BaseMismatchError, match=r"\(2,\).*\(3,\)"):
            compose_adapters(
                [
                    Adapter({"w": diff([1.0, 2.0])}, name="a"),
                    Adapter({"w": diff([1.0, 2.0, 3.0])}, name="b"),
                ]
            )
        with pytest.raises(CompositionError, match="both hold all of 'classifier.bias'"):
            compose_adapters([a, make_adapter(model, 1, dense=True)])
        head = Adapter({"classifier.bias": diff([1.0, 1.0, 1.0])}, name="h")
        with pytest.raises(CompositionError, match="one adapter cannot hold both"):
            compose_adapters([a, head])
        with pytest.raises(CompositionError, match="3 coefficients were given for 1"):
            compose_adapters([a], [1, 2, 3])
        with pytest.raises(CompositionError, match="pass a list"):
            compose_adapters(a)
        with pytest.raises(UnknownNameError, match="no composition method 'tis'"):
            compose_adapters([a], method="tis")

    def test_bases_of_other_names(self, make_model, make_adapter):
        model = make_model()

        def named(base_name, seed, names, of=model, **options):
            adapter = make_adapter(of, seed, names=names, **options)
            return Adapter(
                dict(adapter),
                name=adapter.name,
                metadata=replace(adapter.metadata, base_name=base_name),
            )

        one, two, both = ("embed.weight",), ("body.0.weight",), ("embed.weight", "body.0.weight")
        x, y = named("owner/net", 0, one), named("other", 1, two)
        refused = "'owner/net' and 'a1' on 'other'.*--no-check-base"
        with pytest.raises(BaseMismatchError, match=refused):
            compose_adapters([x, y])
        with pytest.raises(BaseMismatchError, match=refused):
            compose_adapters([x, named("other", 1, one, fingerprint=False)])
        merged = compose_adapters([x, y], check_base=False)
        assert set(merged.metadata.fingerprint.tensors) == set(both)
        assert merged.metadata.base_name is None
        # One base under two names: by the last part, by a tensor, by a third that joins them.
        for parts in (
            [x, named("net/", 1, two)],
            [x, named(None, 1, two)],
            [x, named("other", 1, one)],
            [x, y, named("third", 2, both)],
            [named("third", 2, both), y, x],
            [x, y, named(None, 2, both)],
        ):
            assert len(compose_adapters(parts)) <= 2
        assert compose_adapters([x, y], [1, 0]).equals(compose_adapters([x]))

    def test_bases_that_are_not_checked(self, make_model, make_adapter):
        a = make_adapter(make_model(), 0, names=("embed.weight", "body.0.weight"))
        other = make_model()
        with torch.no_grad():
            other.embed.weight += 1
        b = make_adapter(other, 1, names=("embed.weight", "body.0.weight"))
        with pytest.raises(BaseMismatchError, match="made on different bases"):
            compose_adapters([a, b])
        merged = compose_adapters([a, b], check_base=False)
        assert set(merged) == {"embed.weight", "body.0.weight"}
        assert set(merged.metadata.fingerprint.tensors) == {"body.0.weight"}

    def test_order_changes_no_bit(self, make_model, make_adapter):
        model = make_model()
        parts = [make_adapter(model, i, scale=3.0, density=0.9) for i in range(3)]
        one = compose_adapters(parts, [0.3, -0.7, 1.1])
        other = compose_adapters(parts[::-1], [1.1, -0.7, 0.3])
        assert one.digest == other.digest


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def language(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("bert.encoder.layer.0.output.dense.weight", "cls.predictions.transform.dense.weight")
    parameters = dict(model.named_parameters())
    return Adapter(
        {
            n: SparseDiff.from_dense(torch.randn(parameters[n].shape, generator=generator))
            for n in names
        },
        name="sw",
    )


def task():
    generator = torch.Generator().manual_seed(9)
    return Adapter(
        {"bert.encoder.layer.0.output.dense.weight": SparseDiff.from_dense(torch.ones(8, 12))},
        name="nli",
        dense={
            "classifier.weight": torch.randn(3, 8, generator=generator),
            "classifier.bias": torch.zeros(3),
            "bert.pooler.dense.weight": torch.eye(8),
            "bert.pooler.dense.bias": torch.zeros(8),
        },
        metadata=AdapterMetadata(base_name="tiny"),
    )


class TestCheckpoint:
    def test_folder_and_adapters_to_a_classifier(self, bert, tmp_path):
        import transformers

        bert.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
        sw, nli = language(bert), task()
        sw.save(tmp_path / "sw")
        out = merge_into_checkpoint(
            tmp_path / "base", [tmp_path / "sw", nli], [0.5, 1], tmp_path / "out"
        )
        merged = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        name = "bert.encoder.layer.0.output.dense.weight"
        base = dict(bert.named_parameters())[name].detach()
        total = nli[name].to_dense() + 0.5 * sw[name].to_dense()
        assert torch.equal(dict(merged.named_parameters())[name], base + total)
        assert torch.equal(merged.classifier.weight, nli.dense["classifier.weight"])
        assert (out / "tokenizer_config.json").is_file()
        assert '"coeff": 0.5' in (out / "sparseft_composition.json").read_text()
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    def test_masked_lm_keeps_its_head(self, bert, tmp_path):
        import transformers

        bert.save_pretrained(tmp_path / "base")
        out = merge_into_checkpoint(tmp_path / "base", [language(bert)], None, tmp_path / "out")
        merged = transformers.AutoModelForMaskedLM.from_pretrained(out)
        name = "cls.predictions.transform.dense.weight"
        wanted = dict(bert.named_parameters())[name] + language(bert)[name].to_dense()
        assert torch.equal(dict(merged.named_parameters())[name], wanted)

    def test_live_model_is_as_before(self, bert, tmp_path, snapshot, same):
        base = snapshot(bert)
        merge_into_checkpoint(bert, {"sw": language(bert)}, {"sw": 2}, tmp_path / "out")
        assert same(snapshot(bert), base)

    def test_existing_folder(self, bert, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old.txt").write_text("keep")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            merge_into_checkpoint(bert, [language(bert)], None, tmp_path / "out")
        assert (tmp_path / "out" / "old.txt").read_text() == "keep"
        (tmp_path / "out" / "sparseft_composition.json").write_text("{}")
        merge_into_checkpoint(bert, [language(bert)], None, tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "old.txt").exists()
        assert (tmp_path / "out" / "config.json").is_file()

    def test_a_failure_leaves_the_old_folder(self, bert, tmp_path, monkeypatch, snapshot, same):
        merge_into_checkpoint(bert, [language(bert)], None, tmp_path / "out")
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        base = snapshot(bert)

        def full(folder):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(bert, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            merge_into_checkpoint(
                bert, [language(bert, seed=1)], None, tmp_path / "out", overwrite=True
            )
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert same(snapshot(bert), base)

    def test_no_random_head_is_written(self, bert, tmp_path):
        bert.save_pretrained(tmp_path / "base")
        with pytest.raises(CompositionError, match=r"classifier.*random values"):
            merge_into_checkpoint(
                tmp_path / "base", [language(bert)], None, tmp_path / "out",
                architecture="AutoModelForSequenceClassification",
            )  # fmt: skip
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("base", ["/no/such/folder", "./nothing"])
    def test_base_that_is_not_there(self, bert, tmp_path, base):
        with pytest.raises(CompositionError, match=r"no folder .*save_pretrained"):
            merge_into_checkpoint(base, [language(bert)], None, tmp_path / "out")

    def test_base_that_cannot_be_fetched(self, bert, tmp_path, monkeypatch):
        import huggingface_hub

        def offline(*args, **options):
            raise ConnectionError("no route.\nCheck your connection.")

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
        with pytest.raises(
            CompositionError,
            match=r"cannot be loaded: .* does not answer \(no route\).*give the path",
        ):
            merge_into_checkpoint("nobody/nothing-here", [language(bert)], None, tmp_path / "out")

    def test_unknown_architecture(self, bert, tmp_path):
        bert.save_pretrained(tmp_path / "base")
        with pytest.raises(CompositionError, match="no class 'BertForNothing'"):
            merge_into_checkpoint(
                tmp_path / "base", [language(bert)], None, tmp_path / "out",
                architecture="BertForNothing",
            )  # fmt: skip

    def test_only_transformers_models(self, make_model, make_adapter, tmp_path):
        model = make_model()
        with pytest.raises(CompositionError, match="Net has no save_pretrained"):
            merge_into_checkpoint(model, [make_adapter(model, 0)], None, tmp_path / "out")


def test_merged_checkpoint_equals_the_composed_model(bert, tmp_path, snapshot, same):
    import transformers

    adapters = {"sw": language(bert), "qu": language(bert, seed=3)}
    composer = Composer(bert, adapters)
    composer.apply({"sw": 0.3, "qu": -1.2})
    wanted = snapshot(bert)
    composer.revert()
    out = merge_into_checkpoint(bert, adapters, {"sw": 0.3, "qu": -1.2}, tmp_path / "out")
    assert same(snapshot(transformers.AutoModelForMaskedLM.from_pretrained(out)), wanted)
