"""The optimizers on the Triton backend: against the reference, interpreted and on a GPU; and what
only a GPU shows: no sync, CUDA graphs, real sizes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseft import SparseAdamW, SparseLion, SparseSGD, attach, ops

pytestmark = pytest.mark.usefixtures("poisoned_launcher")
LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
KINDS = {
    "adamw": lambda p, **o: SparseAdamW(p, lr=1e-2, weight_decay=0.1, **o),
    "sgd": lambda p, **o: SparseSGD(p, lr=1e-2, momentum=0.9, dampening=0.5, **o),
    "plain": lambda p, **o: SparseSGD(p, lr=1e-2, weight_decay=0.1, **o),
    "lion": lambda p, **o: SparseLion(p, lr=1e-3, weight_decay=0.1, **o),
}


def attached(device: str, dtype=torch.bfloat16, sizes=((40, 30), (7, 5)), density=0.3):
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for m, n in sizes]
    model = nn.ModuleList(layers).to(dtype)
    masks = {f"{i}.weight": torch.rand(m, n) < density for i, (m, n) in enumerate(sizes)}
    model.to(device)
    return model, attach(model, masks, full_params=["*.bias"])


def set_gradients(sparse, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in sparse.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p)


def written(sparse):
    return all(
        torch.equal(
            m.weight.detach().flatten()[m.indices.long()],
            (m.base.float() + m.leaf.detach()).to(m.weight.dtype),
        )
        for m in sparse._masked.values()
    )


def close(a, b, flips=0.0):
    """Parameters within a few roundings of their dtype after a few steps.

    This sees the wiring (groups, rates, steps); accuracy has its rule and its tests beside the op.
    ``flips``: share of entries that may differ more, where Lion's sign hangs on the last bit.
    """
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        near = torch.isclose(p, q, rtol=16 * torch.finfo(p.dtype).eps, atol=1e-5)
        assert int((~near).sum()) <= flips * p.numel()


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("kind", KINDS)
def test_follows_the_reference(kind, device):
    """Masked bf16 weights and ordinary bf16 biases in two groups with a schedule."""
    results = []
    for backend in ("triton", "reference"):
        _, sparse = attached(device)
        leaves, rest = list(sparse.leaves.values()), list(sparse.full_params.values())
        optimizer = KINDS[kind]([{"params": leaves, "lr": 3e-3}, {"params": rest}])
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        with ops.backend(backend):
            for step in range(4):
                set_gradients(sparse, step)
                optimizer.step()
                schedule.step()
        assert written(sparse)
        results.append(sparse)
    close(*results)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "lion"])
def test_resume_is_exact_and_crosses_backends(kind, bits, device):
    def run(sparse, optimizer, steps, backend="triton"):
        with ops.backend(backend):
            for step in steps:
                set_gradients(sparse, step)
                optimizer.step()

    (_, a), (model, b) = attached(device), attached(device)
    one = KINDS[kind](a.parameters(), moment_bits=bits)
    two = KINDS[kind](b.parameters(), moment_bits=bits)
    run(a, one, range(4))
    run(b, two, range(2))
    saved = copy.deepcopy((model.state_dict(), two.state_dict()))
    ends = []
    for backend in ("triton", "reference"):
        model, sparse = attached(device)
        model.load_state_dict(saved[0])
        optimizer = KINDS[kind](sparse.parameters())
        optimizer.load_state_dict(copy.deepcopy(saved[1]))  # torch keeps the tensors given
        run(sparse, optimizer, range(2, 4), backend)
        ends.append(sparse)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), ends[0].parameters(), strict=True))
    if bits == 32:  # codes may fall to either side of half
        close(*ends)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("kind", ["adamw", "sgd", "lion"])
def test_found_inf_at_the_first_step(kind, device):
    (_, a), (_, b) = attached(device), attached(device)
    one, other = KINDS[kind](a.parameters()), KINDS[kind](b.parameters())
    with ops.backend("triton"):
        one.found_inf = torch.ones((), device=device)
        one.grad_scale = torch.full((), 4.0, device=device)
        set_gradients(a, 9)
        one.step()
        one.found_inf = torch.zeros((), device=device)
        for step in range(2):
            set_gradients(a, step, scale=4.0)
            set_gradients(b, step)
            one.step()
            other.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("device", LANES)
def test_one_launch_for_each_weight_dtype(device, monkeypatch):
    from sparseft_kernels import sparse_step

    launched = []
    launch = sparse_step.launch
    monkeypatch.setattr(
        sparse_step,
        "launch",
        lambda kernel, *a, **k: (launched.append(kernel), launch(kernel, *a, **k)),
    )
    _, sparse = attached(device, sizes=((40, 30), (7, 5), (9, 9), (12, 3)))
    optimizer = KINDS["adamw"](sparse.leaves.values())
    set_gradients(sparse, 0)
    with ops.backend("triton"):
        optimizer.step()
    assert [k.fn.__name__ for k in launched] == ["_rates_kernel", "_step_kernel"]


# What only a GPU shows.


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_sync(kind):
    """Also with a learning rate that changes, new gradients, and GradScaler's scalars."""
    _, sparse = attached("cuda")
    optimizer = KINDS[kind](sparse.parameters())
    gradients = []
    for step in range(3):
        set_gradients(sparse, step)
        gradients.append([p.grad for p in sparse.parameters()])
    optimizer.step()
    optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.grad_scale = torch.full((), 2.0, device="cuda")
    optimizer.step()  # compiled before the check
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, grads in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            for p, grad in zip(sparse.parameters(), grads, strict=True):
                p.grad = grad
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert written(sparse)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_in_a_cuda_graph(kind):
    """Replays count steps, read the learning rate on the device and go on as eager steps do."""

    def build():
        _, sparse = attached("cuda")
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = KINDS[kind](sparse.parameters(), capturable=True)
        optimizer.param_groups[0]["lr"] = lr
        set_gradients(sparse, 0)
        static = [p.grad for p in sparse.parameters()]
        return sparse, optimizer, lr, static

    def refill(sparse, static, step):
        set_gradients(sparse, step)
        for p, grad in zip(sparse.parameters(), static, strict=True):
            grad.copy_(p.grad)
            p.grad = grad

    (a, eager, lr_a, grads_a), (b, captured, lr_b, grads_b) = build(), build()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 6):
        lr_a.fill_(1e-2 / step)
        lr_b.fill_(1e-2 / step)
        refill(a, grads_a, step)
        refill(b, grads_b, step)
        eager.step()
        graph.replay()
        if step == 3:  # eager steps of another optimizer leave the graph's tables alone
            _, other = attached("cuda")
            set_gradients(other, 1)
            KINDS[kind](other.parameters()).step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert written(b)
    steps = {float(s["step"]) for s in captured.state.values()}
    assert steps == {6.0}


