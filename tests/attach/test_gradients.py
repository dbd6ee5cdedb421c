"""The gradient of a leaf is the dense gradient of its weight, gathered at the mask."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseft import attach
from sparseft.errors import AttachError


def leaf_gradients(model, masks, run, **options):
    sparse = attach(model, masks, **options)
    run(model).backward()
    return {name: leaf.grad for name, leaf in sparse.leaves.items()}


def dense_gradients(model, masks, run):
    run(model).backward()
    return {name: model.get_parameter(name).grad[mask] for name, mask in masks.items()}


def rel_rms(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def check(model, run, masks, tolerance=1e-5):
    dense = dense_gradients(copy.deepcopy(model), masks, run)
    sparse = leaf_gradients(model, masks, run)
    for name, expected in dense.items():
        assert sparse[name] is not None, name
        assert sparse[name].dtype == torch.float32
        assert expected.abs().max() > 0, f"{name}: the case tests nothing"
        assert rel_rms(sparse[name], expected) <= tolerance, name


def test_every_tier_in_one_model(tiny, ids, kit):
    check(tiny, lambda m: kit.loss(m, ids), kit.masks(tiny))


def conv1d_model():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(Conv1D(6, 5), nn.Tanh(), Conv1D(3, 6))


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 3.0


class Around(nn.Linear):
    """Reads its weight itself, around the stock forward."""

    def forward(self, input):
        return input @ self.weight.t() + self.bias


class InPlace(nn.Module):
    """Writes into the output of a masked layer, which a view made in a Function would refuse."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        y = self.a(x)
        y += x
        return self.b(y.relu_())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(5, 5)

    def forward(self, x):
        return self.cell(torch.tanh(self.cell(x)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(5, 4, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def tokens(*shape):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(3))


def floats(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


CASES = {
    "linear_2d": (lambda: nn.Linear(5, 4), lambda: floats(6, 5)),
    "linear_3d": (lambda: nn.Linear(5, 4), lambda: floats(2, 3, 5)),
    "linear_1d": (lambda: nn.Linear(5, 4), lambda: floats(5)),
    "linear_strided": (lambda: nn.Linear(5, 4), lambda: floats(5, 3, 2).permute(2, 1, 0)),
    "linear_no_bias": (lambda: nn.Linear(5, 4, bias=False), lambda: floats(2, 3, 5)),
    "linear_one_token": (lambda: nn.Linear(5, 4), lambda: floats(1, 1, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: tokens(3, 5)),
    "embedding_padding": (lambda: nn.Embedding(11, 6, padding_idx=-2), lambda: tokens(3, 5)),
    "embedding_by_freq": (
        lambda: nn.Embedding(11, 6, scale_grad_by_freq=True),
        lambda: tokens(3, 5),
    ),
    "embedding_subclass": (lambda: Scaled(11, 6), lambda: tokens(3, 5)),
    "embedding_bag": (lambda: nn.EmbeddingBag(11, 6), lambda: tokens(3, 5)),
    "linear_around": (lambda: Around(5, 4), lambda: floats(2, 3, 5)),
    "conv1d": (conv1d_model, lambda: floats(2, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), lambda: floats(2, 3, 6, 5)),
    "layer_norm": (lambda: nn.LayerNorm(7), lambda: floats(3, 7)),
    "batch_norm": (lambda: nn.BatchNorm1d(5), lambda: floats(6, 5)),
    "in_place": (InPlace, lambda: floats(6, 5)),
    "used_twice": (Twice, lambda: floats(6, 5)),
    "bilinear": (lambda: nn.Sequential(nn.Linear(5, 5), nn.GELU()), lambda: floats(6, 5)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: floats(2, 3, 5)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: floats(2, 3, 5)),
}


@pytest.mark.parametrize("case", CASES, ids=CASES)
def test_leaf_gradient_is_the_dense_one_at_the_mask(case, kit):
    build, inputs = CASES[case]
    torch.manual_seed(0)
    model = build()
    x = inputs()
    weights = floats(1000)

    def run(m):
        y = m(x).flatten()
        return (y * weights[: y.numel()]).sum() + y.pow(2).sum()

    check(model, run, kit.masks(model, density=0.5))


def test_input_gradient_is_the_stock_one_bit_for_bit():
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    masked = copy.deepcopy(stock)
    attach(masked, {"0.weight": torch.ones(7, 5) > 0, "1.weight": torch.ones(3, 7) > 0})
    x, y = floats(2, 3, 5).requires_grad_(), floats(2, 3, 5).requires_grad_()
    a, b = stock(x), masked(y)
    assert torch.equal(a, b)
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("mode", ["linear", "conv1d", "embedding", "alias"])
def test_gradcheck_through_an_attached_model(mode):
    torch.manual_seed(0)
    if mode == "conv1d":
        model = conv1d_model().double()
        name, x = "0.weight", floats(2, 3, 5).double().requires_grad_()
    elif mode == "embedding":
        model, name, x = nn.Embedding(11, 3).double(), "weight", tokens(2, 4)
    elif mode == "linear":
        model, name = nn.Linear(5, 4).double(), "weight"
        x = floats(2, 3, 5).double().requires_grad_()
    else:
        model, name = nn.LayerNorm(5).double(), "bias"
        x = floats(3, 5).double().requires_grad_()
    mask = torch.rand(model.get_parameter(name).shape) < 0.5
    mask.view(-1)[0] = True
    sparse = attach(model, {name: mask})
    leaf = sparse.leaves[name]
    assert leaf.dtype == torch.float64

    def evaluate(values, x):
        with torch.no_grad():
            leaf.copy_(values)
        sparse.sync_()
        with torch.enable_grad():
            return model(x).pow(2)

    class Model(torch.autograd.Function):
        """The attached model as a function of its leaf's values, run again for each question."""

        @staticmethod
        def forward(ctx, values, x):
            ctx.save_for_backward(values, x)
            return evaluate(values, x).detach()

        @staticmethod
        def backward(ctx, grad):
            values, x = ctx.saved_tensors
            x = x.detach().requires_grad_(x.is_floating_point())
            wanted = (leaf, x) if x.requires_grad else (leaf,)
            return (*torch.autograd.grad(evaluate(values, x), wanted, grad), None)[:2]

    values = torch.randn(leaf.shape, dtype=torch.float64) * 0.1
    assert torch.autograd.gradcheck(Model.apply, (values.requires_grad_(), x))


def test_accumulates_over_micro_batches(tiny, ids, kit):
    sparse = attach(tiny, kit.masks(tiny))
    for row in ids:
        (kit.loss(tiny, row[None]) / len(ids)).backward()
    parts = {n: leaf.grad.clone() for n, leaf in sparse.leaves.items()}
    for leaf in sparse.leaves.values():
        leaf.grad = None
    kit.loss(tiny, ids).backward()
    for name, leaf in sparse.leaves.items():
        assert rel_rms(parts[name], leaf.grad) < 1e-5, name


def test_nothing_is_recorded_without_grad_mode(tiny, ids, kit):
    sparse = attach(tiny, kit.masks(tiny))
    tiny.eval()
    with torch.no_grad():
        assert not tiny(ids).requires_grad
        assert tiny.up.weight is tiny.up._parameters["weight"]
    with torch.inference_mode():
        tiny(ids)
    # Frozen leaves (a phase that trains something else) read the plain parameter, too.
    for leaf in sparse.leaves.values():
        leaf.requires_grad_(False)
    assert tiny.up.weight is tiny.up._parameters["weight"]
    assert not tiny(ids).requires_grad


def test_eval_mode_fast_paths_see_the_trained_weights(kit):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    sparse = attach(layer, kit.masks(layer))
    x = floats(2, 5, 8)
    with torch.no_grad():
        for leaf in sparse.leaves.values():
            leaf.normal_()
    sparse.sync_()
    layer.eval()
    with torch.no_grad():
        fast = layer(x)
    slow = layer(x)
    assert slow.requires_grad
    assert not fast.requires_grad
    assert torch.allclose(fast, slow, atol=1e-5)
    slow.sum().backward()
    assert all(leaf.grad is not None for leaf in sparse.leaves.values())


@pytest.mark.parametrize("layer", ["up", "emb", "norm"])
def test_double_backward_is_a_named_error(layer, tiny, ids, kit):
    attach(tiny, {f"{layer}.weight": kit.masks(tiny)[f"{layer}.weight"]})
    h = torch.randn(3, 7, 8, requires_grad=True)
    outputs = {
        "up": lambda: tiny.up(h).pow(3).sum(),
        "emb": lambda: (tiny.emb(ids) * h).pow(3).sum() + tiny.head(h).pow(3).sum(),
        "norm": lambda: tiny.norm(h).pow(3).sum(),
    }
    wanted = [h, tiny.get_parameter(f"{layer}.diff_weight")]
    grads = torch.autograd.grad(outputs[layer](), wanted, create_graph=True)
    with pytest.raises(AttachError, match=f"double backward.*{layer}.weight"):
        sum(g.pow(2).sum() for g in grads).backward()


def test_double_backward_of_a_linear_loss_is_no_silent_zero(tiny, kit):
    """dX = W there: constant in the output's gradient, but not in the leaf."""
    attach(tiny, {"up.weight": kit.masks(tiny)["up.weight"]})
    h = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(tiny.up(h).sum(), h, create_graph=True)
    with pytest.raises(AttachError, match=r"double backward.*up.weight"):
        dx.pow(2).sum().backward()


def test_first_derivatives_with_create_graph_are_right(tiny, ids, kit):
    sparse = attach(tiny, kit.masks(tiny))
    leaves = list(sparse.leaves.values())
    plain = torch.autograd.grad(kit.loss(tiny, ids), leaves)
    graph = torch.autograd.grad(kit.loss(tiny, ids), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph, strict=True))


def test_a_step_between_forward_and_backward_is_noticed(tiny, ids, kit):
    sparse = attach(tiny, kit.masks(tiny))
    loss = kit.loss(tiny, ids)
    with torch.no_grad():
        sparse.leaves["up.weight"].add_(1)
    sparse.sync_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_bases(dtype, ids, kit):
    model = kit.make(dtype)
    masks = kit.masks(model)
    exact = dense_gradients(kit.make(dtype).double(), masks, lambda m: kit.loss(m, ids))
    stock = dense_gradients(kit.make(dtype), masks, lambda m: kit.loss(m, ids))
    ours = leaf_gradients(model, masks, lambda m: kit.loss(m, ids))
    for name, reference in exact.items():
        # Summed in fp32 at the mask, so no worse than what torch loses in this dtype.
        limit = 2 * rel_rms(stock[name], reference) + torch.finfo(dtype).eps
        assert rel_rms(ours[name], reference) <= limit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_stock_forward_and_gradients(dtype, ids, kit):
    masks = kit.masks(kit.make())

    def run(m):
        with torch.autocast("cpu", dtype):
            return kit.loss(m, ids)

    stock, model = kit.make(), kit.make()
    dense = dense_gradients(stock, masks, run)
    ours = leaf_gradients(model, masks, run)
    assert torch.equal(run(stock), run(model))
    for name, reference in dense.items():
        assert rel_rms(ours[name], reference) <= 4 * torch.finfo(dtype).eps, name


def test_autocast_saves_the_input_once_and_no_weight(ids):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    attach(layer, {"weight": torch.rand(64, 64) < 0.1})
    saved = []
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    y.float().sum().backward()
    weight = layer._parameters["weight"]
    big = [t for t in saved if t.numel() == weight.numel()]
    assert all(t.data_ptr() == weight.data_ptr() for t in big), "a cast of the weight was kept"
    inputs = [t for t in saved if t.shape == x.shape]
    assert [t.dtype for t in inputs] == [torch.bfloat16]


def test_a_bias_next_to_a_masked_weight_trains_densely(ids, kit):
    torch.manual_seed(0)
    stock = nn.Linear(5, 4)
    model = copy.deepcopy(stock)
    x = floats(6, 5)
    attach(model, {"weight": torch.ones(4, 5) > 0}, full_params=["bias"])
    F.mse_loss(model(x), torch.zeros(6, 4)).backward()
    F.mse_loss(stock(x), torch.zeros(6, 4)).backward()
    assert torch.equal(model.bias.grad, stock.bias.grad)
