"""A folder of PEFT's remembers the base by samples of it: another one is refused, a cast is not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.18,<0.22'")

from sparseft.errors import AdapterFormatError, BaseMismatchError  # noqa: E402
from sparseft.fingerprint import fingerprint_tensor  # noqa: E402
from sparseft.io import foreign  # noqa: E402
from sparseft.peft import SparseFtConfig, adapter_of  # noqa: E402


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))


CONFIG = {"target_modules": ["0", "2"], "nnz": 40, "biases": True}


@pytest.fixture(params=["by peft", "by us"])
def folder(request, tmp_path, tools):
    model = peft.get_peft_model(net(), SparseFtConfig(**CONFIG))
    tools.scramble(model)
    if request.param == "by peft":
        model.save_pretrained(tmp_path / "f")
    else:
        foreign.write(adapter_of(model), tmp_path / "f", "peft-sparseft", base=net())
    return tmp_path / "f"


def test_the_same_base_and_casts_of_it_are_taken(folder):
    said = json.loads((folder / "adapter_config.json").read_text())["base_samples"]
    assert sorted(said) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    one = fingerprint_tensor("0.weight", net()[0].weight)
    assert said["0.weight"] == {"dtype": one.dtype, "samples": list(one.samples)}
    for base in (net(), net().bfloat16(), net().double()):
        model = peft.PeftModel.from_pretrained(base, folder)
        assert model.peft_config["default"].base_samples == said
    # Beside another adapter, also one that is merged.
    model = peft.get_peft_model(net(), SparseFtConfig(**CONFIG, seed=4))
    model.load_adapter(folder, "second")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * p.requires_grad
    model.merge_adapter(["default"])
    model.load_adapter(folder, "third")


def test_another_base_is_refused_before_it_is_changed_unless_wanted(folder):
    other = net(seed=5)
    before = list(other.modules())
    with pytest.raises(BaseMismatchError, match=r"'0.bias' is not the base.*base_samples = None"):
        peft.PeftModel.from_pretrained(other, folder)
    assert list(other.modules()) == before
    config = SparseFtConfig.from_pretrained(folder)
    config.base_samples = None
    peft.PeftModel.from_pretrained(other, folder, config=config)


def test_a_model_still_to_be_filled_is_not_compared(folder, monkeypatch):
    for flag, value in (
        ("ACCELERATE_USE_FSDP", "true"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "True"),
        ("LOCAL_RANK", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(flag, value)
    peft.PeftModel.from_pretrained(net(seed=5), folder)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(BaseMismatchError):
        peft.PeftModel.from_pretrained(net(seed=5), folder)


def test_folders_without_samples_are_taken(folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["base_samples"]
    path.write_text(json.dumps(config))
    peft.PeftModel.from_pretrained(net(seed=5), folder)


@pytest.mark.parametrize(
    "given",
    [[], {"0.weight": 3}, {"0.weight": {"samples": [1.0]}}, {"0.weight": {"samples": ["a"] * 16}},
     {"0.weight": {"samples": [float("nan")] * 16}}, {"0.weight": {"samples": [True] * 16}},
     {"0.weight": {"samples": [10**400] * 16}}],
)  # fmt: skip
def test_hostile_samples(given):
    with pytest.raises(AdapterFormatError, match="base_samples"):
        SparseFtConfig(nnz=3, base_samples=given)
