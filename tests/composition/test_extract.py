"""An adapter from two checkpoints: every changed bit, or exactly the largest changes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseft import Adapter, extract_adapter
from sparseft.composition import merge_into_checkpoint
from sparseft.errors import BaseMismatchError, CompositionError, MaskError, UnknownNameError
from sparseft.modules import ParameterIndex, fingerprint_model
from sparseft.ops.topk import topk_reference

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

OUTPUT = "bert.encoder.layer.0.output.dense.weight"
EMBED = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(kind="BertForMaskedLM", dtype=torch.float32, seed=0, **options):
    small = {
        "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 8,
    }  # fmt: skip
    torch.manual_seed(seed)
    return getattr(transformers, kind)(transformers.BertConfig(**{**small, **options})).to(dtype)


def tune(model, share=0.3, seed=5):
    """Move a share of every parameter, and turn a zero into -0.0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            step = 0.05 * torch.randn(parameter.shape, generator=generator)
            step *= torch.rand(parameter.shape, generator=generator) < share
            parameter.copy_((parameter.float() + step).to(parameter.dtype))
        model.get_parameter("bert.encoder.layer.0.output.dense.bias")[0] = -0.0
    return model


@pytest.fixture
def folders(tmp_path):
    make().save_pretrained(tmp_path / "base")
    tune(make()).save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def stored(folder):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def raw(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def rewrite(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def set_config(folder, **options):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **options}))


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
    def test_set_rebuilds_the_tuned_bit_for_bit(self, tmp_path, dtype, shards):
        size = "1KB" if shards else "1GB"
        make(dtype=dtype).save_pretrained(tmp_path / "base", max_shard_size=size)
        # The tuned one lies in other shards: names join them, not files.
        tuned = tune(make(dtype=dtype))
        tuned.save_pretrained(tmp_path / "tuned", max_shard_size="2KB" if shards else "1GB")
        adapter = extract_adapter(tmp_path / "base", tmp_path / "tuned", mode="set")
        adapter.save(tmp_path / "change")
        out = merge_into_checkpoint(
            tmp_path / "base", [tmp_path / "change"], None, tmp_path / "again"
        )
        wanted, got = stored(tmp_path / "tuned"), stored(out)
        assert {n: raw(t) for n, t in got.items()} == {n: raw(t) for n, t in wanted.items()}
        assert all(diff.dtype == dtype for diff in adapter.values())
        bias = adapter["bert.encoder.layer.0.output.dense.bias"]
        assert torch.signbit(bias.values[0]), "-0.0 in place of 0.0 is a change"

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_fp32_differences_rebuild_narrow_weights(self, tmp_path, dtype):
        make(dtype=dtype).save_pretrained(tmp_path / "base")
        tune(make(dtype=dtype)).save_pretrained(tmp_path / "tuned")
        adapter = extract_adapter(tmp_path / "base", tmp_path / "tuned")
        assert all(d.dtype == torch.float32 and d.mode == "add" for d in adapter.values())
        out = merge_into_checkpoint(tmp_path / "base", [adapter], None, tmp_path / "out")
        wanted = stored(tmp_path / "tuned")
        assert all(torch.equal(t, wanted[n]) for n, t in stored(out).items())

    @pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
    def test_another_head(self, tmp_path, kind):
        make().save_pretrained(tmp_path / "base")
        names = {0: "yes", 1: "no", 2: "maybe"}
        tuned = tune(make(f"BertFor{kind}", num_labels=3, id2label=names))
        tuned.save_pretrained(tmp_path / "tuned")
        adapter = extract_adapter(tmp_path / "base", tmp_path / "tuned", mode="set")
        assert {"classifier.weight", "classifier.bias"} <= set(adapter.dense)
        out = merge_into_checkpoint(tmp_path / "base", [adapter], None, tmp_path / "out")
        wanted = stored(tmp_path / "tuned")
        assert {n: raw(t) for n, t in stored(out).items()} == {n: raw(t) for n, t in wanted.items()}
        again = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(out)
        assert again.config.id2label == names
        skipped = extract_adapter(tmp_path / "base", tmp_path / "tuned", new="skip")
        assert not skipped.dense
        assert "classifier.weight" in skipped.metadata.extra["extracted"]["left_out"]
        with pytest.raises(CompositionError, match="only .*tuned has .*--new dense"):
            extract_adapter(tmp_path / "base", tmp_path / "tuned", new="error")

    def test_a_base_stored_narrower_than_it_is_loaded(self, tmp_path):
        make(dtype=torch.float16).save_pretrained(tmp_path / "base")
        set_config(tmp_path / "base", dtype="float32", torch_dtype="float32")
        loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "base", dtype="auto")
        tune(loaded).save_pretrained(tmp_path / "tuned")
        adapter = extract_adapter(tmp_path / "base", tmp_path / "tuned", mode="set")
        assert 0 < adapter.nnz < 0.5 * sum(d.numel for d in adapter.values())
        out = merge_into_checkpoint(tmp_path / "base", [adapter], None, tmp_path / "out")
        wanted = stored(tmp_path / "tuned")
        assert {n: raw(t) for n, t in stored(out).items()} == {n: raw(t) for n, t in wanted.items()}

    def test_pickles_of_either_side(self, folders, tmp_path):
        base, tuned = folders
        wanted = extract_adapter(base, tuned)
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
        assert extract_adapter(base, tuned).equals(wanted)

    def test_files_alone(self, folders):
        base, tuned = folders
        alone = extract_adapter(base / "model.safetensors", tuned / "model.safetensors")
        assert alone.equals(extract_adapter(base, tuned))
        assert alone.name == "model"

    def test_the_same_weights(self, folders):
        base, _ = folders
        nothing = extract_adapter(base, base)
        assert len(nothing) == 0
        assert nothing.metadata.fingerprint is None


