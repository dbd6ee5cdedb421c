"""P1 for sums of gradients, at allocator level: no dense gradient, nothing outlives its use."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparseft.modules import GradientScores, _gradient_tiles
from sparseft.profiling.allocations import peak_of

SIDE, BATCH, LAYERS = 3072, 2, 2
WEIGHT = SIDE * SIDE * 4


def peak_of_a_batch(statistic, count, second):
    """Return the highest memory of a whole run: taps, the first or a later batch."""
    torch.manual_seed(0)
    layers = [nn.utils.skip_init(nn.Linear, SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    for layer in layers:  # of rank 1: quickly filled
        torch.mul(torch.randn(SIDE, 1), torch.randn(SIDE), out=layer.weight.data)
    model = nn.Sequential(*layers)
    inputs = torch.randn(BATCH, SIDE)
    names = [n for n, _ in model.named_parameters()]
    counts = None if count is None else dict.fromkeys(names, count)

    def run():
        with GradientScores(model, names, statistic=statistic, candidates=counts) as scores:
            for _ in range(1 + second):
                model(inputs).square().sum().backward()
                scores.step()
        scores.finish()

    return peak_of(run)


COUNT = 20_000
# A tile; the buffer of the top-k (a million-entry chunk, 12 bytes each); the sums.
TILE_BYTES = 4 * 2**20
ALLOWED = TILE_BYTES + 2**20 * 12 + LAYERS * COUNT * 40


@pytest.mark.parametrize("statistic", ["sum", "square"])
def test_no_dense_gradient_is_formed(statistic):
    used = peak_of_a_batch(statistic, COUNT, second=True)
    assert used <= ALLOWED, f"{used:,} bytes"
    assert ALLOWED < WEIGHT / 2, "the bound would not notice a dense gradient"


def test_all_entries_take_four_bytes_each():
    for statistic in ("sum", "square"):
        used = peak_of_a_batch(statistic, None, second=False)
        assert used <= LAYERS * 2 * WEIGHT + ALLOWED  # sums, and the indices that `finish` gives


def test_a_dense_gradient_fails_the_same_check(monkeypatch):
    """What must not pass: dW whole, ranked at once."""

    def tiles(self, scratch):
        yield 0, (self._a.t() @ self._b).reshape(-1)

    monkeypatch.setattr(_gradient_tiles.LinearGradient, "tiles", tiles)
    used = peak_of_a_batch("sum", COUNT, second=False)
    assert used > ALLOWED
    assert used >= WEIGHT


def test_checkpointed_inputs_are_not_kept():
    """The taps save through autograd, so that checkpointing frees what they save."""

    def used(checkpointed):
        torch.manual_seed(0)
        blocks = [
            nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64)) for _ in range(4)
        ]
        model = nn.Sequential(*blocks)
        names = [n for n, _ in model.named_parameters() if n.endswith("weight")]
        inputs = torch.randn(256, 64)

        def run():
            with GradientScores(model, names, candidates=dict.fromkeys(names, 10)) as scores:
                x = inputs
                for block in blocks:
                    x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
                x.sum().backward()
                scores.step()

        return peak_of(run)

    assert used(True) < 0.6 * used(False)


def test_only_a_weight_used_twice_is_held_whole():
    """Squares of all entries: the rest is squared tile by tile, checkpointed or not."""

    def held(checkpointed):
        embed, body, head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        head.weight = embed.weight
        model = nn.Sequential(embed, body, head)
        with GradientScores(model, ["0.weight", "1.weight"], statistic="square") as scores:
            x = embed(torch.tensor([[1, 2]]))
            x = checkpoint(body, x, use_reentrant=False) if checkpointed else body(x)
            head(x).sum().backward()
            dense = [one.name for one in scores._sums if one._batch is not None]
            scores.step()
        return dense

    assert held(False) == held(True) == ["0.weight"]
