"""A tiny base on disk, adapters of it, and folders of foreign formats written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.diff import SparseDiff

QUERY = "roberta.encoder.layer.0.attention.self.query"
VALUE = "roberta.encoder.layer.0.attention.self.value"
OUTPUT = "roberta.encoder.layer.0.output.dense"  # 16 x 24: rows and columns differ


@pytest.fixture(scope="session")
def base(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny classifier."""
    return tiny.save_tiny(tmp_path_factory.mktemp("base"), num_labels=3)


@pytest.fixture
def model(base: Path) -> Any:
    """A fresh copy of that classifier, in memory."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(base).eval()


def random_diff(shape: tuple[int, ...], seed: int, density: float = 0.2) -> SparseDiff:
    rng = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=rng) < density
    return SparseDiff.from_dense(torch.randn(shape, generator=rng), keep)


@pytest.fixture
def linear_adapter() -> Adapter:
    """Diffs of three linear layers, of different shapes and densities."""
    return Adapter(
        {
            f"{QUERY}.weight": random_diff((16, 16), 1),
            f"{VALUE}.weight": random_diff((16, 16), 2, 0.05),
            f"{OUTPUT}.weight": random_diff((16, 24), 3, 0.3),
        },
        name="linear",
        metadata=AdapterMetadata(base_name="org/tiny"),
    )


@pytest.fixture
def with_head(linear_adapter: Adapter) -> Adapter:
    """The same with a whole head."""
    rng = torch.Generator().manual_seed(5)
    head = {
        "classifier.dense.weight": torch.randn(16, 16, generator=rng),
        "classifier.dense.bias": torch.randn(16, generator=rng),
        "classifier.out_proj.weight": torch.randn(3, 16, generator=rng),
        "classifier.out_proj.bias": torch.randn(3, generator=rng),
    }
    return Adapter(dict(linear_adapter.items()), name="head", dense=head)


def write_peft(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, pickle: bool = False
) -> Path:
    """Write a folder as PEFT does; keys of ``tensors`` get its prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(dict(config)))
    named = {f"base_model.model.{k}": t.clone().contiguous() for k, t in tensors.items()}
    if pickle:
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def peft_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(config: Mapping[str, Any], tensors: Mapping[str, Tensor], **options: Any) -> Path:
        return write_peft(tmp_path / "foreign", config, tensors, **options)

    return make


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter of a model."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.fixture
def composed(model: Any) -> Callable[[Adapter], dict[str, Tensor]]:
    """Weights of the tiny classifier with an adapter applied."""

    def apply(adapter: Adapter) -> dict[str, Tensor]:
        from sparseft.composition import Composer

        with Composer(model, {"a": adapter}, dense="require").composed(["a"]):
            return weights_of(model)

    return apply
