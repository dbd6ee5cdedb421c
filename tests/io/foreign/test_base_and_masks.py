"""Where shapes come from (`Base`), and masks: patterns, or an adapter with base and tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseft.adapter import Adapter
from sparseft.diff import SparsePattern
from sparseft.errors import AdapterFormatError, BaseMismatchError, OptionError
from sparseft.io import foreign
from sparseft.io.foreign.names import parameter_name

OUTPUT = "roberta.encoder.layer.0.output.dense"
WEIGHT = f"{OUTPUT}.weight"


def _only_config(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def _shards(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    return tmp_path / "shards"


def _pickle(model: Any, tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    return tmp_path / "bin"


SOURCES: dict[str, Callable[[Path, Any, Path], Any]] = {
    "folder": lambda base, model, tmp: base,
    "file": lambda base, model, tmp: base / "model.safetensors",
    "text": lambda base, model, tmp: str(base),
    "shards": lambda base, model, tmp: _shards(model, tmp),
    "pickle": lambda base, model, tmp: _pickle(model, tmp),
    "model": lambda base, model, tmp: model,
    "tensors": lambda base, model, tmp: model.state_dict(),
    "shapes": lambda base, model, tmp: {n: tuple(p.shape) for n, p in model.named_parameters()},
    "configuration": lambda base, model, tmp: model.config,
    "config.json": lambda base, model, tmp: _only_config(base, tmp),
}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_shapes_and_values_come_from_many_places(
    base: Path, model: Any, tmp_path: Path, source: str
):
    found = foreign.Base(SOURCES[source](base, model, tmp_path))
    assert found.shape(WEIGHT, "x") == (16, 24)
    assert found.shape(WEIGHT.removeprefix("roberta."), "x") == (16, 24)
    with pytest.raises(BaseMismatchError, match="x: base .* has no parameter 'nothing'"):
        found.shape("nothing", "x")
    value = found.tensor(WEIGHT)
    if source in ("shapes", "configuration", "config.json"):
        assert value is None
    else:
        assert torch.equal(value, dict(model.named_parameters())[WEIGHT])
    if source in ("folder", "model", "configuration", "config.json"):
        assert found.kind(WEIGHT) == "Linear"
        assert found.kind("roberta.embeddings.word_embeddings.weight") == "Embedding"


def test_a_tied_head_that_no_checkpoint_stores(tiny: ModuleType, tmp_path: Path):
    base = tiny.save_tiny(tmp_path / "mlm")
    assert foreign.Base(base).shape("lm_head.decoder.weight", "x")[1] == 16


def test_a_configuration_runs_no_code(base: Path, tmp_path: Path):
    """Neither what it names of transformers, unless a model, nor code beside it."""
    folder = _only_config(base, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["set_seed"]
    (folder / "config.json").write_text(json.dumps(config))
    assert foreign.Base(folder).shape(WEIGHT, "x") == (16, 24)
    (folder / "bomb.py").write_text("raise SystemExit('code beside a configuration ran')")
    config |= {"model_type": "bomb", "auto_map": {"AutoConfig": "bomb.Bomb"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFormatError, match="no model can be laid out"):
        foreign.Base(folder).shape(WEIGHT, "x")


def test_what_is_no_base(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no folder /nope/base"):
        foreign.Base("/nope/base")
    with pytest.raises(AdapterFormatError, match=r"neither model\.safetensors nor config\.json"):
        foreign.Base(tmp_path)
    with pytest.raises(TypeError, match="base is int"):
        foreign.Base(3)
    for text in ("{", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(AdapterFormatError, match=r"index\.json is damaged"):
            foreign.Base(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(AdapterFormatError, match="is damaged"):
        foreign.Base(tmp_path)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("base_model.model.bert.w", "bert.w"),
        ("module.bert.w", "bert.w"),
        ("module.base_model.model._orig_mod.bert._fsdp_wrapped_module.q.base_layer.w", "bert.q.w"),
        ("base_model.model.base_model.model.x.w", "x.w"),
        ("encoder.module.w", "encoder.module.w"),
        ("module", "module"),
        ("base_model.model", "base_model.model"),
    ],
)
def test_names(key: str, name: str):
    assert parameter_name(key) == name
    assert parameter_name(key, module=True) == f"{name}.weight"


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.rand(16, 24, generator=torch.Generator().manual_seed(0)) < 0.2


@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors"])
@pytest.mark.parametrize("key", [OUTPUT, WEIGHT, f"base_model.model.{OUTPUT}"])
def test_masks_become_patterns(mask: torch.Tensor, tmp_path: Path, ending: str, key: str):
    file = tmp_path / f"masks.{ending}"
    masks = {key: mask, "x.bias": torch.tensor([True, False])}
    save_file(masks, file) if ending == "safetensors" else torch.save(masks, file)
    patterns = foreign.read_masks(file)
    assert list(patterns) == sorted([WEIGHT, "x.bias"])
    assert patterns[WEIGHT].equals(SparsePattern.from_mask(mask))


def test_masks_alone_are_no_adapter(mask: torch.Tensor, base: Path, tmp_path: Path):
    torch.save({WEIGHT: mask}, tmp_path / "m.pt")
    with pytest.raises(OptionError, match=r"where, but not what.*--base and --tuned"):
        Adapter.load(tmp_path / "m.pt")
    with pytest.raises(OptionError, match="has no weights for"):
        foreign.read(tmp_path / "m.pt", base={WEIGHT: (16, 24)}, tuned=base)
    with pytest.raises(BaseMismatchError, match=r"shape \(16, 24\), but .* has \(24, 16\)"):
        foreign.read_masks(tmp_path / "m.pt", base={WEIGHT: (24, 16)})


def test_masks_with_both_models_are_an_adapter(
    mask: torch.Tensor, base: Path, model: Any, tmp_path: Path
):
    torch.save({OUTPUT: mask}, tmp_path / "m.pt")
    old = dict(model.named_parameters())[WEIGHT].detach().clone()
    with torch.no_grad():
        dict(model.named_parameters())[WEIGHT].add_(torch.randn(16, 24))
    adapter = foreign.read(tmp_path / "m.pt", base=base, tuned=model).adapter
    wanted = (dict(model.named_parameters())[WEIGHT].detach() - old) * mask
    assert torch.equal(adapter[WEIGHT].to_dense(), wanted)
    assert list(adapter.metadata.fingerprint.tensors) == [WEIGHT]


def test_a_base_decides_whether_a_name_is_a_modules(tmp_path: Path):
    torch.save({"a": torch.ones(2, 2, dtype=torch.bool)}, tmp_path / "m.pt")
    assert list(foreign.read_masks(tmp_path / "m.pt")) == ["a.weight"]
    assert list(foreign.read_masks(tmp_path / "m.pt", base={"a": (2, 2)})) == ["a"]


def test_damaged_masks(tmp_path: Path):
    file = tmp_path / "m.pt"
    torch.save({"a": torch.ones(1, dtype=torch.bool).expand(2**40)}, file)
    with pytest.raises(AdapterFormatError, match="claims 1,099,511,627,776 elements"):
        foreign.read_masks(file)
    two = torch.ones(2, 2, dtype=torch.bool)
    torch.save({"a": two, "a.weight": two}, file)
    with pytest.raises(AdapterFormatError, match="two masks of parameter 'a.weight'"):
        foreign.read_masks(file)
    save_file({"a": two, "b": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(
        AdapterFormatError, match=r"torch.float32, wanted torch.bool|not an adapter"
    ):
        foreign.read_masks(tmp_path / "m.safetensors")


def test_what_is_nothing_known(tmp_path: Path, linear_adapter: Adapter):
    torch.save({"epoch": 3, "model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(AdapterFormatError, match="no known format .* with 'epoch', 'model'"):
        Adapter.load(tmp_path / "checkpoint.pt")
    (tmp_path / "empty").mkdir()
    assert foreign.detect(tmp_path / "empty") is None
    with pytest.raises(AdapterFormatError, match="no adapter of a known foreign format"):
        foreign.read(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="holds no adapter.safetensors"):
        Adapter.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        foreign.read(tmp_path / "nope")
    # Ours stays ours, whatever lies beside it.
    linear_adapter.save(tmp_path / "ours")
    (tmp_path / "ours" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert foreign.detect(tmp_path / "ours") is None
    assert Adapter.load(tmp_path / "ours").equals(linear_adapter)
