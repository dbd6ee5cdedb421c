"""`SparseFtConfig`: what it takes, refuses, saves, and which entries it chooses."""

from __future__ import annotations

import json

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.18,<0.22'")

import sparseft  # noqa: E402
from sparseft.errors import (  # noqa: E402
    AdapterFormatError,
    AttachError,
    BaseMismatchError,
    MaskError,
    OptionError,
    SparseFtError,
    UnknownNameError,
)
from sparseft.peft import SparseFtConfig, adapter_of  # noqa: E402


def patterns(model, name="default"):
    return {n: d.pattern for n, d in adapter_of(model, name).items()}


def test_json_round_trip(tmp_path):
    config = SparseFtConfig(
        target_modules=["v", "q"], exclude_modules="x.*", layers_to_transform=[0, 1],
        modules_to_save=["head"], nnz=7, selection="low_rank", selection_options={"rank": 3},
        scope="tensor", seed=5, biases=True, task_type="SEQ_CLS",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    held = json.loads((tmp_path / "adapter_config.json").read_text())
    assert held["peft_type"] == "SPARSEFT"
    assert held["target_modules"] == ["q", "v"]  # sorted: the same configuration, the same bytes
    assert "masks" not in held
    assert "adapter" not in held
    for reader in (peft.PeftConfig, SparseFtConfig):
        again = reader.from_pretrained(tmp_path)
        assert type(again) is SparseFtConfig
        assert again == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "density and nnz are both None; give one"),
        ({"density": 0.1, "nnz": 3}, "density=0.1 and nnz=3 are both given"),
        ({"density": 0.0}, r"density is 0.0, wanted a fraction in \(0, 1\]"),
        ({"density": 1.5}, r"density is 1.5, wanted a fraction in \(0, 1\]"),
        ({"nnz": 0}, "nnz is 0, wanted a number of entries"),
        ({"nnz": 3, "scope": "globl"}, "scope is 'globl'.*Did you mean 'global'"),
        ({"masks": {}, "adapter": 1}, "masks and adapter are given"),
        ({"masks": {}, "nnz": 4}, "nnz is given together with masks"),
        ({"nnz": 1, "target_modules": "q.*", "layers_to_transform": 1}, "a regular expression"),
        ({"nnz": 1, "target_modules": ["q"], "layers_pattern": "h"}, "without layers_to_transform"),
        ({"nnz": 1, "selection_options": {"base": torch.nn.Linear(1, 1)}}, "cannot be saved"),
    ],
    ids=lambda value: None if isinstance(value, str) else "+".join(value) or "nothing",
)
def test_bad_arguments(options, said):
    with pytest.raises(OptionError, match=said):
        SparseFtConfig(**options)


@pytest.mark.parametrize(
    "entries",
    [
        [], {"q.weight": 3}, {"q.weight": {"nnz": "3", "shape": [2, 2]}},
        {"q.weight": {"nnz": 3}}, {"q.weight": {"nnz": 5, "shape": [2, 2]}},
        {"q.weight": {"nnz": 3, "shape": [-2, 2]}}, {"q.weight": {"nnz": True, "shape": [2, 2]}},
        {"q.weight": {"nnz": 1, "shape": [2**40, 2**40]}},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_entries(entries):
    with pytest.raises(AdapterFormatError, match=r"entries|shape"):
        SparseFtConfig(entries=entries)


def small():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4), torch.nn.LayerNorm(4)
    )


