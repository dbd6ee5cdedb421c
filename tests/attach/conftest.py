"""Small models, masks and checks for the tests of attach."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyLM(nn.Module):
    """Tied embedding and head, norm, attention, convolution: every tier and every kind of read."""

    def __init__(self, vocab: int = 23, width: int = 8) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up = nn.Linear(width, 3 * width)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, vocab)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.emb(ids))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = h + self.down(self.act(self.up(h)))
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.head(h)


def make_tiny(dtype: torch.dtype = torch.float32) -> TinyLM:
    """Return the same model at each call."""
    torch.manual_seed(0)
    return TinyLM().to(dtype)


def lm_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return a loss in which every parameter takes part."""
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def masks_of(model: nn.Module, density: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Return a random mask for every parameter by name, at least one entry each."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, parameter in model.named_parameters():
        mask = torch.rand(parameter.shape, generator=generator) < density
        mask.view(-1)[0] = True
        masks[name] = mask
    return masks


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def holds_base_plus_leaf(attachment) -> bool:
    """Whether every masked weight is exactly ``rn(base + leaf)`` at its mask."""

    def wide(m):
        return torch.promote_types(torch.float32, m.weight.dtype)

    return all(
        torch.equal(
            m.weight.detach().flatten()[m.indices.long()],
            (m.base.to(wide(m)) + m.leaf.detach()).to(m.weight.dtype),
        )
        for m in attachment._masked.values()
    )


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    return make_tiny


@pytest.fixture
def tiny() -> nn.Module:
    return make_tiny()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 23, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def kit() -> SimpleNamespace:
    """The functions above (test files cannot import a conftest in importlib mode)."""
    return SimpleNamespace(
        loss=lm_loss, masks=masks_of, snapshot=snapshot, agrees=holds_base_plus_leaf, make=make_tiny
    )
