"""sparseft's adapters as PEFT's folders, and back: without loss."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.18,<0.22'")

import sparseft  # noqa: E402
from sparseft import Adapter, SparseDiff  # noqa: E402
from sparseft.errors import AdapterFormatError, AttachError  # noqa: E402
from sparseft.io import foreign  # noqa: E402
from sparseft.peft import SparseFtConfig, adapter_of  # noqa: E402


def trained(tools, kind="bert", **options):
    """An adapter of sparseft's own training, with a head, and the logits of its model."""
    made = tools.tiny(kind)
    masks = sparseft.select(made.model, "random", nnz=300, seed=2, **options)
    heads = ["classifier.*"] if kind == "bert" else []
    sparse = sparseft.attach(made.model, masks, full_params=heads)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    sparse.sync_()
    adapter = sparse.adapter("own")
    return adapter, tools.logits(made.model, made.batch), made.batch


WITHOUT = {
    "bert": {"exclude": ["classifier.*"]},
    "gpt2": {"exclude": ["transformer.wte*"]},
    "llama": {"include": ["*_proj.weight"]},
    "t5": {"include": ["*.q.weight", "*.wi.weight"]},
}


@pytest.mark.parametrize("kind", list(WITHOUT))
def test_ours_is_loaded_by_peft_with_equal_outputs_and_comes_back(tools, tmp_path, kind):
    adapter, wanted, batch = trained(tools, kind, **WITHOUT[kind])
    base = tools.tiny(kind).model
    foreign.write(adapter, tmp_path / "folder", "peft-sparseft", base=base)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "folder").eval()
    torch.testing.assert_close(tools.logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    # The folder is read without a base, and what PEFT then saves is the same adapter still.
    assert Adapter.load(tmp_path / "folder").equals(_filled(adapter))
    model.save_pretrained(tmp_path / "again")
    again = Adapter.load(tmp_path / "again")
    assert again.equals(_filled(adapter))
    assert again.metadata.method == adapter.metadata.method
    assert adapter_of(model).equals(_filled(adapter))
    # Merged by PEFT, it is what sparseft writes into the weights, bit for bit.
    plain = tools.tiny(kind).model
    with sparseft.Composer(plain, {"own": adapter}).composed(["own"]):
        written = {n: p.clone() for n, p in plain.named_parameters()}
    for name, parameter in model.merge_and_unload().named_parameters():
        assert torch.equal(parameter, written[name]), name


def test_a_tied_embedding_is_refused_where_peft_would_split_it(tools, tmp_path):
    table = torch.zeros(60, 16)
    table[3, 4] = 0.5
    adapter = Adapter({"transformer.wte.weight": SparseDiff.from_dense(table)})
    foreign.write(adapter, tmp_path, "peft-sparseft", base=tools.tiny("gpt2").model)
    with pytest.raises(AttachError, match="'transformer.wte.weight' is tied to 'lm_head.weight'"):
        peft.PeftModel.from_pretrained(tools.tiny("gpt2").model, tmp_path)


def _filled(adapter):
    return Adapter(
        {n: d for n, d in adapter.items() if d.nnz}, dense=dict(adapter.dense), name=adapter.name
    )


def test_trained_by_peft_becomes_ours(tools, tmp_path):
    made = tools.tiny("bert")
    config = SparseFtConfig(
        target_modules=["query", "word_embeddings"], density=0.1, biases=True,
        task_type="SEQ_CLS", seed=3,
    )  # fmt: skip
    model = peft.get_peft_model(made.model, config)
    tools.scramble(model)
    wanted = tools.logits(model.eval(), made.batch)
    model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert sorted(adapter.dense) == ["classifier.bias", "classifier.weight"]
    assert any("word_embeddings" in n for n in adapter)
    assert any(n.endswith("bias") for n in adapter)
    assert (adapter.metadata.method, adapter.metadata.density) == ("random", 0.1)
    own = peft.get_peft_model_state_dict(model)
    for name, diff in adapter.items():
        module, _, attr = name.rpartition(".")
        part = "sparseft" if attr == "weight" else "sparseft_bias"
        assert torch.equal(diff.values, own[f"base_model.model.{module}.{part}_values"])
        assert torch.equal(diff.indices, own[f"base_model.model.{module}.{part}_indices"])
    plain = tools.tiny("bert").model
    with sparseft.Composer(plain, {"x": adapter}).composed(["x"]):
        torch.testing.assert_close(tools.logits(plain, made.batch), wanted, rtol=1e-5, atol=1e-5)


def test_the_table_of_a_targeted_embedding_is_not_in_the_file(tools, tmp_path):
    made = tools.tiny("llama")
    config = SparseFtConfig(target_modules=["embed_tokens", "q_proj"], nnz=50)
    model = peft.get_peft_model(made.model, config)
    tools.scramble(model)
    model.save_pretrained(tmp_path)
    assert Adapter.load(tmp_path).nnz == 50
    assert not Adapter.load(tmp_path).dense
    loaded = peft.PeftModel.from_pretrained(tools.tiny("llama").model, tmp_path)
    assert torch.equal(tools.logits(loaded, made.batch), tools.logits(model, made.batch))


def test_dtypes_and_what_peft_cannot_hold(tools, tmp_path):
    base = tools.tiny("llama").model
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = torch.zeros(16, 16)
    delta[3, 4], delta[5, 6] = 0.25, -0.1
    half = Adapter({name: SparseDiff.from_dense(delta.bfloat16())})
    foreign.write(half, tmp_path / "bf16", "peft-sparseft", base=base)
    assert Adapter.load(tmp_path / "bf16").equals(half)
    loaded = peft.PeftModel.from_pretrained(tools.tiny("llama").model, tmp_path / "bf16")
    assert torch.equal(adapter_of(loaded)[name].values, half[name].values.float())
    for adapter, said in (
        (Adapter({name: SparseDiff.from_dense(delta, mode="set")}), "mode 'set'"),
        (Adapter({name: SparseDiff.from_dense(delta.double() / 3)}), "float64"),
        (Adapter({"model.norm.weight": SparseDiff.from_dense(delta[5])}), "LlamaRMSNorm"),
        (Adapter({}, dense={"lm_head.weight": torch.ones(60, 16)}), "no entries to write"),
        (Adapter({"lone": SparseDiff.from_dense(delta[5])}), "neither the weight nor the bias"),
    ):
        with pytest.raises(AdapterFormatError, match=said):
            foreign.write(adapter, tmp_path / "no", "peft-sparseft", base=base)
        assert not (tmp_path / "no" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, t, k: c["entries"].pop(next(iter(c["entries"]))), "base"),
        (lambda c, t, k: c["entries"].update({"x.weight": {"nnz": 1, "shape": [2]}}), "x.weight"),
        (lambda c, t, k: next(iter(c["entries"].values())).update(nnz=1), "entries in"),
        (lambda c, t, k: next(iter(c["entries"].values())).update(shape=[2, 2]), "do not fit"),
        (lambda c, t, k: c.update(entries=[1]), "no mapping"),
        (lambda c, t, k: t.pop(k), "lacks sparseft_indices"),
        (lambda c, t, k: t.update({k: t[k] - 100_000}), "do not fit"),
        (lambda c, t, k: t.update({k: t[k].clone().fill_(1)}), "do not fit"),
        (lambda c, t, k: t.update({k[:-7] + "values": t[k].float() * torch.inf}), "finite"),
        (lambda c, t, k: t.update({"x.lora_A.weight": torch.ones(2, 2)}), "no tensor of"),
    ],
)  # fmt: skip
def test_hostile_folders(tools, tmp_path, change, said):
    from safetensors.torch import load_file, save_file

    config = SparseFtConfig(target_modules=["query"], density=0.1)
    peft.get_peft_model(tools.tiny("bert").model, config).save_pretrained(tmp_path)
    held = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(held, tensors, next(n for n in tensors if n.endswith("indices")))
    (tmp_path / "adapter_config.json").write_text(json.dumps(held))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises((AdapterFormatError, sparseft.errors.OptionError), match=said):
        Adapter.load(tmp_path)


