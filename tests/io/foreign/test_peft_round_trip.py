"""Against the installed PEFT: what it saves is read, and what is written it loads, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError, OptionError
from sparseft.io import foreign
from sparseft.io.foreign.names import parameter_name

peft = pytest.importorskip("peft", reason="PEFT is not installed (pip install 'peft>=0.21')")
if not hasattr(peft, "SupertuningConfig"):
    pytest.skip(
        f"PEFT {peft.__version__} has no Super-Tuning; wanted 0.21", allow_module_level=True
    )

pytestmark = pytest.mark.filterwarnings("ignore")


def effective(model: Any) -> dict[str, Tensor]:
    """Weights as PEFT computes with them, under the bare model's names."""
    model.merge_adapter()
    weights = {}
    for key, value in model.state_dict().items():
        if not any(part in key for part in ("shira_", "supertuning_", "lora_", "original_module")):
            weights[parameter_name(key).replace("modules_to_save.default.", "")] = value.clone()
    return weights


def saved(model: nn.Module, config: Any, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Put PEFT on the model, move everything it trains, save it; return folder and weights."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    name_or_path = model.config._name_or_path
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(name_or_path)
    return folder, effective(wrapped)


def shira(**options: Any) -> Any:
    return peft.ShiraConfig(
        r=1, target_modules=["query", "output.dense"], init_weights=False, **options
    )


def supertuning(**options: Any) -> Any:
    targets = ["query", "intermediate.dense"]
    return peft.SupertuningConfig(
        target_modules=targets, sparsity=0.9, init_weights=False, **options
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "shira": shira,
    "shira with head": lambda: shira(modules_to_save=["classifier"]),
    "super": supertuning,
    "super with head": lambda: supertuning(modules_to_save=["classifier"]),
    "super bottom": lambda: supertuning(select_top=False),
    "super without indices": lambda: supertuning(save_precomputed_indices=False),
    "super bottom without indices": lambda: supertuning(
        save_precomputed_indices=False, select_top=False
    ),
}


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("case", CONFIGS, ids=str)
def test_what_peft_saves_has_the_same_weights_here(
    model: Any, composed: Callable[[Adapter], dict[str, Tensor]], tmp_path: Path, case: str
):
    """Without --base: the configuration names a folder that is here."""
    before = {n: p.clone() for n, p in model.named_parameters()}
    folder, wanted = saved(model, CONFIGS[case](), tmp_path / "x")
    adapter = Adapter.load(folder)
    assert bool(adapter.dense) == ("head" in case)
    got = composed(adapter)
    assert any(not torch.equal(got[n], before[n]) for n in before)
    same(got, {n: wanted[n] for n in got})
    if "shira" in case:
        assert adapter["roberta.encoder.layer.0.output.dense.weight"].nnz == 16 + 24


@pytest.mark.parametrize("case", ["shira with head", "super", "super with head"])
@pytest.mark.parametrize("target", ["peft-shira", "peft-supertuning"])
def test_what_is_written_has_the_same_weights_there(
    model: Any, base: Path, tmp_path: Path, case: str, target: str
):
    folder, wanted = saved(model, CONFIGS[case](), tmp_path / "x")
    adapter = Adapter.load(folder)
    foreign.write(adapter, tmp_path / "y", target, base=base)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "y")
    same(effective(back), wanted)


@pytest.mark.parametrize("target", ["peft-shira", "peft-supertuning"])
def test_adapters_of_uneven_density_are_written(
    model: Any,
    composed: Callable[[Adapter], dict[str, Tensor]],
    linear_adapter: Adapter,
    tmp_path: Path,
    target: str,
):
    written = foreign.write(linear_adapter, tmp_path / "y", target)
    assert written.entries > linear_adapter.nnz  # PEFT gives all modules one r or sparsity
    assert f"{written.entries - linear_adapter.nnz:,} zeros" in written.added[0]
    wanted = composed(linear_adapter)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "y")
    same(effective(back), wanted)


def test_every_value_dtype_is_written(
    model: Any, composed: Callable[[Adapter], Any], linear_adapter: Adapter, tmp_path: Path
):
    for dtype in (torch.bfloat16, torch.float16):
        adapter = linear_adapter.to(dtype=dtype)
        foreign.write(adapter, tmp_path / str(dtype), "peft-shira")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / str(dtype))
        same(effective(back), composed(adapter))
    thirds = {
        n: SparseDiff.from_pattern(d.pattern, d.values.double() / 3)
        for n, d in linear_adapter.items()
    }
    with pytest.raises(AdapterFormatError, match="float64 values that float32"):
        foreign.write(Adapter(thirds), tmp_path / "z", "peft-shira")


def test_supra_is_refused_or_its_sparse_part_taken(model: Any, tmp_path: Path):
    config = supertuning(r=2, lora_alpha=4)
    folder, _ = saved(model, config, tmp_path / "x")
    with pytest.raises(AdapterFormatError, match=r"supertuning_lora_A.*Supra.*--drop-low-rank"):
        Adapter.load(folder)
    conversion = foreign.read(folder, drop_low_rank=True)
    assert conversion.lost == ("the low-rank part of 2 modules",)
    assert len(conversion.adapter) == 2


