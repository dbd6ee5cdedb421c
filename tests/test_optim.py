"""SparseAdamW and SparseSGD against torch.optim, bit for bit, and as ordinary optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseft import SparseAdamW, SparseSGD, attach

ADAMW = [
    {},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    {"weight_decay": 0.0},
]
SGD = [
    {},
    {"lr": 0.1, "weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]
PAIRS = [
    *((SparseAdamW, torch.optim.AdamW, options) for options in ADAMW),
    *((SparseSGD, torch.optim.SGD, options) for options in SGD),
]


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def attached(dtype=torch.float32):
    model = model_of(dtype)
    generator = torch.Generator().manual_seed(2)
    masks = {"0.weight": torch.rand(5, 7, generator=generator) < 0.4}
    return model, attach(model, masks, full_params=["2.*", "0.bias"])


def set_gradients(sparse, step):
    generator = torch.Generator().manual_seed(step)
    for p in sparse.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def written(sparse):
    (masked,) = sparse._masked.values()
    expected = (masked.base.float() + masked.leaf.detach()).to(masked.weight.dtype)
    return torch.equal(masked.weight.detach().flatten()[masked.indices.long()], expected)


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_equals_torch_bit_for_bit_on_leaves_and_full_parameters(ours, theirs, options):
    (_, a), (_, b) = attached(), attached()
    one = ours(a.parameters(), **{"lr": 1e-2, **options})
    other = theirs(b.parameters(), **{"lr": 1e-2, **options, "foreach": False})
    for step in range(25):
        for sparse, optimizer in ((a, one), (b, other)):
            set_gradients(sparse, step)
            optimizer.step()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q), step
        assert written(a)
        assert torch.equal(*(s._masked["0.weight"].weight for s in (a, b)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), [PAIRS[1][:2], PAIRS[-1][:2]])
def test_equals_torch_in_low_precision(ours, theirs, dtype):
    """Leaves are fp32 there; full parameters are updated in their own dtype, as torch does."""
    (_, a), (_, b) = attached(dtype), attached(dtype)
    one, other = ours(a.parameters(), lr=1e-2), theirs(b.parameters(), lr=1e-2, foreach=False)
    for step in range(10):
        for sparse, optimizer in ((a, one), (b, other)):
            set_gradients(sparse, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert written(a)


@pytest.mark.parametrize(("ours", "theirs", "options"), [PAIRS[1], PAIRS[6]])
@pytest.mark.parametrize("to_torch", [True, False], ids=["ours_to_torch", "torch_to_ours"])
def test_state_dicts_are_torch_s(ours, theirs, options, to_torch):
    first, second = (ours, theirs) if to_torch else (theirs, ours)
    (_, a), (_, b) = attached(), attached()
    straight = first(a.parameters(), **{"lr": 1e-2, **options})
    part = first(b.parameters(), **{"lr": 1e-2, **options})
    for step in range(4):
        for sparse, optimizer in ((a, straight), (b, part)):
            set_gradients(sparse, step)
            optimizer.step()
    rest = second(b.parameters(), **{"lr": 1e-2, **options})
    state = copy.deepcopy(part.state_dict())
    # Groups differ in torch's implementation switches only; keep the second optimizer's own.
    state["param_groups"] = rest.state_dict()["param_groups"]
    rest.load_state_dict(state)
    for step in range(4, 8):
        for sparse, optimizer in ((a, straight), (b, rest)):
            set_gradients(sparse, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", [SparseAdamW, SparseSGD])
def test_groups_schedulers_and_resume(kind):
    def build(sparse):
        leaves = list(sparse.leaves.values())
        groups = [{"params": leaves, "lr": 0.1}, {"params": list(sparse.full_params.values())}]
        optimizer = kind(groups, lr=0.01, weight_decay=0.1)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    (_, a), (model, b) = attached(), attached()
    one, schedule = build(a)
    for step in range(6):
        set_gradients(a, step)
        one.step()
        schedule.step()
    assert [g["lr"] for g in one.param_groups] == [pytest.approx(0.1 / 8), pytest.approx(0.01 / 8)]

    two, schedule_two = build(b)
    for step in range(3):
        set_gradients(b, step)
        two.step()
        schedule_two.step()
    saved = copy.deepcopy((model.state_dict(), two.state_dict(), schedule_two.state_dict()))
    model, b = attached()
    two, schedule_two = build(b)
    model.load_state_dict(saved[0])
    two.load_state_dict(saved[1])
    schedule_two.load_state_dict(saved[2])
    for step in range(3, 6):
        set_gradients(b, step)
        two.step()
        schedule_two.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert written(b)


@pytest.mark.parametrize("kind", [SparseAdamW, SparseSGD])
def test_ordinary_parameters_alone(kind):
    theirs = {SparseAdamW: torch.optim.AdamW, SparseSGD: torch.optim.SGD}[kind]
    a, b = model_of(), model_of()
    x = torch.randn(4, 7)
    for model, optimizer in (
        (a, kind(a.parameters(), lr=torch.tensor(0.01))),
        (b, theirs(b.parameters(), lr=0.01, foreach=False)),
    ):
        for _ in range(5):
            loss = optimizer.step(lambda m=model, o=optimizer: closure(m, o, x))
            assert float(loss) > 0
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)  # lr is rounded to fp32 in a tensor


def closure(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).pow(2).mean()
    loss.backward()
    return loss.detach()


def test_parameters_without_gradient_stay():
    _, sparse = attached()
    optimizer = SparseAdamW(sparse.parameters(), lr=1.0)
    before = [p.detach().clone() for p in sparse.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(sparse.parameters(), before, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (SparseAdamW, {"lr": -1.0}, "lr"),
        (SparseAdamW, {"betas": (0.9, 1.0)}, "betas"),
        (SparseAdamW, {"eps": float("nan")}, "eps"),
        (SparseSGD, {"momentum": -0.1}, "momentum"),
        (SparseSGD, {"nesterov": True}, "nesterov"),
    ],
)
def test_hyper_parameters_out_of_range(kind, options, word):
    with pytest.raises(ValueError, match=word):
        kind([nn.Parameter(torch.zeros(1))], **options)


def test_sparse_layout_gradients_are_refused():
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = SparseSGD(layer.parameters(), lr=0.1)
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
