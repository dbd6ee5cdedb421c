"""A small net of every tier, its masks and steps, for the tests of mixed precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseft
from sparseft.ops._common import bits

BF16, FP16 = torch.bfloat16, torch.float16
OPTIMIZERS = {
    "sparse": lambda p, **o: sparseft.SparseAdamW(p, **o),
    "loop": lambda p, **o: torch.optim.AdamW(p, foreach=False, fused=False, **o),
    "foreach": lambda p, **o: torch.optim.AdamW(p, foreach=True, **o),
    "fused": lambda p, **o: torch.optim.AdamW(p, fused=True, **o),
}


class Net(nn.Module):
    """A fused embedding and linears, a convolution of the generic tier, a norm, a full head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(19, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.emb(ids))
        h = h + self.down(F.gelu(self.up(h)))
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.head(h.mean(1))


MASKED = ("emb.weight", "up.weight", "up.bias", "down.weight", "conv.weight")


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(BF16).to(dtype)  # every dtype holds the same weights


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.4
        for name in MASKED
    }


def batch(step: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 19, (rows, 7), generator=generator)
    return ids, ids[:, 0] % 5


def loss_of(model: nn.Module, step: int, rows: slice = slice(None)) -> Tensor:
    ids, labels = batch(step)
    return F.cross_entropy(model(ids[rows]).float(), labels[rows])


def snapshot(sparse: sparseft.Attachment, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of weights, leaves and moments."""
    found = dict(sparse.model.named_parameters())
    for number, parameter in enumerate(sparse.parameters()):
        state = optimizer.state.get(parameter, {})
        found |= {f"{number} {key}": value for key, value in state.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits(a[n]), bits(b[n])) for n in a)


def check_written(sparse: sparseft.Attachment, start: nn.Module) -> None:
    """Frozen bits are the start's; masked ones are the rounded sum of start and leaf."""
    begun = dict(start.named_parameters())
    for name, leaf in sparse.leaves.items():
        weight, mask = sparse.model.get_parameter(name).detach(), sparse.patterns[name].to_mask()
        base = begun[name].detach()
        assert leaf.dtype == torch.float32
        assert torch.equal(bits(weight[~mask]), bits(base[~mask])), name
        assert torch.equal(weight[mask], (base[mask].float() + leaf.detach()).to(weight.dtype)), (
            name
        )
    trained = {*sparse.leaves, *sparse.full_params}
    for name, base in begun.items():
        if name not in trained:
            now = sparse.model.get_parameter(name).detach()
            assert torch.equal(bits(now), bits(base.detach())), name


def scaled_step(
    sparse: sparseft.Attachment,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    *,
    factor: float = 1.0,
    clip: float | None = None,
) -> None:
    """One step as torch's documentation has it."""
    optimizer.zero_grad()
    with torch.autocast("cpu", FP16):
        loss = loss_of(sparse.model, step) * factor
    scaler.scale(loss).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(sparse.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