def _deltas(model: Any) -> dict[str, Tensor]:
    return {
        f"{parameter_name(name)}.weight": module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "scaling", {})
    }


LORAS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["query", "output.dense"], "lora_alpha": 3},
    "rslora": {"target_modules": ["query"], "use_rslora": True, "r": 4},
    "patterns": {
        "target_modules": ["query", "value"],
        "rank_pattern": {"value": 2},
        "alpha_pattern": {"self.value": 5, "query": 7},
    },
    "pattern from the start": {
        "target_modules": ["query", "value"],
        "alpha_pattern": {"^roberta.encoder.layer.0.attention.self.query": 9, "^query": 4},
    },
    "embedding": {"target_modules": ["word_embeddings", "key"]},
    "biases": {"target_modules": ["query"], "bias": "all"},
    "lora bias": {"target_modules": ["query"], "lora_bias": True},
    "head": {"target_modules": ["query"], "modules_to_save": ["classifier"]},
}


@pytest.mark.parametrize("case", LORAS, ids=str)
def test_lora_as_a_whole_is_pefts_change(
    model: Any, composed: Callable[[Adapter], dict[str, Tensor]], tmp_path: Path, case: str
):
    """At density 1 nothing is left out, so what comes is the change PEFT makes (up to rounding)."""
    folder, wanted = saved(model, peft.LoraConfig(**LORAS[case]), tmp_path / "x")
    conversion = foreign.read(folder, density=1.0)
    assert conversion.error == 0.0
    got = composed(conversion.adapter)
    for name, tensor in wanted.items():
        if name in got:
            torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6)
    moved = [n for n in got if not torch.equal(got[n], dict(model.named_parameters())[n])]
    assert moved


def test_lora_keeps_the_largest_entries_and_says_the_error(model: Any, tmp_path: Path):
    config = peft.LoraConfig(target_modules=["query", "output.dense"])
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path)
    deltas = {n: d.detach() for n, d in _deltas(wrapped).items()}
    conversion = foreign.read(tmp_path, nnz=100)
    adapter = conversion.adapter
    assert adapter.nnz == 100
    everything = torch.cat([deltas[n].flatten() for n in adapter.names]).abs()
    kept = torch.cat([adapter[n].values for n in adapter.names]).abs()
    torch.testing.assert_close(kept.sort().values, everything.sort().values[-100:])
    left = {n: d - adapter[n].to_dense() for n, d in deltas.items()}
    for name, error in conversion.errors.items():
        assert error == pytest.approx(float(left[name].norm() / deltas[name].norm()), rel=1e-4)
    total = [torch.cat([t[n].flatten() for n in adapter.names]).norm() for t in (left, deltas)]
    assert conversion.error == pytest.approx(float(total[0] / total[1]), rel=1e-4)
    assert adapter.metadata.extra["converted"]["error"] == conversion.error
    smaller = foreign.read(tmp_path, density=0.01).error
    assert smaller > conversion.error > 0


def test_lora_of_conv1d(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    gpt = GPT2LMHeadModel(config)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(gpt, peft.LoraConfig(target_modules=["c_attn"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path)
    (name,) = (adapter := foreign.read(tmp_path, density=1.0).adapter)
    assert tuple(adapter[name].shape) == (16, 48)  # as Conv1D stores it: inputs first
    torch.testing.assert_close(adapter[name].to_dense(), _deltas(wrapped)[name].detach())


def test_lora_without_a_number_of_entries_says_what_to_do(model: Any, tmp_path: Path):
    folder, _ = saved(model, peft.LoraConfig(target_modules=["query"]), tmp_path / "x")
    with pytest.raises(OptionError, match=r"lossy.*--density 0.01"):
        Adapter.load(folder)
    for bad in ({"density": 0.1, "nnz": 3}, {"density": 1.5}, {"nnz": 0}, {"nnz": 10**6}):
        with pytest.raises(OptionError, match="wanted|got both"):
            foreign.read(folder, **bad)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is set: DoRA rescales"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "'pissa': it was trained on a changed base"),
    "OLoRA": ({"init_lora_weights": "olora"}, "'olora': it was trained on a changed base"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_kinds_of_lora_that_are_something_else_are_refused_by_name(
    model: Any, tmp_path: Path, case: str
):
    options, message = REFUSED[case]
    config = peft.LoraConfig(target_modules=["query"], **options)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match=message):
        foreign.read(tmp_path, density=0.1)


def test_other_kinds_of_peft_are_refused_by_name(model: Any, tmp_path: Path):
    configs = {
        "IA3": peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
        "LOHA": peft.LoHaConfig(target_modules=["query"]),
        "LN_TUNING": peft.LNTuningConfig(target_modules=["LayerNorm"]),
    }
    for kind, config in configs.items():
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / kind)
        with pytest.raises(AdapterFormatError, match=f"peft_type '{kind}' cannot be represented"):
            Adapter.load(tmp_path / kind)