class TestGaps:
    """Base + all differences is the tuned checkpoint, or it is said why not."""

    def gaps(self, base, tuned, caplog, **options):
        caplog.clear()
        adapter = extract_adapter(base, tuned, **{"mode": "set", **options})
        noted = adapter.metadata.extra["extracted"].get("gaps", {})
        said = [r.getMessage() for r in caplog.records if "base + diff" in r.getMessage()]
        assert len(said) == len(noted)
        for message, names in zip(said, noted.values(), strict=True):
            assert f" {len(names)} tensors" in message or message.startswith(f"{len(names)} ")
            assert names[0] in message
        return noted

    def test_none(self, folders, caplog):
        assert self.gaps(*folders, caplog) == {}

    def test_the_tuned_lacks_tensors(self, folders, caplog, tmp_path):
        base, tuned = folders
        bias = "cls.predictions.transform.dense.bias"
        rewrite(tuned, lambda state: state.pop(bias))
        assert self.gaps(base, tuned, caplog) == {"stay": [bias]}
        assert self.gaps(base, tuned, caplog, mode="add") == {"stay": [bias]}
        assert self.gaps(base, tuned, caplog, nnz=5) == {}, "no more than some changes is asked for"
        adapter = extract_adapter(base, tuned, mode="set")
        out = merge_into_checkpoint(base, [adapter], None, tmp_path / "out")
        assert set(stored(out)) - set(stored(tuned)) == {bias}
        adapter.save(tmp_path / "a")
        assert Adapter.load(tmp_path / "a").metadata == adapter.metadata

    def test_an_encoder_has_no_head(self, folders, caplog):
        base, tuned = folders
        make().bert.save_pretrained(tuned)
        stay = self.gaps(base, tuned, caplog)["stay"]
        assert stay
        assert all(n.startswith("cls.") for n in stay)

    def test_the_old_head_of_another_class_goes(self, folders, caplog, tmp_path):
        base, tuned = folders
        make("BertForSequenceClassification").save_pretrained(tuned)
        assert self.gaps(base, tuned, caplog) == {}
        bias = "bert.encoder.layer.0.output.dense.bias"
        rewrite(tuned, lambda state: state.pop(bias))
        assert self.gaps(base, tuned, caplog) == {"stay": [bias]}
        adapter = extract_adapter(base, tuned, mode="set")
        out = merge_into_checkpoint(base, [adapter], None, tmp_path / "out")
        assert set(stored(out)) - set(stored(tuned)) == {bias}

    def test_what_is_left_out_is_no_gap(self, folders, caplog):
        base, tuned = folders
        make(vocab_size=33).save_pretrained(tuned)
        left_out = [EMBED, "cls.predictions.bias"]
        assert self.gaps(base, tuned, caplog, exclude=left_out) == {}

    def test_buffers_of_one_side(self, folders, caplog):
        base, tuned = folders
        rewrite(base, lambda state: state.update({"old": torch.tensor([1])}))
        rewrite(tuned, lambda state: state.update({"steps": torch.tensor([1])}))
        assert self.gaps(base, tuned, caplog) == {"stay": ["old"], "lost": ["steps"]}
        assert self.gaps(base, tuned, caplog, exclude="steps") == {"stay": ["old"]}

    def test_dtypes(self, folders, caplog, tmp_path):
        base, tuned = folders
        make("BertForSequenceClassification", torch.float16).save_pretrained(tuned)
        names = self.gaps(base, tuned, caplog)["other_dtype"]
        assert {OUTPUT, "classifier.weight"} <= set(names)
        assert self.gaps(base, tuned, caplog, mode="add") == {}
        adapter = extract_adapter(base, tuned, mode="set")
        out = merge_into_checkpoint(base, [adapter], None, tmp_path / "out")
        wanted = stored(tuned)
        assert {n for n, t in stored(out).items() if t.dtype != wanted[n].dtype} == set(names)


