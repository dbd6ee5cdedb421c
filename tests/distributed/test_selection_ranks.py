"""Masks chosen by several processes: the same on all, and those of one process on all the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import sparseft
from sparseft import select
from sparseft.errors import SparseFtError
from sparseft.modules import GradientScores


class Net(nn.Sequential):
    def forward(self, ids):
        x = self[2](self[1](self[0](ids)))
        return F.cross_entropy(self[3](x).flatten(0, 1), ids.roll(1, 1).flatten())


def network():
    """A model with tied ends and a layer that no loss reaches, and five batches."""
    torch.manual_seed(0)
    model = Net(nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11))
    model[3].weight = model[0].weight
    model.add_module("other", nn.Linear(8, 8))
    return model, torch.randint(0, 11, (5, 4, 6))


def loss_fn(model, ids):
    return model(ids)


def through_other(model, ids):
    return model.other(model[0](ids)).square().sum()


def indices(masks):
    return {name: pattern.indices for name, pattern in masks.items()}


def by_gradients(rank):
    """Three batches on rank 0, two on rank 1; the whole data alone, too."""
    model, data = network()
    mine = list(data[rank::2])
    found, alone = {}, {}
    ways = (("fisher", {}), ("gradient", {"kind": "sum"}), ("gradient", {"kind": "snip"}))
    for method, options in ways:
        for shortlist in (None, 2):
            key = method + options.get("kind", "") + str(shortlist)
            options = {"nnz": 40, "loss_fn": loss_fn, "exclude": "other.*"} | options
            masks = select(model, method, batches=mine, shortlist=shortlist, **options)
            found[key] = indices(masks)
            if shortlist is None:
                masks = select(
                    model, method, batches=list(data), shortlist=None, group=False, **options
                )
                alone[key] = indices(masks)

    # Wrapped for training: the wrapper has no part in it.
    ddp = nn.parallel.DistributedDataParallel(model)
    masks = select(
        ddp, "fisher", nnz=40, batches=mine, loss_fn=loss_fn, exclude="other.*", shortlist=None
    )
    found["wrapped"], alone["wrapped"] = indices(masks), alone["fisherNone"]
    # Without a shortlist no agreement is needed before the end.
    masks = select(
        model, "fisher", nnz=150, scope="tensor", batches=mine,
        loss_fn=(loss_fn, through_other)[rank],
    )  # fmt: skip
    found["apart"] = indices(masks)
    return found, alone


def test_gradients_of_all_batches_choose(run_ranks):
    (zero, alone), (one, _) = run_ranks(by_gradients, 2)
    assert zero.keys() == one.keys()
    for key, found in zero.items():
        for name, entries in found.items():
            assert torch.equal(entries, one[key][name]), (key, name)
            assert key not in alone or torch.equal(entries, alone[key][name]), (key, name)
    for name in ("other.weight", "1.weight"):  # each seen by one rank only
        kept = zero["apart"][name]
        assert not torch.equal(kept, torch.arange(kept.numel()).to(kept)), name


def candidates(rank):
    """Candidates are the best of both first batches together, though neither has that sum."""
    model, data = network()
    names = ["0.weight", "1.weight"]
    found = {}
    for statistic in ("sum", "square"):
        with GradientScores(
            model, names, statistic=statistic, candidates=dict.fromkeys(names, 9)
        ) as scores:
            for ids in data[rank::2]:
                loss_fn(model, ids).backward()
                scores.step()
        found[statistic] = scores.finish()
        found[statistic + " batches"] = scores.batches
    return found


def test_candidates_are_those_of_both_first_batches(run_ranks):
    zero, one = run_ranks(candidates, 2)
    model, data = network()
    tensors = {"0.weight": model[0].weight, "1.weight": model[1].weight}
    parts = [torch.autograd.grad(loss_fn(model, ids), list(tensors.values())) for ids in data]
    for statistic in ("sum", "square"):
        assert zero[statistic + " batches"] == one[statistic + " batches"] == 5
        for i, name in enumerate(tensors):
            grads = torch.stack([p[i].flatten() for p in parts])
            grads = grads.square() if statistic == "square" else grads
            best = grads[:2].sum(0).abs().topk(9).indices.sort().values
            entries, sums = zero[statistic][name]
            assert torch.equal(entries.long(), best), (statistic, name)
            assert torch.allclose(sums, grads.sum(0)[best], rtol=1e-4, atol=1e-6), (statistic, name)
            assert torch.equal(one[statistic][name][0], entries)
            assert torch.equal(one[statistic][name][1], sums)


def refusals(rank):
    model, data = network()
    mine, said = list(data[rank::2]), []
    for options in (
        {"batches": mine, "loss_fn": (loss_fn, through_other)[rank], "shortlist": 1},
        {"batches": mine if rank else [], "loss_fn": loss_fn, "shortlist": 1},
        {"batches": [], "loss_fn": loss_fn},
    ):
        try:
            select(model, "fisher", nnz=5, **options)
        except SparseFtError as error:
            said.append(str(error))
    return said


def test_other_layers_or_no_batches_are_said_on_both_sides(run_ranks):
    for other_layers, one_empty, empty in run_ranks(refusals, 2):
        assert "this one is at" in other_layers
        assert "this one is at" in one_empty
        assert "there are no batches" in empty


WAYS = {
    "random": {"seed": 5},
    "magnitude": {},
    "movement": {},
    "weight_magnitude": {},
    "deltas_svd": {"rank": 2, "residual": 0.2},
    "low_rank": {"rank": 2},
    "rows": {"score": "magnitude"},
}


def without_data(rank):
    """Every rank's generators are elsewhere; a selector that draws from them would differ."""
    model, _ = network()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.manual_seed(100 + rank)
    found = {}
    for method, options in WAYS.items():
        needs = {"base": base} if method not in ("random", "weight_magnitude", "low_rank") else {}
        include = {"include": ["1.weight", "other.weight"]} if method == "rows" else {}
        masks = select(model, method, nnz=32, **options, **needs, **include)
        found[method] = indices(masks)
        with sparseft.attach(model, masks) as sparse:  # which compares them
            assert sparse.nnz == 32
    return found


def test_selectors_without_data_agree(run_ranks):
    zero, one = run_ranks(without_data, 2)
    alone = without_data(0)
    for method, found in zero.items():
        assert found.keys() == one[method].keys() == alone[method].keys()
        for name, entries in found.items():
            assert torch.equal(entries, one[method][name]), (method, name)
            assert torch.equal(entries, alone[method][name]), (method, name)