def test_convert_and_inspect(tools, tmp_path, capsys):
    from sparseft.cli.main import main

    adapter, _, _ = trained(tools, "bert", exclude=["classifier.*"])
    adapter.save(tmp_path / "ours")
    assert main(
        ["convert", str(tmp_path / "ours"), str(tmp_path / "folder"), "--to", "peft-sparseft"]
    ) in (0, None)
    assert main(["inspect", str(tmp_path / "folder")]) in (0, None)
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "back")]) in (0, None)
    assert Adapter.load(tmp_path / "back").equals(_filled(adapter))
    assert f"{adapter.nnz:,}" in capsys.readouterr().out


def test_shira_stays_as_the_way_without_registration(tools, tmp_path):
    """Weights of nn.Linear, zeros added to reach SHiRA's counts; the diffs survive."""
    made = tools.tiny("llama")
    model = peft.get_peft_model(made.model, SparseFtConfig(target_modules=["q_proj"], density=0.1))
    tools.scramble(model)
    adapter = adapter_of(model)
    foreign.write(adapter, tmp_path, "peft-shira", base=tools.tiny("llama").model)
    loaded = peft.PeftModel.from_pretrained(tools.tiny("llama").model, tmp_path)
    torch.testing.assert_close(
        tools.logits(loaded, made.batch), tools.logits(model, made.batch), rtol=1e-5, atol=1e-5
    )
    embedding = Adapter({"e.embed.weight": SparseDiff.from_dense(torch.eye(3))})
    with pytest.raises(AdapterFormatError, match=r"only the weights of\s+nn.Linear"):
        foreign.write(embedding, tmp_path / "no", "peft-shira")


@pytest.mark.slow
def test_folders_are_read_and_written_without_peft(tools, tmp_path):
    adapter, _, _ = trained(tools, "bert", exclude=["classifier.*"])
    foreign.write(adapter, tmp_path / "folder", "peft-sparseft")
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import sparseft\n"
        "from sparseft.io import foreign\n"
        f"a = sparseft.Adapter.load({str(tmp_path / 'folder')!r})\n"
        f"foreign.write(a, {str(tmp_path / 'two')!r}, 'peft-sparseft')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Adapter.load(tmp_path / "two").equals(_filled(adapter))
