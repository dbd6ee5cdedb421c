"""torch.func, forward-mode differentiation and functional_call over masked models: the dense
model's results at the mask, or an error that names the parameter and the way out.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from sparseft import SparseAdamW, attach
from sparseft.errors import AttachError


class Net(nn.Module):
    """Embedding tied to the head, two linear layers, a norm: fused and generic reads."""

    def __init__(self, width: int = 6, vocab: int = 11) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        self.up = nn.Linear(width, 9)
        self.norm = nn.LayerNorm(9)
        self.down = nn.Linear(9, width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.emb.weight

    def body(self, h):
        return h + self.down(torch.tanh(self.norm(self.up(h))))

    def forward(self, ids):
        return self.head(self.body(self.emb(ids)))


def trained(dtype=torch.float64, seed=0):
    """Return an attached model with diffs in it, its plain twin of the same weights, and ids."""
    torch.manual_seed(seed)
    model = Net().to(dtype)
    sparse = attach(model, {n: torch.rand(p.shape) < 0.3 for n, p in model.named_parameters()})
    with torch.no_grad():
        for leaf in sparse.leaves.values():
            leaf.copy_(torch.randn_like(leaf) * 0.3)
    sparse.sync_()
    twin = Net().to(dtype)
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if "diff_" not in n})
    return model, sparse, twin, torch.randint(0, 11, (4, 5))


def loss_of(model, parameters, ids):
    logits = functional_call(model, parameters, (ids,))
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def leaves_of(sparse):
    return {n: p.detach() for n, p in sparse.named_parameters()}


def at_masks(sparse, dense):
    """Gather dense gradients, by parameter name, as gradients of the leaves by theirs."""
    found = {}
    for (name, pattern), key in zip(sparse.patterns.items(), leaves_of(sparse), strict=True):
        found[key] = dense[name].flatten(-len(pattern.shape))[..., pattern.indices.long()]
    return found


def check_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].abs().max() > 0, name
        torch.testing.assert_close(mine[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}")


def test_grad_of_leaves_is_the_dense_gradient_at_the_mask():
    model, sparse, twin, ids = trained()
    dense = grad(lambda p: loss_of(twin, p, ids))(dict(twin.named_parameters()))
    wanted = at_masks(sparse, dense)
    check_same(grad(lambda p: loss_of(model, p, ids))(leaves_of(sparse)), wanted)
    # make_functional's way: everything that named_parameters() has
    both = {n: p.detach() for n, p in model.named_parameters()}
    found = grad(lambda p: loss_of(model, p, ids))(both)
    check_same({n: found[n] for n in wanted}, wanted)
    frozen = found["up.weight"].flatten()[sparse.patterns["up.weight"].indices.long()]
    assert not frozen.any(), "masked entries of the weight itself are the leaf's"


def test_per_sample_gradients():
    model, sparse, twin, ids = trained()

    def each(net, parameters):
        return vmap(grad(lambda p, i: loss_of(net, p, i[None])), in_dims=(None, 0))(parameters, ids)

    dense = each(twin, {n: p.detach() for n, p in twin.named_parameters()})
    check_same(each(model, leaves_of(sparse)), at_masks(sparse, dense))


TRANSFORMS = {
    "grad": lambda f, h: grad(lambda x: f(x).pow(2).sum())(h),
    "vjp": lambda f, h: vjp(f, h)[1](torch.ones_like(h))[0],
    "jvp": lambda f, h: jvp(f, (h,), (torch.ones_like(h),))[1],
    "linearize": lambda f, h: linearize(f, h)[1](torch.ones_like(h)),
    "jacrev": lambda f, h: jacrev(f)(h),
    "jacfwd": lambda f, h: jacfwd(f)(h),
    "hessian": lambda f, h: hessian(lambda x: f(x).pow(2).sum())(h),
    "vmap": lambda f, h: vmap(f)(h),
    "functionalize": lambda f, h: functionalize(f)(h),
    "grad of grad": lambda f, h: grad(lambda x: grad(lambda y: f(y).pow(3).sum())(x).sum())(h),
    "jacobian": lambda f, h: torch.autograd.functional.jacobian(f, h),
    "jacobian, forward": lambda f, h: torch.autograd.functional.jacobian(
        f, h, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # linearize's
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_of_the_input(kind):
    """Masked layers are closed over."""
    model, _, twin, _ = trained()
    h = torch.randn(2, 6, dtype=torch.float64)
    mine, theirs = (TRANSFORMS[kind](net.body, h) for net in (model, twin))
    assert theirs.detach().abs().max() > 0
    torch.testing.assert_close(mine, theirs)


def test_second_derivatives_of_leaves():
    model, sparse, twin, ids = trained()

    def curvature(net, name, given):
        return hessian(lambda w: loss_of(net, {name: w}, ids))(given)

    dense = curvature(twin, "down.bias", twin.down.bias.detach())
    at = sparse.patterns["down.bias"].indices.long()
    mine = curvature(model, "down.diff_bias", sparse.leaves["down.bias"].detach())
    torch.testing.assert_close(mine, dense[at][:, at])


def test_leaves_train_through_a_transform():
    """What a vmapped forward computes is differentiable for torch.autograd around it."""
    model, sparse, _, ids = trained(torch.float32)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    wanted = {n: p.grad.clone() for n, p in sparse.leaves.items()}
    model.zero_grad()
    logits = vmap(lambda i: model(i[None])[0])(ids)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    check_same({n: p.grad for n, p in sparse.leaves.items()}, wanted)


def test_forward_mode():
    model, sparse, twin, ids = trained()
    h = torch.randn(2, 6, dtype=torch.float64)
    tangents = []
    for net in (model, twin):
        with forward_ad.dual_level():
            out = net.body(forward_ad.make_dual(h, torch.ones_like(h)))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(*tangents)
    # along a leaf: the sum of the gradient
    leaf = sparse.leaves["up.weight"].detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
        mine = forward_ad.unpack_dual(loss_of(model, {"up.diff_weight": dual}, ids)).tangent
    dense = grad(lambda p: loss_of(twin, p, ids))(dict(twin.named_parameters()))
    torch.testing.assert_close(mine, at_masks(sparse, dense)["up.diff_weight"].sum())


@pytest.mark.parametrize("grads", [True, False])
def test_functional_call_computes_with_the_leaves_it_got(grads):
    """Also for the tied head, which has no leaf of its own, and under no_grad."""
    model, sparse, _, ids = trained()
    other = {n: p.detach() * 2 + 0.1 for n, p in sparse.named_parameters()}
    with torch.set_grad_enabled(grads):
        found = functional_call(model, other, (ids,))
    with torch.no_grad():
        for name, leaf in sparse.named_parameters():
            leaf.copy_(other[name])
        sparse.sync_()
        torch.testing.assert_close(found.detach(), model(ids))


def test_functional_call_with_a_weight_takes_it_as_it_is():
    """An average of weights, say; one that requires grad gets all of its gradient."""
    model, _, twin, ids = trained()
    given = {"up.weight": torch.randn(9, 6, dtype=torch.float64, requires_grad=True)}
    results = []
    for net in (model, twin):
        loss = loss_of(net, given, ids)
        results.append((loss.detach(), *torch.autograd.grad(loss, given["up.weight"])))
    torch.testing.assert_close(results[0], results[1])


def test_an_ensemble_of_copies():
    """stack_module_state: leaves, and bases, of several models with the same masks."""
    first, sparse, _, ids = trained()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for name, p in second.named_parameters():
            if "diff_" in name:
                p.mul_(-1.5)
        from sparseft.attachment import attachments_of

        attachments_of(second)[-1].sync_()
        wanted = torch.stack([net(ids) for net in (first, second)])
    parameters, buffers = stack_module_state([first, second])
    call = vmap(lambda p, b: functional_call(first, (p, b), (ids,)))
    torch.testing.assert_close(call(parameters, buffers), wanted)
    with torch.no_grad():
        torch.testing.assert_close(call(parameters, buffers), wanted)


def test_a_batch_of_gradients_is_a_named_error():
    model, _, _, _ = trained()
    h = torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(AttachError, match=r"batch of gradients.*weight.*torch\.func"):
        torch.autograd.functional.jacobian(model.body, h, vectorize=True)


@pytest.mark.parametrize("layer", ["up", "head"])
def test_second_derivatives_outside_of_torch_func_are_a_named_error(layer):
    """Not zero, either, for whoever asks for that of the input alone."""
    torch.manual_seed(0)
    net = Net()
    attach(net, {f"{layer}.weight": torch.rand(net.get_parameter(f"{layer}.weight").shape) < 0.5})
    module = getattr(net, layer)
    h = torch.randn(2, 6)
    with pytest.raises(AttachError, match=r"double backward.*weight.*torch\.func"):
        torch.autograd.functional.hessian(lambda x: module(x).pow(3).sum(), h)


def test_training_goes_on_without_dense_gradients(monkeypatch):
    """An ordinary step never spells a weight out. (Compiled: see test_compile.py.)"""
    from sparseft.modules import functional

    model, sparse, _, ids = trained(torch.float32)
    grad(lambda p: loss_of(model, p, ids))(leaves_of(sparse))

    def never(*args):
        raise AssertionError("a dense weight in an ordinary step")

    monkeypatch.setattr(functional, "_with_diff", never)
    optimizer = SparseAdamW(sparse.parameters())
    for _ in range(2):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    with pytest.raises(AssertionError, match="dense weight"):
        grad(lambda p: loss_of(model, p, ids))(leaves_of(sparse))