class TestContents:
    def test_provenance(self, folders, tmp_path):
        base, tuned = folders
        adapter = extract_adapter(base, tuned, name="sw")
        assert adapter.metadata.fingerprint == fingerprint_model(make(), adapter.names)
        assert adapter.metadata.base_name == "base"
        assert adapter.metadata.method == "diff/all"
        noted = adapter.metadata.extra["extracted"]
        assert noted["tuned"] == "tuned"
        assert noted["architecture"] == "BertForMaskedLM"
        file = adapter.save(tmp_path / "a")
        assert str(tmp_path).encode() not in file.read_bytes()
        assert Adapter.load(file).equals(adapter)

    def test_exactly_the_largest_by_the_librarys_ties(self, folders):
        base, tuned = folders
        # Whole tensors moved by one number, so that ties decide.
        rewrite(tuned, lambda state: [t.add_(1) for n, t in state.items() if "attention" in n])
        old, new = stored(base), stored(tuned)
        names = sorted(old)
        for count in (0, 1, 97, 400):
            adapter = extract_adapter(base, tuned, nnz=count)
            keep = topk_reference([(n, (new[n] - old[n]).abs()) for n in names], count)
            assert adapter.nnz == count
            for name in names:
                flat = keep[name].view(-1).nonzero().view(-1)
                got = adapter[name].indices if name in adapter else torch.empty(0)
                assert got.tolist() == flat.tolist()
                if name in adapter:
                    wanted = (new[name] - old[name]).view(-1)[flat]
                    assert torch.equal(adapter[name].values, wanted)
        total = sum(t.numel() for t in old.values())
        part = extract_adapter(base, tuned, density=0.1, mode="set")
        assert part.nnz == round(0.1 * total)
        assert part.metadata.density == 0.1
        assert part.metadata.method == "diff/topk"
        assert all(
            torch.equal(d.values, new[n].view(-1)[d.indices.long()]) for n, d in part.items()
        )

    def test_more_than_differ(self, folders, caplog):
        base, tuned = folders
        changed = extract_adapter(base, tuned).nnz - 1  # -0.0 for 0.0 is no difference in size
        adapter = extract_adapter(base, tuned, nnz=changed + 5)
        assert adapter.nnz == changed + 5
        assert f"5 of the {changed + 5} entries asked for do not differ" in caplog.text

    def test_tied_weights_are_one(self, folders):
        base, tuned = folders
        rewrite(tuned, lambda state: state.update({DECODER: state[EMBED].clone()}))
        adapter = extract_adapter(base, tuned)
        assert EMBED in adapter
        assert DECODER not in adapter
        rewrite(tuned, lambda state: state.update({DECODER: state[EMBED] + 1}))
        with pytest.raises(
            CompositionError, match="tuned: .* one tied parameter, but .* different"
        ):
            extract_adapter(base, tuned)

    def test_tied_on_one_side_only(self, tmp_path):
        make().save_pretrained(tmp_path / "tied")
        make(tie_word_embeddings=False).save_pretrained(tmp_path / "loose")
        with pytest.raises(
            CompositionError, match="one tied weight in the base .* two in the tuned"
        ):
            extract_adapter(tmp_path / "tied", tmp_path / "loose")
        with pytest.raises(
            CompositionError, match="one tied weight in the tuned .* two in the base"
        ):
            extract_adapter(tmp_path / "loose", tmp_path / "tied")

    def test_an_encoder_with_and_without_a_head(self, tmp_path):
        tune(make()).bert.save_pretrained(tmp_path / "bare")
        make().save_pretrained(tmp_path / "headed")
        adapter = extract_adapter(tmp_path / "headed", tmp_path / "bare")
        assert "encoder.layer.0.output.dense.weight" in adapter
        out = merge_into_checkpoint(tmp_path / "headed", [adapter], None, tmp_path / "out")
        assert not torch.equal(stored(out)[OUTPUT], stored(tmp_path / "headed")[OUTPUT])
        other = extract_adapter(tmp_path / "bare", tmp_path / "headed")
        assert OUTPUT in other
        assert "cls.predictions.bias" in other.dense

    def test_excluded(self, folders):
        base, tuned = folders
        adapter = extract_adapter(base, tuned, exclude=["*.embeddings.*", "cls.*"])
        assert adapter.names
        assert not [n for n in adapter if "embeddings" in n or n.startswith("cls")]
        assert EMBED not in extract_adapter(base, tuned, exclude=DECODER), "tied, by its other name"
        with pytest.raises(UnknownNameError, match="matches none"):
            extract_adapter(base, tuned, exclude="embed")


