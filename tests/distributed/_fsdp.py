"""A small model with every kind of masked weight, whole or cut by ``fully_shard``; its training.

Its sizes leave rows uneven over 2 and 4 processes, and the last of 4 without any of some weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import sparseft

WIDTH, WORDS = 10, 13


class Block(nn.Module):
    """Fused layers, a norm's vectors, and a matrix that is read outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH, bias=False)
        self.mix = nn.Parameter(torch.randn(5, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return x + (x @ self.mix.t()) @ self.mix


class Net(nn.Module):
    """An embedding, tied to the output matrix, two blocks, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(WIDTH, WORDS, bias=False)
        self.out.weight = self.words.weight
        self.head = nn.Linear(WORDS, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.out(x).mean(1))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def masks(model: nn.Module, kept: float = 0.3, seed: int = 1) -> dict[str, Tensor]:
    """Masks on every parameter but the head's, of global shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in model.named_parameters():
        if not name.startswith("head.") and "diff_" not in name:
            mask = torch.rand(tuple(p.shape), generator=generator) < kept
            mask.view(-1)[seed] = True
            found[name] = mask
    return found


def shard(model: Net, mesh: DeviceMesh | None = None, **options: Any) -> Net:
    """``fully_shard`` each block, then the model."""
    from torch.distributed.fsdp import fully_shard

    if mesh is None:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def batches(steps: int, size: int = 8, seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(WORDS, (size, 6), generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(steps)
    ]


def own_part(batch: tuple[Tensor, Tensor], rank: int, world: int) -> tuple[Tensor, Tensor]:
    ids, labels = batch
    return ids.chunk(world)[rank], labels.chunk(world)[rank]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids, labels = batch
    return nn.functional.cross_entropy(model(ids).float(), labels)


def train(
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    steps: int,
    *,
    rank: int = 0,
    world: int = 1,
    between: Callable[[], object] | None = None,
) -> list[float]:
    """Train on this process's part of each batch; return its losses.

    ``between`` is called between each backward and step, and after the step.
    """
    losses = []
    for batch in batches(steps):
        loss = loss_of(model, own_part(batch, rank, world))
        loss.backward()
        if between is not None:
            between()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if between is not None:
            between()
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, gathered, as a copy."""
    from sparseft.modules.weight_storage import full_value

    return {name: full_value(p).clone() for name, p in model.named_parameters()}


def check_weights(sparse: sparseft.Attachment, before: dict[str, Tensor]) -> None:
    """Assert ``rn(base + leaf)`` at each mask and the bits of before elsewhere."""
    after = whole(sparse.model)
    for name, leaf in sparse.leaves.items():
        mask = torch.zeros(before[name].numel(), dtype=torch.bool)
        mask[sparse.patterns[name].indices.long()] = True
        old, new = before[name].view(-1), after[name].view(-1)
        assert torch.equal(new[~mask], old[~mask]), name
        wanted = (old[mask].to(leaf.dtype) + leaf.detach()).to(old.dtype)
        assert torch.equal(new[mask], wanted), name
