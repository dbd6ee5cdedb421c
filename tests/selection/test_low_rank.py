"""LIFT's principal weights, by what they are: the largest of the low-rank approximation."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from sparseft import select
from sparseft.errors import DecompositionError, OptionError, UnknownNameError
from sparseft.selection import selectors


def approximation(weight, rank):
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).abs()


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape):
        """A gap after each of twelve singular values, so that the approximations are unique."""
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return nn.Parameter(noise)
        left = torch.linalg.qr(torch.randn((shape[0], 12), generator=generator)).Q
        right = torch.linalg.qr(torch.randn((shape[1], 12), generator=generator)).Q
        sizes = 100 * 1.5 ** -torch.arange(12.0)
        return nn.Parameter(left * sizes @ right.T + 0.01 * noise)

    # by a complete decomposition, by block iteration, tall
    shapes = {"small": (20, 50), "large": (160, 200), "tall": (200, 160), "bias": (50,)}
    return nn.ParameterDict({n: parameter(*s) for n, s in shapes.items()})


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_largest_of_the_approximation_not_the_smallest(model, scope, rank):
    masks = select(model, "low_rank", density=0.05, scope=scope, rank=rank, exclude="bias")
    exact = {n: approximation(model[n], rank) for n in masks}
    inside = torch.cat([exact[n].view(-1)[p.indices.long()] for n, p in masks.items()])
    outside = torch.cat([exact[n].view(-1)[~p.to_mask().view(-1)] for n, p in masks.items()])
    assert inside.mean() > 3 * outside.mean()
    for group in [list(masks)] if scope == "global" else [[n] for n in masks]:
        scores = torch.cat([exact[n].view(-1) for n in group])
        kept = torch.cat([masks[n].to_mask().view(-1) for n in group])
        ranked = scores.sort(descending=True).values
        count = int(kept.sum())
        limit = ranked[count - 1]
        near = 2e-2 * limit  # block iteration is no exact decomposition
        assert bool(kept[scores > limit + near].all()), "the k largest are kept"
        assert not bool(kept[scores < limit - near].any()), "and nothing else"
        smallest = torch.topk(scores, count, largest=False).indices
        assert not bool(kept[smallest].any())


def test_exactly_the_largest_where_the_decomposition_is_complete(model):
    for nnz in (1, 17, 400, 999):
        masks = select(model, "low_rank", nnz=nnz, rank=5, include="small")
        wanted = approximation(model["small"], 5).view(-1).topk(nnz).indices
        assert masks["small"].indices.tolist() == sorted(wanted.tolist())


def test_a_weight_of_full_rank_is_ranked_as_it_is(model):
    masks = select(model, "low_rank", nnz=300, rank=999, exclude="bias")
    plain = select(model, "function", nnz=300, fn=lambda n, p: p.detach().abs(), exclude="bias")
    assert masks.equals(plain)


def test_the_rank_is_32_unless_another_rule_is_given(model):
    large = {"nnz": 1000, "include": "large"}
    default = select(model, "low_rank", **large)
    assert default.equals(select(model, "low_rank", rank=32, **large))
    assert not default.equals(select(model, "low_rank", rank=2, **large))
    for rule in ({"energy": 0.5}, {"hard": "median"}, {"hard": 0.1}):
        assert select(model, "low_rank", **rule, **large).nnz == 1000
    with pytest.raises(OptionError, match="got rank=3, energy=0.5"):
        select(model, "low_rank", rank=3, energy=0.5, **large)


def test_what_is_no_matrix_comes_last(pair, caplog):
    _, model = pair(ties=False)
    matrices = {"matrix": 30, "strided": 36, "embed.weight": 18}
    with caplog.at_level(logging.WARNING, logger="sparseft"):
        # "cube" would be taken for experts, a matrix each.
        options = {"rank": 1, "exclude": "cube"}
        masks = select(model, "low_rank", nnz=sum(matrices.values()), **options)
        assert {n: p.nnz for n, p in masks.items() if p.nnz} == matrices
        assert not caplog.records
        masks = select(model, "low_rank", nnz=90, **options)
    zeros = {n: p.indices.tolist() for n, p in masks.items() if n not in matrices and p.nnz}
    assert zeros == {"scalar": [0], "vector": [0, 1, 2, 3, 4]}, "the first by name and position"
    assert "the other 6 kept have score 0 (all entries of vectors" in caplog.text


def test_it_needs_no_training(model):
    entry = selectors()["low_rank"]
    assert not {"base", "tuned"} & set(entry.options)
    assert not entry.required
    with pytest.raises(UnknownNameError, match="no option 'residual'"):
        select(model, "low_rank", nnz=3, residual=0.5)


def test_a_weight_that_cannot_be_ranked_is_named(model):
    with torch.no_grad():
        model["tall"][3, 3] = float("inf")
    with pytest.raises(DecompositionError, match=r"'tall'.*infinite.*diverge"):
        select(model, "low_rank", nnz=3, rank=2)
