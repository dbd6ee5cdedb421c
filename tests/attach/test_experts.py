"""Stacked weights of experts: however a layer reads them, gradients come at the mask alone."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseft
from sparseft import attach
from sparseft.errors import AttachError
from sparseft.modules import GradientScores, experts, taps
from sparseft.profiling.allocations import Allocations, peak_of

EXPERTS, ROWS = 4, 12


class Experts(nn.Module):
    """One layer of experts whose forward is given: ``(weight, rows, expert of each row)``."""

    def __init__(self, forward, outputs: int = 8, inputs: int = 8) -> None:
        super().__init__()
        self.reads = forward
        self.stack = nn.Parameter(torch.randn(EXPERTS, outputs, inputs))

    def forward(self, x: Tensor, whose: Tensor) -> Tensor:
        return self.reads(self, x, whose)


def by_expert(layer, x, whose, product):
    """Run ``product(rows, expert)`` for each expert that got rows, as eager loops do."""
    y = torch.zeros_like(x)
    for expert in whose.unique():
        rows = (whose == expert).nonzero().view(-1)
        y = y.index_add(0, rows, product(layer, x[rows], expert))
    return y


def linear(layer, x, whose):
    return by_expert(layer, x, whose, lambda s, rows, e: F.linear(rows, s.stack[e]))


def by_number(layer, x, whose):
    return by_expert(layer, x, whose, lambda s, rows, e: F.linear(rows, s.stack[int(e) - EXPERTS]))


def with_bias(layer, x, whose):
    bias = torch.arange(8.0)
    return by_expert(layer, x, whose, lambda s, rows, e: F.linear(rows, s.stack[e], bias))


def matmul(layer, x, whose):
    return by_expert(layer, x, whose, lambda s, rows, e: rows @ s.stack[e])


def turned(layer, x, whose):
    return by_expert(layer, x, whose, lambda s, rows, e: torch.mm(rows, s.stack[e].t()))


def turned_linear(layer, x, whose):
    return by_expert(layer, x, whose, lambda s, rows, e: F.linear(rows, s.stack[e].T))


def grouped(layer, x, whose):
    order = whose.argsort(stable=True)
    ends = torch.bincount(whose, minlength=EXPERTS).cumsum(0, dtype=torch.int32)
    y = F.grouped_mm(x[order], layer.stack.transpose(-2, -1), offs=ends)
    return torch.zeros_like(x).index_copy(0, order, y)


def grouped_as_stored(layer, x, whose):
    order = whose.argsort(stable=True)
    ends = torch.bincount(whose, minlength=EXPERTS).cumsum(0, dtype=torch.int32)
    return torch.zeros_like(x).index_copy(0, order, F.grouped_mm(x[order], layer.stack, offs=ends))


def pairs(layer, x, whose):
    return torch.bmm(layer.stack[whose], x.unsqueeze(-1)).squeeze(-1)


def pairs_turned(layer, x, whose):
    return torch.bmm(x.unsqueeze(1), layer.stack[whose]).squeeze(1)


def blocks(layer, x, whose):
    return torch.bmm(x.view(EXPERTS, -1, 8), layer.stack).view_as(x)


def blocks_turned(layer, x, whose):
    return (x.view(EXPERTS, -1, 8) @ layer.stack.mT).view_as(x)


def keywords(layer, x, whose):
    y = by_expert(
        layer, x, whose, lambda s, rows, e: F.linear(input=rows, weight=s.stack[e], bias=None)
    )
    return y + torch.mm(x, mat2=layer.stack[0]) + torch.matmul(input=x, other=layer.stack[2])


def pairs_from_the_end(layer, x, whose):
    return pairs(layer, x, whose - EXPERTS)


def changed_after(layer, x, whose):
    y = torch.bmm(x.unsqueeze(1), layer.stack[whose])
    z = torch.bmm(layer.stack[whose], x.unsqueeze(-1))
    return y.relu_().squeeze(1) + z.mul_(2).squeeze(-1)


def first_without_grad(layer, x, whose):
    stack = layer.stack
    with torch.no_grad():
        y = F.linear(x, stack[0])
    return F.linear(x, stack[2]) * y


FUSED = [
    linear, by_number, with_bias, matmul, turned, turned_linear, grouped, grouped_as_stored,
    pairs, pairs_turned, blocks, blocks_turned,
    keywords, pairs_from_the_end, changed_after, first_without_grad,
]  # fmt: skip


def einsum(layer, x, whose):
    return torch.einsum("ni,eoi->no", x, layer.stack)


def squares(layer, x, whose):
    return x * layer.stack.square().sum((0, 1)) + layer.stack[1:3].mean() + layer.stack[0, 0]


def both(layer, x, whose):
    return linear(layer, x, whose) + einsum(layer, x, whose)


def outside(layer, x, whose):
    """A read that torch does not ask Python about."""
    return x * Doubled.apply(layer.stack).sum()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return 2 * w

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def broadcast(layer, x, whose):
    y = (x[:1].unsqueeze(1) @ layer.stack[whose]).squeeze(1)
    z = (layer.stack[whose[:1]] @ x.unsqueeze(-1)).squeeze(-1)
    return y + z + (x[None] @ layer.stack).sum(0)


def changed_before(layer, x, whose):
    """In-place operations on the copies that a choice of experts makes."""
    scaled, turned, zeroed = layer.stack[whose], layer.stack[whose], layer.stack[whose]
    scaled *= 2
    turned.transpose_(1, 2)
    zeroed[0] = 0
    chosen = scaled, turned, zeroed
    return sum(torch.bmm(c, x.unsqueeze(-1)).squeeze(-1) for c in chosen)


def hooked(layer, x, whose):
    matrix = layer.stack[2]
    matrix.register_hook(lambda grad: 3 * grad)
    return F.linear(x, matrix)


def given_out(layer, x, whose):
    stack, y = layer.stack, torch.empty_like(x, requires_grad=False)
    with torch.no_grad():
        torch.mm(x, stack[2], out=y)
    return x @ stack[0].square() * y


GENERIC = [einsum, squares, both, outside, broadcast, changed_before, hooked, given_out]


def pair_of(reads, density=0.3, seed=0):
    """Return (stock layer, the same with a mask, its attachment); expert 1 has no entry in it."""
    torch.manual_seed(seed)
    stock = Experts(reads)
    layer = copy.deepcopy(stock)
    mask = torch.rand(stock.stack.shape) < density
    mask[1] = False
    return stock, layer, attach(layer, {"stack": mask})


def rows(seed=1):
    generator = torch.Generator().manual_seed(seed)
    whose = torch.randint(0, EXPERTS - 1, (ROWS,), generator=generator)  # the last one gets none
    return torch.randn(ROWS, 8, generator=generator), whose


def backward(layer, x, whose):
    x = x.clone().requires_grad_()
    y = layer(x, whose)
    y.float().square().sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("reads", [*FUSED, *GENERIC], ids=lambda f: f.__name__)
def test_outputs_and_gradients_are_the_stock_ones(reads):
    stock, layer, sparse = pair_of(reads)
    (y, dx), (wanted_y, wanted_dx) = backward(layer, *rows()), backward(stock, *rows())
    assert torch.equal(y, wanted_y)
    torch.testing.assert_close(dx, wanted_dx)
    wanted = stock.stack.grad.flatten()[sparse.patterns["stack"].indices.long()]
    torch.testing.assert_close(sparse.leaves["stack"].grad, wanted)


@pytest.mark.parametrize("reads", FUSED, ids=lambda f: f.__name__)
def test_known_reads_make_no_dense_gradient(reads, monkeypatch):
    def dense(ctx, *grads):
        raise AssertionError("a dense gradient")

    monkeypatch.setattr(taps._AliasAtMask, "backward", staticmethod(dense))
    _, layer, _ = pair_of(reads)
    backward(layer, *rows())
    with pytest.raises(AssertionError, match="a dense gradient"):
        backward(pair_of(einsum)[1], *rows())


@pytest.mark.parametrize("reads", [linear, matmul, pairs, pairs_turned, blocks])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(reads, dtype):
    stock, layer, sparse = pair_of(reads)
    x, whose = rows()
    if reads in (linear, matmul):  # whose sums are of x's dtype
        x = x.to(dtype)
    with torch.autocast("cpu", dtype):
        y, wanted_y = layer(x, whose), stock(x, whose)
    assert y.dtype == wanted_y.dtype
    assert torch.equal(y, wanted_y)
    for one in (y, wanted_y):
        one.float().square().sum().backward()
    wanted = stock.stack.grad.flatten()[sparse.patterns["stack"].indices.long()]
    error = (sparse.leaves["stack"].grad - wanted).norm() / wanted.norm()
    assert error < torch.finfo(dtype).eps


@pytest.mark.parametrize("reads", [linear, grouped])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing(reads, reentrant):
    from torch.utils.checkpoint import checkpoint

    _, layer, sparse = pair_of(reads)
    _, plain, expected = pair_of(reads)
    x, whose = rows()
    inputs = x.clone().requires_grad_()
    checkpoint(layer, inputs, whose, use_reentrant=reentrant).square().sum().backward()
    backward(plain, x, whose)
    assert torch.equal(sparse.leaves["stack"].grad, expected.leaves["stack"].grad)


def test_a_checkpoint_inside_of_a_forward():
    """Not every kind of it works, as the troubleshooting page says; none is silently wrong."""
    from torch.utils.checkpoint import CheckpointError, checkpoint

    def inside(layer, x, whose):
        def part(x):
            return F.linear(x, layer.stack[0])

        return checkpoint(part, x, use_reentrant=layer.reentrant)

    stock, layer, sparse = pair_of(inside)
    stock.reentrant = layer.reentrant = True
    backward(stock, *rows()), backward(layer, *rows())
    wanted = stock.stack.grad.flatten()[sparse.patterns["stack"].indices.long()]
    torch.testing.assert_close(sparse.leaves["stack"].grad, wanted)
    layer.reentrant = False
    with pytest.raises(CheckpointError, match="A different number of tensors was saved"):
        backward(layer, *rows())


def test_masks_that_move_are_followed():
    stock, layer, sparse = pair_of(linear)
    backward(layer, *rows())
    mask = torch.zeros(EXPERTS, 8, 8, dtype=torch.bool)
    mask[:, 2, 3] = True
    sparse.reselect_({"stack": mask}, optimizer=None)
    sparse.leaves["stack"].grad = None
    backward(layer, *rows())
    backward(stock, *rows())
    torch.testing.assert_close(sparse.leaves["stack"].grad, stock.stack.grad[mask])


@pytest.mark.parametrize("reads", [linear, grouped])
def test_gradient_scores_see_entries_outside_the_mask(reads):
    stock, layer, sparse = pair_of(reads)
    with GradientScores(layer, ["stack"], candidates={"stack": layer.stack.numel()}) as scores:
        backward(layer, *rows())
        scores.step()
    backward(stock, *rows())
    indices, values = scores.finish()["stack"]
    dense = stock.stack.grad.flatten()
    torch.testing.assert_close(values.abs().float(), dense[indices.long()].abs())
    assert indices.numel() > sparse.nnz
    wanted = dense[sparse.patterns["stack"].indices.long()]
    torch.testing.assert_close(sparse.leaves["stack"].grad, wanted)


def test_experts_changed_after_they_were_chosen_are_refused_as_torch_does():
    def changed(layer, x, whose):
        matrices = layer.stack[whose]
        whose.zero_()
        return torch.bmm(matrices, x.unsqueeze(-1)).squeeze(-1)

    for layer in pair_of(changed)[:2]:
        x, whose = rows()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(layer, x, whose.clone())


def test_forwards_in_threads_and_copies_inside_one():
    """What a forward knows of its reads is its thread's alone, and no part of the module."""

    def slow(layer, x, whose):
        first = layer.stack[0]
        barrier.wait(10)  # both are inside now
        y = F.linear(x, first) + F.linear(x, layer.stack[2])
        copy.deepcopy(layer)
        pickle.dumps(layer.state_dict())
        return y

    barrier = threading.Barrier(2)
    stock, layer, sparse = pair_of(slow)
    before, grads = set(layer.__dict__), []
    leaf = sparse.leaves["stack"]

    def run():
        grads.append(torch.autograd.grad(layer(*rows()).square().sum(), leaf)[0])

    workers = [threading.Thread(target=run) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(layer.__dict__) == before
    assert type(layer.stack) is Tensor  # no forward, no forward's reads
    barrier = threading.Barrier(1)
    backward(stock, *rows())
    wanted = stock.stack.grad.flatten()[sparse.patterns["stack"].indices.long()]
    assert len(grads) == 2
    for grad in grads:
        torch.testing.assert_close(grad, wanted)


def test_a_kept_loss_keeps_no_model():
    _, layer, sparse = pair_of(grouped)
    loss = layer(*rows()).sum()
    model, masked = weakref.ref(layer), weakref.ref(sparse._masked["stack"])
    sparse.detach()
    del layer, sparse
    gc.collect()
    assert loss.requires_grad
    assert (model(), masked()) == (None, None)


def test_copies_train_their_own_leaf():
    _, layer, sparse = pair_of(linear)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        backward(other, *rows())
        assert other.diff_stack.grad is not None
        assert sparse.leaves["stack"].grad is None
        assert type(other) is type(layer)


def test_a_second_derivative_is_refused_by_name():
    for reads in (linear, grouped):
        _, layer, sparse = pair_of(reads)
        leaf = sparse.leaves["stack"]
        (grad,) = torch.autograd.grad(layer(*rows()).square().sum(), leaf, create_graph=True)
        with pytest.raises(
            AttachError, match="double backward through the masked parameter 'stack'"
        ):
            grad.sum().backward()


def test_the_alias_is_there_in_forward_only():
    seen = []

    def look(layer, x, whose):
        seen.append((type(layer.stack), isinstance(layer.stack, nn.Parameter), layer.stack.shape))
        seen.append(layer.stack is layer.stack)
        return linear(layer, x, whose)

    _, layer, _ = pair_of(look)
    backward(layer, *rows())
    assert seen == [(experts.StackedWeight, True, (EXPERTS, 8, 8)), True]
    assert type(layer.stack) is Tensor
    with torch.no_grad():
        layer(*rows())
    assert seen[2][0] is nn.Parameter


@pytest.mark.slow
def test_compiled_layers_take_the_generic_tier():
    _, layer, sparse = pair_of(pairs)
    _, plain, expected = pair_of(pairs)
    backward(torch.compile(layer, backend="aot_eager"), *rows())
    backward(plain, *rows())
    torch.testing.assert_close(sparse.leaves["stack"].grad, expected.leaves["stack"].grad)


def test_other_stacks_of_matrices_are_no_experts():
    for module in (nn.Conv1d(4, 4, 3), nn.Bilinear(3, 3, 3), nn.MultiheadAttention(4, 1)):
        assert not any(experts.is_stacked(module, p) for p in module.parameters())
    assert not experts.is_stacked(Experts(linear), torch.zeros(1, 7, 8))  # positions


@pytest.mark.parametrize("reads", [linear, grouped, pairs])
def test_memory_is_that_of_the_mask(reads):
    """Eight times one expert's dense gradient would be the stock layer's."""
    torch.manual_seed(0)
    layer = Experts(reads, 512, 512)
    mask = torch.zeros(layer.stack.shape, dtype=torch.bool)
    mask.view(-1)[::500] = True
    attach(layer, {"stack": mask})
    x, whose = torch.randn(ROWS, 512), rows()[1]
    for _ in range(2):
        loss = layer(x, whose).square().sum()
        with Allocations() as memory:
            loss.backward()
    matrix = 512 * 512 * 4
    gathered = ROWS * matrix if reads is pairs else 0  # for dX, as in forward
    assert memory.peak < (1.1 * gathered if gathered else matrix / 2)


def moe(how):
    transformers = pytest.importorskip(
        "transformers", minversion="5", reason="stacked experts of these models need transformers 5"
    )
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, moe_intermediate_size=128, num_experts=16,
        num_experts_per_tok=2,
    )  # fmt: skip
    config._experts_implementation = how
    return transformers.Qwen3MoeForCausalLM(config).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "share"), [("eager", 0.3), ("grouped_mm", 0.3), ("batched_mm", 0.6)]
)
def test_a_step_needs_a_share_of_the_memory_of_dense_training(how, share):
    """(A batched one gathers a matrix for each row, whoever trains.)"""

    def peak(model, parameters):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        ids = torch.randint(0, 100, (2, 8))

        def step():
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return peak_of(step)

    stock, model = moe(how), moe(how)
    sparse = attach(model, sparseft.select(model, "random", density=0.01))
    assert peak(model, sparse.parameters()) < share * peak(stock, stock.parameters())
