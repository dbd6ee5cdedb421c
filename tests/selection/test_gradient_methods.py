"""`fisher`, `gradient` and `movement` against dense autograd and against training itself."""

from __future__ import annotations

import copy
import logging
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseft import attach, select
from sparseft.errors import DataError, MaskError, NonFiniteLossError, OptionError
from sparseft.selection import batches as shared
from sparseft.selection import candidates_of


class Net(nn.Module):
    """Dropout, a tied head, and a loss of its own."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.drop = nn.Dropout(0.5)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)
        self.to(dtype)

    def forward(self, ids, labels=None):
        x = self.drop(self.embed(ids))
        x = self.norm(x + self.down(F.gelu(self.up(x))))
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net(dtype)


def rows(count=5):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 13, (count, 4, 6), generator=generator)
    return [{"ids": i, "labels": i.roll(1, 1)} for i in ids]


def scored(model, batches, how):
    """The definition, from whole gradients of the eval-mode model."""
    model = copy.deepcopy(model).double().eval()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        model(**batch)["loss"].backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.square() if how == "fisher" else p.grad
    if how == "fisher":
        return {n: t / len(batches) for n, t in total.items()}
    weight = dict(model.named_parameters()) if how == "snip" else dict.fromkeys(total, 1)
    return {n: (t * weight[n]).abs().detach() for n, t in total.items()}


def methods(how):
    return ("gradient", {"kind": how}) if how in ("sum", "snip") else (how, {})


def assert_best(masks, scores, slack=1e-5):
    """Every entry kept is at least as good as every one left out, up to rounding."""
    kept = torch.cat([scores[n].reshape(-1)[p.indices.long()] for n, p in masks.items()])
    left = torch.cat([scores[n][~p.to_mask()].reshape(-1) for n, p in masks.items()])
    assert kept.min() >= left.max() * (1 - slack)


@pytest.mark.parametrize("how", ["fisher", "sum", "snip"])
@pytest.mark.parametrize("nnz", [1, 40, 200])
def test_the_best_entries_are_kept(how, nnz):
    model, batches = net(), rows()
    method, options = methods(how)
    masks = select(model, method, nnz=nnz, batches=batches, **options)
    assert masks.nnz == nnz
    assert_best(masks, scored(model, batches, how))


@pytest.mark.parametrize("how", ["fisher", "sum", "snip"])
def test_a_shortlist_that_holds_the_best_changes_nothing(how):
    model, batches, nnz = net(), rows(), 12
    method, options = methods(how)
    exact = select(model, method, nnz=nnz, batches=batches, shortlist=None, **options)
    first = scored(model, batches[:1], how)
    numel = sum(p.numel() for p in model.parameters())
    needed = 1.0
    for name, pattern in exact.items():
        if pattern.nnz and first[name].ndim == 2:
            # How far down its list of the first batch the worst of the kept entries stands.
            order = first[name].abs().reshape(-1)
            worst = order[pattern.indices.long()].min()
            needed = max(needed, int((order >= worst).sum()) * numel / (nnz * order.numel()))
    assert needed * nnz < 0.95 * numel, "the list should leave something out"
    listed = select(model, method, nnz=nnz, batches=batches, shortlist=needed + 1e-6, **options)
    assert listed.equals(exact)


def test_a_short_shortlist_is_what_the_first_batch_chose(monkeypatch):
    model, batches = net(), rows()
    first = scored(model, batches[:1], "fisher")
    masks = select(model, "fisher", nnz=60, batches=batches, shortlist=1, exclude="unused.*")
    total = sum(p.numel() for n, p in model.named_parameters() if "unused" not in n)
    for name in ("embed.weight", "up.weight", "down.weight"):
        count = -(-60 * first[name].numel() // total)
        best = first[name].reshape(-1).topk(count).indices
        assert set(masks[name].indices.tolist()) <= set(best.tolist())
    # "auto" is exact for a small model, and a shortlist for a large one.
    exact, listed = (
        select(model, "fisher", nnz=10, batches=batches, scope="tensor", shortlist=shortlist)
        for shortlist in (None, 3)
    )
    assert not listed.equals(exact), "nothing to tell them apart by"
    auto = {"nnz": 10, "batches": batches, "scope": "tensor"}
    assert select(model, "fisher", **auto).equals(exact)
    monkeypatch.setattr(shared, "_EXACT", 100)
    monkeypatch.setattr(shared, "_MULTIPLE", 3.0)
    assert select(model, "fisher", **auto).equals(listed)
    monkeypatch.setattr(shared, "_MULTIPLE", 12.0)  # 12 bytes for 120 of 338 entries: no saving
    counts = shared._counts(candidates_of(model), "auto", 10)
    assert counts is None


def test_attached_masks_do_not_show():
    model, batches = net(), rows()
    wanted = select(model, "fisher", nnz=80, batches=batches)
    sparse = attach(model, {"up.weight": torch.rand(12, 8) < 0.3, "norm.bias": torch.rand(8) < 0.5})
    assert select(model, "fisher", nnz=80, batches=batches).equals(wanted)
    assert all(leaf.grad is None and leaf.requires_grad for leaf in sparse.leaves.values())


@pytest.mark.parametrize("train", [False, True])
def test_the_model_is_left_as_it_was(train):
    model = net()
    model.train()
    model.up.eval()
    model.down.weight.requires_grad_(False)
    model.norm.weight.grad = torch.ones(8)
    state = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    before = {n: (p.detach().clone(), p._version, p.requires_grad, p.grad)
              for n, p in model.named_parameters()}  # fmt: skip
    modes, classes = [(m.training, type(m)) for m in model.modules()], []

    def loss_fn(model, batch):
        classes.append(model.drop.training)
        random.random()
        np.random.rand()
        return model(**batch)["loss"]

    first = select(model, "fisher", nnz=50, batches=rows(), loss_fn=loss_fn, train=train)
    assert classes == [train] * 5
    again = select(model, "fisher", nnz=50, batches=rows(), loss_fn=loss_fn, train=train)
    assert again.equals(first), "the generators start as they were"
    if train:
        torch.manual_seed(5)
        other = select(model, "fisher", nnz=50, batches=rows(), loss_fn=loss_fn, train=train)
        assert not other.equals(first), "dropout should draw"
        torch.set_rng_state(state[0])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.array_equal(np.random.get_state()[1], state[2])
    assert modes == [(m.training, type(m)) for m in model.modules()]
    for name, parameter in model.named_parameters():
        value, version, requires_grad, grad = before[name]
        assert torch.equal(parameter, value)
        assert (parameter._version, parameter.requires_grad) == (version, requires_grad)
        assert parameter.grad is grad


def test_how_batches_are_read():
    model, batches = net(), rows()
    wanted = select(model, "fisher", nnz=50, batches=batches[:3])
    assert select(model, "fisher", nnz=50, batches=batches, max_batches=3).equals(wanted)
    stream = iter(batches)
    assert select(model, "fisher", nnz=50, batches=stream, max_batches=3).equals(wanted)
    assert len(list(stream)) == 2, "the rest is still there"
    loader = torch.utils.data.DataLoader(batches[:3], batch_size=None)
    assert select(model, "fisher", nnz=50, batches=loader).equals(wanted)
    pairs = [(b["ids"], [b["labels"]]) for b in batches[:3]]
    by_pair = select(
        model, "fisher", nnz=50, batches=pairs,
        loss_fn=lambda model, pair: model(pair[0], pair[1][0])["loss"],
    )  # fmt: skip
    assert by_pair.equals(wanted)
    with torch.no_grad():
        assert select(model, "fisher", nnz=50, batches=batches[:3]).equals(wanted)
    several = select(model, "fisher", nnz=[20, 50], batches=batches[:3])
    assert several[1].equals(wanted)


def test_a_structure_reads_them_twice():
    model, batches = net(), rows()
    masks = select(model, "rows", nnz=64, score="fisher", batches=batches, include="up.weight")
    kept = masks["up.weight"].to_mask()
    mass = scored(model, batches, "fisher")["up.weight"].sum(1)
    assert set(mass.topk(8).indices.tolist()) == set(kept.any(1).nonzero().view(-1).tolist())
    with pytest.raises(OptionError, match="read once"):
        select(model, "rows", nnz=64, score="fisher", batches=iter(batches))
    with pytest.raises(OptionError, match=r"shortlist=2 .*a structure"):
        select(model, "rows", nnz=64, score="fisher", batches=batches, shortlist=2)


def test_parameters_read_by_the_loss_itself(pair):
    """A model without a forward; every parameter through its own dense gradient."""
    _, model = pair()

    def loss_fn(model, batch):
        return sum((p * (batch + i)).square().sum() for i, p in enumerate(trained(model)))

    def trained(model):
        return [p for p in model.parameters() if p.is_floating_point()]

    scores = dict.fromkeys(n for n, p in model.named_parameters())
    scores = {
        n: sum((2 * p * (b + i) ** 2).abs() for b in (1, 2)).detach()
        for i, (n, p) in enumerate((n, p) for n, p in model.named_parameters() if n != "counts")
    }
    masks = select(model, "gradient", nnz=50, batches=[1, 2], loss_fn=loss_fn)
    assert_best(masks, scores)
    with pytest.raises(OptionError, match="Odd has no forward.*loss_fn"):
        select(model, "fisher", nnz=3, batches=[{}])


def test_tensors_that_no_gradient_reaches_rank_last(caplog):
    model = net()
    numel = sum(p.numel() for p in model.parameters())
    with caplog.at_level(logging.WARNING):
        masks = select(model, "fisher", nnz=numel - 6, batches=rows())
    assert "no gradient reached 2 of 9 tensors: unused.bias, unused.weight" in caplog.text
    assert masks["unused.weight"].nnz + masks["unused.bias"].nnz <= 6
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        select(model, "fisher", nnz=30, batches=rows(), exclude="unused.*")
    assert not caplog.records


def test_misuse_is_named():
    model, batches = net(), rows()
    for wrong, error, message in (
        ({"batches": []}, DataError, "there are no batches"),
        ({"batches": batches[0]}, OptionError, r"batches is dict, wanted an iterable.*\[batch\]"),
        ({"batches": [3]}, OptionError, "a batch is int, wanted a mapping"),
        ({"batches": [{"ids": batches[0]["ids"]}]}, DataError, "returned no loss"),
        ({"batches": batches, "max_batches": 0}, OptionError, "max_batches is 0"),
        ({"batches": batches, "shortlist": 0.5}, OptionError, "shortlist is 0.5"),
        ({"batches": batches, "shortlist": "all"}, OptionError, "shortlist is 'all'"),
        ({"batches": [1], "loss_fn": lambda m, b: m.up.weight[0]}, DataError,
         r"loss of batch 0 is shape \(8,\), wanted a scalar"),
        ({"batches": [1], "loss_fn": lambda m, b: 1.5}, DataError, "is float, wanted a scalar"),
        ({"batches": [1, 2], "loss_fn": lambda m, b: m.up.weight.sum() / (b - 2)},
         NonFiniteLossError, "loss of batch 1 is .*inf"),
        ({"batches": [1], "loss_fn": lambda m, b: m.up.weight.detach().sum()}, DataError,
         "does not depend on any candidate"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            select(model, "fisher", nnz=5, **wrong)
    with pytest.raises(OptionError, match="needs batches="):
        select(model, "gradient", nnz=5)
    with pytest.raises(OptionError, match=r"kind='snap'.*Did you mean 'snip'"):
        select(model, "gradient", nnz=5, batches=batches, kind="snap")
    with torch.no_grad():
        model.up.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"batch 0 is nan.*'up.weight' holds NaN"):
        select(model, "fisher", nnz=5, batches=batches)


@pytest.mark.parametrize("shortlist", [None, 2], ids=["all", "listed"])
@pytest.mark.parametrize("method", ["fisher", "gradient"])
def test_overflown_gradients_of_a_finite_loss_are_named(method, shortlist):
    """Infinite ones would rank first: of fp16, and of squares in fp32."""
    fp16 = (nn.Linear(8, 10, bias=False).half(), 3e4)
    fp32 = (nn.Linear(8, 10, bias=False), 1e25)
    for layer, scale in (fp16, fp32) if method == "fisher" else (fp16,):
        x = torch.ones(4, 8, dtype=layer.weight.dtype)

        def loss_fn(model, scale, x=x):
            return (model(x).float() * torch.arange(10) * scale).sum()

        given = {"nnz": 5, "loss_fn": loss_fn, "shortlist": shortlist}
        with pytest.raises(MaskError, match="gradient of 'weight'.*inf.*fp32 or bf16, or divide"):
            select(layer, method, batches=[scale], **given)
        # The first batch is fine, so there are candidates; what they sum up to later is not.
        with pytest.raises(MaskError, match="score inf at flat index .* after 2 batches"):
            select(layer, method, batches=[1.0, scale], **given)


def test_running_means_are_put_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {n: b.clone() for n, b in model.named_buffers()}
    held, seen = dict(model.named_buffers()), []

    def loss_fn(model, batch):
        loss = model(batch).square().mean()
        seen.append(int(model[1].num_batches_tracked))
        return loss

    batches = [torch.rand(5, 3), torch.rand(5, 3)]
    select(model, "fisher", nnz=3, batches=batches, loss_fn=loss_fn, train=True)
    assert seen == [1, 2], "train mode writes them"
    assert all(b is held[n] and torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_shortlist_that_auto_takes_is_said(monkeypatch, caplog):
    model, batches = net(), rows(2)
    with caplog.at_level(logging.WARNING):
        exact = select(model, "fisher", nnz=4, batches=batches, exclude="unused.*")
        assert not caplog.records
        monkeypatch.setattr(shared, "_EXACT", 100)
        select(model, "fisher", nnz=4, batches=batches, exclude="unused.*", shortlist=10)
        assert not caplog.records
        short = select(model, "fisher", nnz=4, batches=batches, exclude="unused.*")
    assert short.nnz == exact.nnz == 4
    [said] = [r.getMessage() for r in caplog.records]
    assert "at 10 times the 4 entries to keep" in said
    assert "shortlist=None" in said


def test_arguments_of_other_kinds():
    model, batches = net(), rows(2)
    wanted = select(model, "fisher", nnz=4, batches=batches, max_batches=1, shortlist=2)
    numpys = {"max_batches": np.int64(1), "shortlist": np.float32(2)}
    assert select(model, "fisher", nnz=4, batches=batches, **numpys).equals(wanted)
    for wrong, message in (
        ({"shortlist": [4]}, r"shortlist is \[4\], wanted a multiple"),
        ({"shortlist": float("inf")}, "shortlist is inf, wanted a multiple"),
        ({"loss_fn": "mse"}, "loss_fn is 'mse', wanted a function"),
    ):
        with pytest.raises(OptionError, match=message):
            select(model, "fisher", nnz=4, batches=batches, **wrong)
    with torch.inference_mode(), pytest.raises(OptionError, match="under torch.inference_mode"):
        select(model, "fisher", nnz=4, batches=batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model, batches = net(dtype), rows(2)
    masks = select(model, "fisher", nnz=50, batches=batches)
    # bf16 gradients are that coarse, and their squares twice.
    assert_best(masks, scored(model, batches, "fisher"), 0.5 if dtype == torch.bfloat16 else 1e-9)


# -- movement ---


def test_movement_is_the_integral_of_training():
    """Small steps of gradient descent: the paper's sum over them, and the closed form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs, target = torch.randn(32, 6).double(), torch.randint(0, 3, (32,))
    base = copy.deepcopy(model.state_dict())
    summed = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    rate = 1e-3
    for _ in range(400):
        model.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                summed[name] -= rate * p.grad * p
                p -= rate * p.grad
    nnz = 30
    masks = select(model, "movement", nnz=nnz, base=base)
    closed = {n: (p.detach() ** 2 - base[n] ** 2) / 2 for n, p in model.named_parameters()}
    assert_best(masks, closed, 1e-12)
    for name, value in closed.items():
        assert torch.allclose(value, summed[name], rtol=1e-2, atol=1e-5), name
    best = torch.cat([s.reshape(-1) for s in summed.values()]).topk(nnz).values.min()
    for name, pattern in masks.items():
        assert bool((summed[name].reshape(-1)[pattern.indices.long()] >= best - 1e-4).all())


def test_entries_that_moved_towards_zero_rank_last(caplog):
    base = {"weight": torch.tensor([[1.0, -2.0, 0.5, 0.0]])}
    tuned = {"weight": torch.tensor([[0.5, -2.5, 0.5, 0.1]])}
    layer = nn.Linear(4, 1, bias=False)
    masks = select(layer, "movement", nnz=2, base=base, tuned=tuned)
    assert masks["weight"].indices.tolist() == [1, 3]
    with caplog.at_level(logging.WARNING):
        masks = select(layer, "movement", nnz=3, base=base, tuned=tuned)
    assert masks["weight"].indices.tolist() == [0, 1, 3]
    assert "did not move away from zero" in caplog.text
    with pytest.raises(MaskError, match="very tensors of the tuned model"):
        select(layer, "movement", nnz=1, base=layer)
