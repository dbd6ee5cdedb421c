"""CUDA graphs of a whole training step: forward, backward, clipping, optimizer, weights written.

What can be shown without a GPU is in tests/kernels/test_interpret_whole_step.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from sparseft import SparseAdamW, SparseLion, SparseSGD, attach

pytestmark = pytest.mark.gpu

OURS = {
    "adamw": lambda p, lr: SparseAdamW(p, lr=lr, weight_decay=0.1, capturable=True),
    "adamw8": lambda p, lr: SparseAdamW(p, lr=lr, moment_bits=8, capturable=True),
    "stochastic": lambda p, lr: SparseAdamW(p, lr=lr, stochastic_rounding=True, capturable=True),
    "lion": lambda p, lr: SparseLion(p, lr=lr, capturable=True),
    "sgd": lambda p, lr: SparseSGD(p, lr=lr, momentum=0.9, capturable=True),
}
STOCK = {
    "stock": lambda p, lr: torch.optim.AdamW(p, lr=lr, capturable=True),
    "stock_fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, capturable=True, fused=True),
}
OPTIMIZERS = {**OURS, **STOCK}


class Model(nn.Module):
    """Tied embedding and head, fused layers, a norm through the generic tier."""

    def __init__(self, vocab: int = 101, width: int = 64) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        h = self.norm(self.emb(ids))
        return self.head(h + self.down(F.gelu(self.up(h))))


def loss_of(logits, ids):
    """Of the next token: a tied head knows the present one too well to learn anything."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class Training:
    """A model, its masks, an optimizer, and the inputs and learning rate that a graph reads."""

    def __init__(self, kind: str = "adamw", dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        self.model = Model().to("cuda", dtype)
        masks = {n: torch.rand(p.shape) < 0.1 for n, p in self.model.named_parameters()}
        self.sparse = attach(self.model, masks)
        self.lr = torch.tensor(1e-2, device="cuda")
        self.parameters = list(self.sparse.parameters())
        self.optimizer = OPTIMIZERS[kind](self.parameters, self.lr)
        self.ids = torch.zeros(4, 16, dtype=torch.int64, device="cuda")
        self.call = self.model

    def show(self, number: int) -> None:
        """Put the batch and the rate of a step where the step reads them."""
        generator = torch.Generator().manual_seed(number)
        self.ids.copy_(torch.randint(1, 101, self.ids.shape, generator=generator))
        self.lr.fill_(1e-2 / (1 + number))

    def step(self):
        loss = loss_of(self.call(self.ids), self.ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()
        return loss.detach()

    def eager(self, numbers) -> None:
        for number in numbers:
            self.show(number)
            self.optimizer.zero_grad(set_to_none=True)
            self.step()

    def warm_up(self, numbers) -> None:
        """Take steps on a side stream, as a capture asks for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.eager(numbers)
        torch.cuda.current_stream().wait_stream(side)

    def capture(self):
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.step()
        return graph

    def state(self):
        masked = list(self.sparse._masked.values())
        moments = [x for s in self.optimizer.state.values() for x in s.values()]
        tensors = [m.leaf for m in masked] + [m.weight for m in masked] + moments
        return [t.detach().clone() for t in tensors]


def check_same(a: Training, b: Training) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.state(), b.state(), strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_captured_step_replays_as_eager_steps(kind):
    """Other batches and learning rates at each replay; steps are counted on the device."""
    eager, captured = Training(kind), Training(kind)
    eager.warm_up(range(8))
    captured.warm_up(range(3))
    before = captured.state()
    graph = captured.capture()
    assert all(torch.equal(x, y) for x, y in zip(before, captured.state(), strict=True))
    for number in range(3, 8):
        captured.show(number)
        graph.replay()
    check_same(eager, captured)
    assert {float(s["step"]) for s in captured.optimizer.state.values()} == {8.0}
    for m in captured.sparse._masked.values():
        if kind != "stochastic":
            entries = (m.base.float() + m.leaf.detach()).to(m.weight.dtype)
            assert torch.equal(m.weight.detach().flatten()[m.indices.long()], entries)


def test_eager_steps_go_on_after_replays():
    eager, captured = Training(), Training()
    eager.warm_up(range(6))
    captured.warm_up(range(2))
    graph = captured.capture()
    for number in (2, 3):
        captured.show(number)
        graph.replay()
    captured.warm_up((4, 5))
    check_same(eager, captured)


def test_two_graphs_keep_their_tables_apart():
    """Tables are written by the graphs themselves: others captured meanwhile change nothing."""
    eager, one, other = Training(), Training(), Training("lion")
    eager.warm_up(range(4))
    one.warm_up(range(2))
    graph = one.capture()
    other.warm_up(range(2))
    second = other.capture()
    for number in (2, 3):
        other.show(number)
        second.replay()
        one.show(number)
        graph.replay()
    check_same(eager, one)


def test_a_first_step_cannot_be_captured():
    """Its replays would start from zero moments each time."""
    training = Training()
    training.show(0)
    with pytest.raises(RuntimeError, match="first step.*before the capture"):
        training.capture()


def test_capture_asks_for_capturable():
    training = Training()
    training.optimizer.param_groups[0]["capturable"] = False
    training.warm_up(range(2))
    with pytest.raises(RuntimeError, match="capturable=True"):
        training.capture()


@pytest.mark.parametrize("same_count", [True, False])
def test_masks_that_moved_are_captured_again(same_count):
    """A graph reads the indices of its time: it is dropped, another one goes on."""
    eager, captured = Training(), Training()
    for training in (eager, captured):
        training.warm_up(range(2))
    graph = captured.capture()
    captured.show(2)
    graph.replay()
    eager.warm_up((2,))
    for training in (eager, captured):
        generator = torch.Generator().manual_seed(9)
        masks = {}
        for name, pattern in training.sparse.patterns.items():
            mask = torch.zeros(pattern.shape, dtype=torch.bool)
            count = min(mask.numel(), pattern.nnz + (0 if same_count else 3))
            mask.view(-1)[torch.randperm(mask.numel(), generator=generator)[:count]] = True
            masks[name] = mask
        training.sparse.reselect_(masks, optimizer=training.optimizer)
    del graph
    captured.warm_up((3,))
    graph = captured.capture()
    captured.show(4)
    graph.replay()
    eager.warm_up((3, 4))
    check_same(eager, captured)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_whole_step_waits_for_nothing(kind):
    training = Training(kind)
    training.eager(range(2))  # lays the masks out and compiles
    training.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_of_graphed_callables():
    """`torch.cuda.make_graphed_callables`: forward and backward are graphs, the step is eager."""
    eager, graphed = Training(), Training()
    eager.warm_up(range(4))
    graphed.show(0)
    graphed.call = torch.cuda.make_graphed_callables(graphed.model, (graphed.ids.clone(),))
    graphed.optimizer.zero_grad(set_to_none=True)
    graphed.warm_up(range(4))
    check_same(eager, graphed)


def test_reduce_overhead():
    """Inductor's CUDA graphs around forward and backward, and around the optimizer's step."""
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = Training(dtype=torch.float32), Training(dtype=torch.float32)
    eager.eager(range(8))
    compiled.call = torch.compile(compiled.model, mode="reduce-overhead", fullgraph=True)
    step = torch.compile(compiled.optimizer.step, mode="reduce-overhead", fullgraph=True)
    for number in range(8):
        compiled.show(number)
        compiled.optimizer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(compiled.call(compiled.ids), compiled.ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(compiled.parameters, 0.5)
        step()
    assert counters["inductor"]["cudagraph_skips"] == 0
    for m, other in zip(
        compiled.sparse._masked.values(), eager.sparse._masked.values(), strict=True
    ):
        # Fusions round differently, and Adam's first steps are as long for small gradients.
        far = (m.leaf - other.leaf).abs() > 0.02 * other.leaf.abs().max()
        assert int(far.sum()) <= 0.02 * far.numel() + 1
        entries = m.base + m.leaf.detach()
        assert torch.equal(m.weight.detach().flatten()[m.indices.long()], entries)


def test_memory_of_a_captured_step_has_no_dense_gradient():
    """The graph's private pool holds activations and compact gradients."""

    def pool_of(density: float) -> tuple[int, int]:
        torch.manual_seed(0)
        layer = nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
        sparse = attach(layer, {"weight": torch.rand(4096, 4096) < density})
        optimizer = SparseAdamW(sparse.parameters(), capturable=True)
        x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)

        def step():
            optimizer.zero_grad(set_to_none=True)
            layer(x).float().pow(2).mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.synchronize()
        optimizer.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, layer.weight.numel() * 2

    used, dense = pool_of(0.005)
    assert used < dense / 2
