"""Activation checkpointing of every kind, eager and compiled: the gradients of kept activations.

(transformers' switch for it: test_transformers.py; its models compiled: test_compile.py.)
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from sparseft import SparseAdamW, attach


def keep_products(ctx, op, *args, **kwargs):
    """Keep what the matrix products gave, compute the rest again."""
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


KINDS = {
    "kept": lambda block, h: block(h),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "non_reentrant": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, keep_products),
    ),
    "selective_list": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(
            create_selective_checkpoint_contexts, [torch.ops.aten.mm.default]
        ),
    ),
    "sequential": lambda block, h: checkpoint_sequential([block], 1, h, use_reentrant=False),
}


class Block(nn.Module):
    """Fused layers, one used twice, one that is read around its forward, a norm, dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.mix = nn.Linear(width, width)

    def forward(self, h):
        h = h + F.dropout(self.down(F.gelu(self.up(self.norm(h)))), 0.2)
        return torch.tanh(self.mix(self.mix(h))) + h @ self.mix.weight


class Model(nn.Module):
    def __init__(self, width: int = 8, vocab: int = 13) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.emb.weight
        self.run = KINDS["kept"]

    def forward(self, ids):
        h = self.emb(ids)
        for block in self.blocks:
            h = self.run(block, h)
        return self.head(h)


def trained(kind, *, compiled=False, autocast=False, blocks_only=False, steps=2):
    """Return losses and leaves after some steps of the optimizer."""
    torch.manual_seed(0)
    model = Model()
    model.run = KINDS[kind]
    masks = {n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters()}
    if blocks_only:
        masks = {n: m for n, m in masks.items() if n.startswith("blocks.")}
    sparse = attach(model, masks, input_grads=True)
    optimizer = SparseAdamW(sparse.parameters(), lr=torch.tensor(1e-2))
    call, step = model, optimizer.step
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
        step = torch.compile(optimizer.step, backend="aot_eager")
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 13, (3, 5))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(call(ids).flatten(0, 1).float(), ids.flatten())
        loss.backward()
        assert all(leaf.grad is not None for leaf in sparse.leaves.values())
        step()
        losses.append(loss.detach())
    return losses, [leaf.detach().clone() for leaf in sparse.leaves.values()]


def check(kind, *, compiled=False, **options):
    kept, again = trained("kept", **options), trained(kind, compiled=compiled, **options)
    for mine, theirs in zip(again, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "kept"])
def test_recomputed_activations_give_the_same_training(kind):
    check(kind)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "selective"])
def test_under_autocast(kind):
    check(kind, autocast=True)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_only_the_blocks_are_masked(kind):
    """Nothing below them trains: reentrant checkpointing needs inputs that require grad."""
    check(kind, blocks_only=True)


# Without dropout: recomputed in a graph, it need not draw what eager mode draws.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["non_reentrant", "selective", "selective_list"])
def test_compiled(kind, monkeypatch):
    monkeypatch.setattr(F, "dropout", lambda h, p: h)
    check(kind, compiled=True)
