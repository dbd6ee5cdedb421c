"""Small transformers for DistributedDataParallel, and a run of a few steps over a batch or a part.

``classifier``: head in full_params. ``masked_lm``: tied embeddings, whose mask holds for both uses.
``causal``: tied, too, and attention looks back only.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import sparseft

KINDS = ("classifier", "masked_lm", "causal")
WORDS, WIDTH, CLASSES, ROWS, LENGTH = 37, 16, 3, 8, 6


class Net(nn.Module):
    """One block of attention and two dense layers; returns the mean loss."""

    def __init__(self, kind: str, checkpointing: bool = False, spare: bool = False) -> None:
        super().__init__()
        self.kind, self.checkpointing = kind, checkpointing
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.inputs = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES if kind == "classifier" else WORDS)
        if kind != "classifier":
            self.head.weight = self.embed.weight
        if spare:  # used where asked for only
            self.spare = nn.Linear(WIDTH, WIDTH, bias=False)

    def block(self, x):
        q, k, v = self.inputs(x).chunk(3, -1)
        causal = self.kind == "causal"
        x = self.norm(x + F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        return x + self.down(F.gelu(self.up(x)))

    def forward(self, ids, labels, spare=False):
        x = self.embed(ids)
        if self.checkpointing:
            x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        else:
            x = self.block(x)
        if spare:
            x = x + self.spare(x)
        if self.kind == "classifier":
            return F.cross_entropy(self.head(x[:, 0]).float(), labels)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), ids.roll(-1, 1).flatten())


def make(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    """A network, the same at each call; drawn in fp32."""
    torch.manual_seed(0)
    return Net(kind, **options).to(dtype)


def attached(model: Net, **options: Any) -> sparseft.Attachment:
    """Masks over every tensor, norms and biases, too; a classifier's head is trained densely."""
    head = ["head.*"] if model.kind == "classifier" else []
    masks = sparseft.select(model, "random", density=0.15, seed=3, scope="tensor", exclude=head)
    return sparseft.attach(model, masks, full_params=head, **options)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (8, 6) and labels (8,) of a step."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, WORDS, (ROWS, LENGTH), generator=draw)
    return ids, torch.randint(0, CLASSES, (ROWS,), generator=draw)


def part_of(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of the batch."""
    world = dist.get_world_size()
    return tuple(part[rank::world] for part in batch(step))


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=False),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True),
    "sparse_adamw": lambda ps: sparseft.SparseAdamW(ps, lr=1e-2, weight_decay=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
}


def counted(wrapped: DistributedDataParallel) -> list[int]:
    """Count the bytes of each bucket that is reduced."""
    sizes: list[int] = []

    def hook(group, bucket):  # torch wants no annotation, or its own
        sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, hook)
    return sizes


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def single(kind: str, optimizer: str, dtype: torch.dtype = torch.float32, steps: int = 3) -> Any:
    """One process on the whole batches; returns the diffs and what the model holds."""
    model = make(kind, dtype)
    sparse = attached(model)
    opt = OPTIMIZERS[optimizer](sparse.parameters())
    for step in range(steps):
        opt.zero_grad()
        model(*batch(step)).backward()
        opt.step()
    trained = {name: p.detach().clone() for name, p in sparse.named_parameters()}
    return SimpleNamespace(trained=trained, model=bits(model), sparse=sparse)