class TestRefusals:
    def test_a_grown_vocabulary(self, folders):
        base, tuned = folders
        bigger = make(vocab_size=33)
        bigger.save_pretrained(tuned)
        with pytest.raises(
            BaseMismatchError, match=r"\[30, 8\] in the base but \[33, 8\].*resize_to"
        ):
            extract_adapter(base, tuned)
        smaller = extract_adapter(base, tuned, exclude=[EMBED, "cls.predictions.bias"])
        assert EMBED not in smaller

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, folders, value):
        base, tuned = folders

        def spoil(state):
            state[OUTPUT][1, 2] = value

        rewrite(tuned, spoil)
        for mode in ("add", "set"):
            with pytest.raises(
                CompositionError, match=rf"{OUTPUT}.*{value}.*flat index 14.*--exclude"
            ):
                extract_adapter(base, tuned, mode=mode)
        with pytest.raises((CompositionError, MaskError), match=rf"{OUTPUT}.*flat index 14"):
            extract_adapter(base, tuned, nnz=10)
        # In both alike it is no change.
        rewrite(base, spoil)
        adapter = extract_adapter(base, tuned, mode="set")
        assert 14 not in adapter[OUTPUT].indices.tolist()

    def test_a_head_that_is_not_finite(self, folders):
        base, tuned = folders
        rewrite(tuned, lambda state: state[OUTPUT].fill_(1))
        head = make("BertForSequenceClassification")
        with torch.no_grad():
            head.classifier.bias[1] = float("nan")
        head.save_pretrained(tuned)
        with pytest.raises(CompositionError, match=r"'classifier.bias'.*entry 1 is nan"):
            extract_adapter(base, tuned)

    def test_dtypes_that_differ(self, tmp_path):
        for dtype in ("float32", "bfloat16", "float16"):
            make(dtype=getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
            tuned = tune(make(dtype=getattr(torch, dtype)))
            tuned.save_pretrained(tmp_path / f"tuned-{dtype}")
        for wide, narrow in (("float32", "bfloat16"), ("float16", "bfloat16")):
            with pytest.raises(
                CompositionError, match=rf"torch.{wide} .* torch.{narrow} in the base"
            ):
                extract_adapter(tmp_path / narrow, tmp_path / f"tuned-{wide}", mode="set")
        # fp32 holds every bf16 value, so the wide base takes them exactly.
        adapter = extract_adapter(tmp_path / "float32", tmp_path / "tuned-bfloat16", mode="set")
        out = merge_into_checkpoint(tmp_path / "float32", [adapter], None, tmp_path / "out")
        wanted = stored(tmp_path / "tuned-bfloat16")
        for name, tensor in stored(out).items():
            assert raw(tensor) == raw(wanted[name].float())
        extract_adapter(tmp_path / "bfloat16", tmp_path / "tuned-float32", mode="add")

    def test_buffers_that_differ(self, folders):
        base, tuned = folders
        rewrite(base, lambda state: state.update({"steps": torch.tensor([1])}))
        rewrite(tuned, lambda state: state.update({"steps": torch.tensor([2])}))
        with pytest.raises(CompositionError, match=r"'steps' \(I64\) differs"):
            extract_adapter(base, tuned)
        assert extract_adapter(base, tuned, exclude="steps").nnz

    def test_other_models_and_choices(self, folders, tmp_path):
        base, tuned = folders
        save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
        with pytest.raises(CompositionError, match="no parameter in common"):
            extract_adapter(base, tmp_path / "other.safetensors")
        with pytest.raises(MaskError, match="got both"):
            extract_adapter(base, tuned, nnz=1, density=0.1)
        with pytest.raises(MaskError, match="candidate entries"):
            extract_adapter(base, tuned, nnz=10**9)
        with pytest.raises(CompositionError, match="mode='put' is not one of 'add', 'set'"):
            extract_adapter(base, tuned, mode="put")
        with pytest.raises(CompositionError, match="base model: no folder ./gone"):
            extract_adapter("./gone", tuned)

    def test_a_class_that_transformers_does_not_have(self, folders, caplog):
        base, tuned = folders
        wanted = extract_adapter(base, tuned)
        for folder in folders:
            set_config(folder, architectures=["BertOfMine"])
        adapter = extract_adapter(base, tuned)
        assert "names are the files'" in caplog.text
        assert adapter.equals(wanted)


def test_canonical_names_are_the_models(folders):
    base, tuned = folders
    assert set(extract_adapter(base, tuned)) <= set(ParameterIndex(make()).names)
