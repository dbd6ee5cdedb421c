"""The README's Python examples run as written, in order, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparseft
from sparseft.training import LoopTrainer

README = Path(__file__).resolve().parent.parent / "README.md"


class Tiny(nn.Module):
    """An encoder and a head: what the examples' names refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.classifier(self.encoder(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_trainer(model: nn.Module, phase: Any) -> LoopTrainer:
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(16, generator=generator), "labels": i % 3} for i in range(32)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "x": torch.stack([row["x"] for row in batch]),
            "labels": torch.tensor([row["labels"] for row in batch]),
        }

    return LoopTrainer(
        model,
        rows,
        collate=collate,
        loss_fn=lambda model, batch: model(**batch)["loss"],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        steps=3,
        output_dir=phase.output_dir,
        batch_size=8,
        lr=1e-2,
        seed=phase.seed,
    )


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


def test_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("swahili", "quechua"):
        masks = sparseft.select(model, method="random", density=0.1, include=["encoder.*"])
        with sparseft.attach(model, masks) as attached:
            for leaf in attached.leaves.values():
                nn.init.normal_(leaf)
            attached.adapter(name).save(name)
    found = blocks()
    assert len(found) == 3, "a new example needs its names here"
    names: dict[str, Any] = {"torch": torch, "model": model, "make_trainer": make_trainer}
    for code in found:
        exec(compile(code, str(README), "exec"), names)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
    assert (tmp_path / "nli" / "adapter.safetensors").is_file()
    assert names["result"].adapter.nnz == names["result"].nnz > 0
    assert 0 < names["small"].nnz < names["large"].nnz
    assert names["large"].dense_path == names["result"].dense_path