@pytest.mark.gpu
def test_capture_asks_for_capturable():
    _, sparse = attached("cuda")
    optimizer = KINDS["adamw"](sparse.parameters())
    set_gradients(sparse, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(graph):
        optimizer.step()


# Shapes of a layer of Llama-7B and of XLM-R's embedding, at their densities.
REAL = [
    pytest.param(((4096, 11008), (4096, 4096)), 0.01, id="llama-1%"),
    pytest.param(((4096, 4096),), 1.0, id="llama-100%"),
    pytest.param(((250002, 768), (3072, 768), (768, 768)), 0.001, id="xlmr-0.1%"),
    pytest.param(((768, 768),) * 48 + ((3072, 768), (768, 3072)) * 12, 0.1, id="xlmr-10%"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "density"), REAL)
@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_real_sizes(kind, sizes, density):
    """As the reference, the same bits twice, frozen entries untouched."""
    ends = []
    for backend in ("auto", "triton", "reference"):
        model, sparse = attached("cuda", sizes=sizes, density=density)
        before = [layer.weight.detach().clone() for layer in model]
        optimizer = KINDS[kind](sparse.parameters())
        with ops.backend(backend):
            for step in range(3):
                set_gradients(sparse, step)
                optimizer.step()
        assert written(sparse)
        for layer, old, masked in zip(model, before, sparse._masked.values(), strict=True):
            changed = layer.weight.detach() != old
            changed.view(-1)[masked.indices.long()] = False
            assert not changed.any()
        ends.append(sparse)
    auto, again, reference = ends
    assert all(
        torch.equal(p, q) for p, q in zip(auto.parameters(), again.parameters(), strict=True)
    )
    close(auto, reference, flips=1e-5 if kind == "lion" else 0.0)