@pytest.mark.parametrize("selection", ["random", "weight_magnitude", "low_rank"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_entries_are_those_that_select_gives(selection, scope):
    options = {"rank": 2} if selection == "low_rank" else {}
    model, wanted = small(), None
    wanted = sparseft.select(
        model, selection, nnz=20, scope=scope, seed=7, include=["0.weight", "2.weight"], **options
    )
    config = SparseFtConfig(
        target_modules=["0", "2"], nnz=20, selection=selection, scope=scope, seed=7,
        selection_options=options,
    )  # fmt: skip
    got = patterns(peft.get_peft_model(model, config))
    assert got.keys() == {n for n, p in wanted.items() if p.nnz}
    assert all(got[n].equals(wanted[n]) for n in got)
    assert config.entries == {
        n: {"nnz": p.nnz, "shape": list(p.shape)} for n, p in sorted(got.items())
    }


def test_seeds_differ_and_repeat():
    def of(seed):
        return patterns(peft.get_peft_model(small(), SparseFtConfig(nnz=12, seed=seed)))

    assert all(p.equals(of(1)[n]) for n, p in of(1).items())
    assert any(n not in of(2) or not p.equals(of(2)[n]) for n, p in of(1).items())


def test_one_configuration_for_several_models_selects_in_each():
    config = SparseFtConfig(target_modules=["0", "2"], nnz=12, selection="weight_magnitude")
    first = small()
    second = small()
    with torch.no_grad():
        second[0].weight.copy_(first[0].weight.flip(0))
    one = patterns(peft.get_peft_model(first, config))
    two = patterns(peft.get_peft_model(second, config))
    assert not one["0.weight"].equals(two["0.weight"])


def test_masks_by_mapping_and_by_file(tmp_path):
    masks = sparseft.select(small(), "random", density=0.3, scope="row")
    masks.save(tmp_path / "m.safetensors")
    for given in (masks, tmp_path / "m.safetensors", {n: p.to_mask() for n, p in masks.items()}):
        model = peft.get_peft_model(small(), SparseFtConfig(masks=given))
        got = patterns(model)
        assert got.keys() == {n for n, p in masks.items() if p.nnz}
        assert "3.weight" in got  # the LayerNorm's, too
        assert all(p.equals(masks[n]) for n, p in got.items())
    some = patterns(peft.get_peft_model(small(), SparseFtConfig(masks=masks, target_modules=["2"])))
    assert {n.partition(".")[0] for n in some} == {"2"}


def test_an_adapter_gives_values_and_heads():
    from sparseft import Adapter, SparseDiff

    model = small()
    adapter = Adapter(
        {"0.weight": SparseDiff.from_dense(torch.eye(8)[:, :6] * 0.5)},
        dense={"2.weight": torch.ones(4, 8), "2.bias": torch.zeros(4)},
    )
    x = torch.randn(2, 6)
    with torch.no_grad():
        expected = small()
        expected[0].weight += torch.eye(8)[:, :6] * 0.5
        expected[2].weight.fill_(1)
        expected[2].bias.fill_(0)
    made = peft.get_peft_model(model, SparseFtConfig(adapter=adapter))
    torch.testing.assert_close(made(x), expected(x))
    assert adapter_of(made).equals(adapter)
    # Values are copies: training does not change the adapter that was given.
    with torch.no_grad():
        next(p for p in made.parameters() if p.requires_grad).add_(1)
    assert adapter["0.weight"].values.eq(0.5).all()


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"target_modules": ["0"], "nnz": 10_000}, MaskError, "10,000"),
        ({"target_modules": ["1"], "nnz": 2}, AttachError, "a ReLU, which has no weight"),
        ({"target_modules": ["0"], "nnz": 2, "selection": "randm"}, UnknownNameError, "random"),
        ({"target_modules": ["0"], "nnz": 2, "selection": "magnitude"}, SparseFtError, "base"),
        (
            {"target_modules": ["0"], "nnz": 2, "selection": "fisher"},
            OptionError,
            r"batches=.*SparseFtConfig\(masks=sparseft.select\(model, 'fisher'",
        ),
        ({"masks": {"9.weight": torch.ones(2, 2).bool()}}, MaskError, "no '9.weight'"),
        ({"masks": {"0.weight": torch.ones(2, 2).bool()}}, MaskError, r"\(2, 2\)"),
        ({"masks": 3}, OptionError, "masks is int"),
        ({"adapter": 3}, OptionError, "adapter is int"),
        ({"entries": {"7.weight": {"nnz": 1, "shape": [2, 2]}}}, BaseMismatchError, "'7.weight'"),
        ({"entries": {"0.weight": {"nnz": 1, "shape": [2, 2]}}}, BaseMismatchError, r"\(8, 6\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_changed(config, error, said):
    model = small()
    with pytest.raises(error, match=said):
        peft.get_peft_model(model, SparseFtConfig(**config))
    assert [type(m) for m in model] == [type(m) for m in small()]


def test_no_module_that_matches_is_said_by_peft():
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(small(), SparseFtConfig(target_modules=["absent"], nnz=2))


def test_tied_weights_are_refused_by_name(tools):
    made = tools.tiny("gpt2")
    with pytest.raises(AttachError, match="'transformer.wte.weight' is tied to 'lm_head.weight'"):
        peft.get_peft_model(made.model, SparseFtConfig(target_modules=["wte"], nnz=4))
    with pytest.raises(AttachError, match="tied"):
        peft.get_peft_model(tools.tiny("t5").model, SparseFtConfig(target_modules="shared", nnz=4))


def test_layers_and_exclusions(tools):
    config = SparseFtConfig(
        target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=["v_proj"],
        nnz=9,
    )  # fmt: skip
    model = peft.get_peft_model(tools.tiny("llama").model, config)
    assert list(config.entries) == ["model.layers.1.self_attn.q_proj.weight"]
    assert model.targeted_module_names == ["model.layers.1.self_attn.q_proj"]


def test_laid_out_but_not_loaded_does_not_run(tmp_path):
    peft.get_peft_model(small(), SparseFtConfig(nnz=9)).save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    model = peft.get_peft_model(small(), config)
    with pytest.raises(AttachError, match="its file has not been loaded.*config.entries = None"):
        model(torch.randn(2, 6))
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.entries = None
    assert patterns(peft.get_peft_model(small(), config))


def test_a_saved_configuration_opens_no_other_file(tmp_path):
    SparseFtConfig(nnz=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    held = json.loads(file.read_text())
    for name in ("masks", "adapter"):
        for kept in (held, {k: v for k, v in held.items() if k != "peft_type"}):
            file.write_text(json.dumps({**kept, "nnz": None, name: "/etc/passwd"}))
            with pytest.raises(OptionError, match=f"a saved configuration gives {name}='/etc"):
                SparseFtConfig.from_pretrained(tmp_path)


def test_a_target_inside_a_module_trained_whole_is_refused(tools):
    made = tools.tiny("bert")
    config = SparseFtConfig(
        masks={"classifier.weight": torch.ones(3, 16).bool()}, modules_to_save=["classifier"]
    )
    with pytest.raises(OptionError, match="'classifier' in modules_to_save is trained whole"):
        peft.get_peft_model(made.model, config)


def test_torchs_fast_path_would_skip_the_adapter():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    config = SparseFtConfig(target_modules=["linear1"], nnz=20)
    model = torch.nn.Sequential(layer)
    with pytest.raises(AttachError, match="fast path reads the weight past"):
        peft.get_peft_model(model, config)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        adapted = peft.get_peft_model(model, config).eval()
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            before = adapted(x)
            next(p for p in adapted.parameters() if p.requires_grad).normal_()
            assert not torch.equal(adapted(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_an_adapter_of_another_base_is_refused():
    model = small()
    own = adapter_of(peft.get_peft_model(model, SparseFtConfig(target_modules=["0"], nnz=9)))
    other = small()
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    peft.get_peft_model(small(), SparseFtConfig(adapter=own))
    with pytest.raises(BaseMismatchError, match=r"'0.weight' is not the base tensor"):
        peft.get_peft_model(other, SparseFtConfig(adapter=own))


def test_masks_of_attach_are_not_frozen_without_a_word():
    model = small()
    sparse = sparseft.attach(model, sparseft.select(model, "random", nnz=5, include=["0.weight"]))
    with pytest.raises(AttachError, match=r"'0' has masks of sparseft.attach.*detach"):
        peft.get_peft_model(model, SparseFtConfig(target_modules=["2"], nnz=5))
    sparse.detach(restore=False)
    peft.get_peft_model(model, SparseFtConfig(target_modules=["2"], nnz=5))
