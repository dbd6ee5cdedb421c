"""The sparse optimizers: torch.optim bit for bit, ordinary optimizers, and their options."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sparseft import SparseAdamW, SparseLion, SparseSGD, attach
from sparseft.errors import BaseMismatchError
from sparseft.ops._moments import QUANTUM, decode_moment, encode_moment_
from sparseft.ops._rounding import rounds_either_way

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
        (SparseLion, {"betas": (1.0, 0.9)}, "betas"),
        (SparseLion, {"lr": -1.0}, "lr"),
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


# Options: Lion, device scalars, stochastic rounding, 8-bit moments.


def lion_in_float64(p, grad, m, lr, betas, decay):
    p = p * (1 - lr * decay)
    p = p - lr * torch.sign(betas[0] * m + (1 - betas[0]) * grad)
    return p, betas[1] * m + (1 - betas[1]) * grad


def test_lion_is_the_paper_s():
    _, sparse = attached()
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}
    optimizer = SparseLion(sparse.parameters(), **options)
    exact = [(p.detach().double(), torch.zeros(p.shape).double()) for p in sparse.parameters()]
    for step in range(10):
        set_gradients(sparse, step)
        optimizer.step()
        exact = [
            lion_in_float64(p, q.grad.double(), m, 1e-2, (0.8, 0.95), 0.3)
            for (p, m), q in zip(exact, sparse.parameters(), strict=True)
        ]
        assert written(sparse)
    for (p, m), q in zip(exact, sparse.parameters(), strict=True):
        torch.testing.assert_close(q.detach().double(), p, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(optimizer.state[q]["exp_avg"].double(), m, rtol=1e-5, atol=1e-7)


KINDS = [
    (SparseAdamW, {"weight_decay": 0.1}),
    (SparseLion, {"weight_decay": 0.1}),
    (SparseSGD, {"momentum": 0.9, "dampening": 0.5}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_found_inf_and_grad_scale(kind, options):
    """GradScaler's protocol: a skipped step changes nothing, not even what the first step is."""
    (_, a), (_, b) = attached(), attached()
    one, other = (kind(s.parameters(), lr=1e-2, **options) for s in (a, b))
    before = [p.detach().clone() for p in a.parameters()]
    one.found_inf, one.grad_scale = torch.tensor(1.0), torch.tensor(8.0)
    set_gradients(a, 99)
    one.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), before, strict=True))
    one.found_inf = torch.tensor(0.0)
    for step in range(3):
        for sparse, optimizer, scale in ((a, one, 8.0), (b, other, 1.0)):
            set_gradients(sparse, step)
            for p in sparse.parameters():
                p.grad.mul_(scale)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert written(a)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_grad_scaler(kind, options):
    """With torch's GradScaler, overflow included, as torch's own AdamW: no step, half the scale."""
    (_, a), (_, b) = attached(), attached()
    one, plain = (kind(s.parameters(), lr=1e-2, **options) for s in (a, b))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(5):
        set_gradients(a, step)
        set_gradients(b, step)
        scale = float(scaler.scale(torch.tensor(1.0)))
        for p in a.parameters():
            p.grad.mul_(scale)
        if step == 2:
            next(iter(a.parameters())).grad[0] = float("inf")
        else:
            plain.step()
        scaler.step(one)
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert scaler.get_scale() == 2048.0


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bit_moments_survive_a_state_dict(kind, options, dtype):
    def build(sparse):
        return kind(sparse.parameters(), lr=1e-2, moment_bits=8, **options)

    (_, a), (_, b) = attached(dtype), attached(dtype)
    one, two = build(a), build(b)
    for step in range(3):
        for sparse, optimizer in ((a, one), (b, two)):
            set_gradients(sparse, step)
            optimizer.step()
    again = kind(b.parameters(), lr=1.0)  # the groups of the state dict carry moment_bits
    again.load_state_dict(copy.deepcopy(two.state_dict()))
    for p in b.parameters():
        for name, value in two.state[p].items():
            assert torch.equal(again.state[p][name], value), name
            assert again.state[p][name].dtype == value.dtype
    moments = [
        v for s in again.state.values() for n, v in s.items() if v.dim() and "scale" not in n
    ]
    assert {m.dtype for m in moments} <= {torch.int8, torch.uint8}
    for step in range(3, 6):
        for sparse, optimizer in ((a, one), (b, again)):
            set_gradients(sparse, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert written(b)


@pytest.mark.parametrize(("kind", "options"), KINDS[::2])
def test_eight_bit_moments_follow_the_fp32_ones(kind, options):
    """A noisy quadratic in 600 dimensions: the same way down, within a few percent."""
    torch.manual_seed(0)
    goal = torch.randn(600) * torch.logspace(-2, 1, 600)
    noise = [0.1 * torch.randn(600) for _ in range(150)]
    ends = []
    for bits in (32, 8):
        p = nn.Parameter(torch.zeros(600))
        optimizer = kind([p], lr=0.05, moment_bits=bits, **options)
        for shake in noise:
            p.grad = p.detach() - goal + shake
            optimizer.step()
        ends.append(float((p.detach() - goal).square().mean()))
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
    assert ends[0] < 0.9 * float(goal.square().mean())


def test_moment_codes_keep_small_values():
    """Half a code: of x relative to the largest, 1 / (127 sqrt(x)) or 2 / (255 x^(1/4)) of itself;
    and no second moment down to 0.
    """
    size = torch.logspace(-2, 0, QUANTUM)
    m, v = size * torch.randn(QUANTUM).sign(), size**2
    for x, dtype, half in (
        (m, torch.int8, 1 / (127 * size.sqrt())),
        (v, torch.uint8, 2 / (255 * size.sqrt())),
    ):
        codes, scales = torch.zeros(QUANTUM, dtype=dtype), torch.zeros(1)
        encode_moment_(x, codes, scales)
        back = decode_moment(codes, scales)
        assert ((back - x).abs() <= 1.1 * half * x.abs()).all()
        assert back.abs().argmax() == x.abs().argmax()
    tiny = torch.tensor([1.0, 1e-30] + [0.0] * 10)
    codes, scales = torch.zeros(12, dtype=torch.uint8), torch.zeros(1)
    encode_moment_(tiny, codes, scales)
    assert codes.tolist() == [255, 1] + [0] * 10


def test_stochastic_rounding_is_unbiased_reproducible_and_loads():
    def run(seed):
        model, sparse = attached(torch.bfloat16)
        optimizer = SparseAdamW(
            sparse.leaves.values(), lr=1e-4, stochastic_rounding=True, seed=seed
        )
        (masked,) = sparse._masked.values()
        up = 0.0
        for step in range(200):
            set_gradients(sparse, step)
            optimizer.step()
            exact = masked.base.float() + masked.leaf.detach()
            got = masked.weight.detach().flatten()[masked.indices.long()]
            assert rounds_either_way(got, masked.base, masked.leaf)
            up += float((got.float() - exact).sum())
        return model, sparse, up / exact.abs().sum().item()

    model, sparse, bias = run(3)
    again, _, _ = run(3)
    other, _, _ = run(4)
    weight = model[0].weight
    assert torch.equal(weight, again[0].weight)
    assert not torch.equal(weight, other[0].weight)
    assert not written(sparse)
    # 200 draws of errors below 2**-8, uniform: five standard deviations of their sum
    assert abs(bias) < 5 * 200**0.5 * 2**-8 / 3**0.5
    # A checkpoint of it belongs to its base, and is loaded as it is.
    state = copy.deepcopy(model.state_dict())
    fresh, sparse = attached(torch.bfloat16)
    fresh.load_state_dict(state)
    assert torch.equal(weight, fresh[0].weight)
    state["0.weight"].add_(1.0)
    with pytest.raises(BaseMismatchError):
        attached(torch.bfloat16)[0].load_state_dict(state)


@pytest.mark.parametrize("kind", [SparseAdamW, SparseLion, SparseSGD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_resumes_bit_for_bit(kind, dtype):
    def build():
        model, sparse = attached(dtype)
        return model, sparse, kind(sparse.parameters(), lr=1e-2, stochastic_rounding=True, seed=5)

    def train(sparse, optimizer, steps):
        for step in steps:
            set_gradients(sparse, step)
            optimizer.step()

    model, sparse, optimizer = build()
    train(sparse, optimizer, range(4))
    assert not written(sparse)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    fresh, again, second = build()
    fresh.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert torch.equal(fresh[0].weight, model[0].weight)
    for steps in (range(4, 5), range(5, 8)):
        train(sparse, optimizer, steps)
        train(again, second, steps)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_a_closure_sees_the_stochastically_rounded_weight():
    model, sparse = attached(torch.bfloat16)
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-2, stochastic_rounding=True)
    set_gradients(sparse, 0)
    optimizer.step()
    weight = model[0].weight.detach().clone()
    assert not written(sparse)
    seen = []
    optimizer.step(lambda: seen.append(model[0].weight.detach().clone()) or 0.0)
    assert torch.equal(seen[0], weight)


def test_momentum_switched_on_later_starts_with_the_gradient():
    (_, a), (_, b) = attached(), attached()
    one = SparseSGD(a.parameters(), lr=1e-2)
    other = torch.optim.SGD(b.parameters(), lr=1e-2, foreach=False)
    for step in range(6):
        for sparse, optimizer in ((a, one), (b, other)):
            if step == 3:
                optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)
            set_gradients(sparse, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("ours", [SparseAdamW, SparseSGD])
def test_torch_s_groups_load_too(ours):
    theirs = {SparseAdamW: torch.optim.AdamW, SparseSGD: torch.optim.SGD}[ours]
    (_, a), (_, b) = attached(), attached()
    one, other = ours(a.parameters(), lr=1.0), theirs(b.parameters(), lr=1e-2, foreach=False)
    set_gradients(b, 0)
    other.step()
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.copy_(q)
    one.load_state_dict(copy.deepcopy(other.state_dict()))
    for sparse, optimizer in ((a, one), (b, other)):
        set_gradients(sparse, 1)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    other.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize=True"):
        one.load_state_dict(other.state_dict())


def stepped(kind, **options):
    p = nn.Parameter(torch.ones(3))
    optimizer = kind([p], lr=1e-2, **options)
    p.grad = torch.ones(3)
    optimizer.step()
    return p, optimizer


def refuses(optimizer, state, match):
    """Loading raises, and leaves the optimizer as it was."""
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(copy.deepcopy(state))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for key, kept in before["state"].items():
        assert after["state"][key].keys() == kept.keys()
        assert all(torch.equal(after["state"][key][n], t) for n, t in kept.items())


@pytest.mark.parametrize("kind", [SparseAdamW, SparseLion])
def test_l2_of_adam_is_not_taken_for_decoupled_decay(kind):
    _, other = stepped(torch.optim.Adam, weight_decay=10)
    state = other.state_dict()
    if kind is SparseLion:
        for moments in state["state"].values():
            del moments["exp_avg_sq"]
    _, optimizer = stepped(kind)
    refuses(optimizer, state, "weight_decay=10 with decoupled_weight_decay=False")


def test_adam_without_decay_loads_as_adamw():
    p, other = stepped(torch.optim.Adam, foreach=False)
    q, optimizer = stepped(SparseAdamW, weight_decay=0.0)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert optimizer.param_groups[0]["decoupled_weight_decay"]  # if decay is switched on later
    for parameter, one in ((p, other), (q, optimizer)):
        parameter.grad = torch.tensor([1.0, -2.0, 0.5])
        one.step()
    assert torch.equal(p, q)


def test_torch_goes_on_with_decoupled_decay():
    """Adam, given a state with decay, keeps it decoupled."""
    p, optimizer = stepped(SparseAdamW, weight_decay=0.5)
    q, other = stepped(torch.optim.Adam, foreach=False)
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, one in ((p, optimizer), (q, other)):
        parameter.grad = torch.tensor([1.0, -2.0, 0.5])
        one.step()
    assert torch.equal(p, q)


def test_torch_does_not_take_codes_for_moments():
    _, optimizer = stepped(SparseAdamW, moment_bits=8)
    q, other = stepped(torch.optim.AdamW)
    other.load_state_dict(optimizer.state_dict())
    before = q.detach().clone()
    with pytest.raises(KeyError, match="exp_avg"):
        other.step()
    assert torch.equal(q, before)


TORCH = {SparseAdamW: torch.optim.AdamW, SparseSGD: torch.optim.SGD}


@pytest.mark.parametrize(("kind", "options"), [(SparseAdamW, {}), (SparseSGD, {"momentum": 0.9})])
def test_moments_of_the_other_precision_say_so(kind, options):
    _, theirs = stepped(TORCH[kind], **options)
    _, ours = stepped(kind, moment_bits=8, **options)
    refuses(ours, theirs.state_dict(), "32-bit moments.*build the optimizer with moment_bits=32")
    # Groups carry moment_bits, unless they are replaced or changed.
    _, wide = stepped(kind, **options)
    state = {"state": ours.state_dict()["state"], "param_groups": wide.state_dict()["param_groups"]}
    refuses(wide, state, "8-bit moments.*moment_bits=8")
    for optimizer, bits, had in ((ours, 32, 8), (wide, 8, 32)):
        optimizer.param_groups[0]["moment_bits"] = bits
        with pytest.raises(ValueError, match=f"{had}-bit moments"):
            optimizer.step()


@pytest.mark.parametrize(
    ("kind", "theirs", "options", "name"),
    [
        (SparseAdamW, torch.optim.SGD, {"momentum": 0.9}, "momentum_buffer"),
        (SparseLion, torch.optim.AdamW, {}, "exp_avg_sq"),
        (SparseSGD, torch.optim.AdamW, {}, "exp_avg"),
    ],
)
def test_the_state_of_another_rule_is_refused(kind, theirs, options, name):
    _, other = stepped(theirs, **options)
    _, optimizer = stepped(kind)
    refuses(optimizer, other.state_dict(), f"parameter 0 has '{name}'")


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (SparseAdamW, {"lr": -1.0}, "lr"),
        (SparseAdamW, {"lr": torch.tensor(float("nan"))}, "lr"),
        (SparseAdamW, {"betas": (0.9, 1.0)}, "betas"),
        (SparseAdamW, {"eps": -1e-8}, "eps"),
        (SparseAdamW, {"weight_decay": -1.0}, "weight_decay"),
        (SparseAdamW, {"moment_bits": 16}, "moment_bits=16"),
        (SparseAdamW, {"maximize": True}, "maximize=True"),
        (SparseAdamW, {"amsgrad": True}, "amsgrad=True"),
        (SparseAdamW, {"decoupled_weight_decay": False}, "decoupled_weight_decay=False"),
        (SparseLion, {"betas": (1.0, 0.9)}, "betas"),
        (SparseLion, {"moment_bits": 16}, "moment_bits=16"),
        (SparseSGD, {"nesterov": True}, "nesterov"),
        (SparseSGD, {"momentum": -0.1}, "momentum"),
        (SparseSGD, {"maximize": True}, "maximize=True"),
    ],
)
def test_options_of_a_group_are_checked(kind, options, word):
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    with pytest.raises(ValueError, match=word):
        kind([{"params": [p], **options}], weight_decay=0.1)
    optimizer = kind([p], weight_decay=0.1)
    with pytest.raises(ValueError, match=word):
        optimizer.add_param_group({"params": [q], **options})
    assert len(optimizer.param_groups) == 1
    if "lr" not in options:  # schedulers may end at a rounding error below 0
        state = optimizer.state_dict()
        state["param_groups"][0].update(options)
        refuses(optimizer, state, word)


def test_a_group_brings_the_momentum_that_its_nesterov_needs():
    group = {"params": nn.Parameter(torch.zeros(1)), "nesterov": True, "momentum": 0.9}
    optimizer = pickle.loads(pickle.dumps(SparseSGD([group])))
    assert optimizer.param_groups[0]["nesterov"]
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_state_that_does_not_fit_is_named():
    _, sparse = attached()
    optimizer = SparseAdamW(sparse.parameters())
    set_gradients(sparse, 0)
    optimizer.step()
    leaf = next(iter(sparse.leaves.values()))
    optimizer.state[leaf]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 0 is .*\(1,\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="moment_bits=16"):
        SparseLion([leaf], moment_bits=16)


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        SparseAdamW.__base__([nn.Parameter(torch.zeros(1))], {"moment_bits": 32})


def test_gradients_of_another_dtype_are_cast():
    a, b = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    a.grad_dtype = torch.bfloat16
    a.grad, b.grad = torch.full((3,), 0.5, dtype=torch.bfloat16), torch.full((3,), 0.5)
    for p in (a, b):
        SparseSGD([p], lr=0.1, momentum=0.9).step()
    assert torch.equal(a, b)
