"""What a CUDA graph of a whole step needs, shown without one: the host looks at no tensor's values,
and no table is copied from the host while a graph is captured.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparseft import SparseAdamW, SparseLion, SparseSGD, attach
from sparseft.ops import _common
from sparseft_kernels import _launch

LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
# What waits for a device: values on the host, or a shape that depends on them.
LOOKS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique",
         "_unique2", "unique_consecutive", "unique_dim", "bincount")  # fmt: skip
OPTIMIZERS = {
    "adamw": lambda p: SparseAdamW(p, lr=1e-2, capturable=True),
    "adamw8": lambda p: SparseAdamW(p, lr=1e-2, capturable=True, moment_bits=8),
    "lion": lambda p: SparseLion(p, lr=1e-3, capturable=True),
    "sgd": lambda p: SparseSGD(p, lr=1e-2, momentum=0.9, capturable=True),
    "stock": lambda p: torch.optim.SGD(p, lr=1e-2, foreach=True),  # and the hook that writes
}


class Looks(TorchDispatchMode):
    """Collect the operations by which a host learns a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if func.overloadpacket.__name__ in LOOKS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    """Tied embedding and head, a fused layer, a norm and a convolution through the generic tier."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(19, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 19)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        h = self.norm(self.emb(ids))
        h = h + self.down(torch.relu(self.up(h)))
        return self.head(h + self.conv(h.transpose(1, 2)).transpose(1, 2))


def prepared(device, kind):
    """Return a step function of a model that has taken a step, and what it trains."""
    torch.manual_seed(0)
    model = Model().to(device)
    masks = {n: (torch.rand(p.shape) < 0.3).to(device) for n, p in model.named_parameters()}
    sparse = attach(model, masks, backend="triton")
    parameters = list(sparse.parameters())
    optimizer = OPTIMIZERS[kind](parameters)
    ids = torch.randint(1, 19, (3, 5), generator=torch.Generator().manual_seed(1)).to(device)

    def step():
        optimizer.zero_grad()
        logits = model(ids)[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()

    step()
    return step, sparse, optimizer


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_host_looks_at_no_values(kind, device, monkeypatch):
    step, sparse, _ = prepared(device, kind)
    before = [leaf.detach().clone() for leaf in sparse.leaves.values()]
    # Ops run their own code, as where nobody watches: what it calls is then seen.
    monkeypatch.setattr(
        _common.Operator, "__call__", lambda self, *args: self.implementation(*args)
    )
    with Looks() as looks:
        step()
    assert looks.found == []
    assert looks.seen > 50
    pairs = zip(before, sparse.leaves.values(), strict=True)
    assert all(not torch.equal(a, b.detach()) for a, b in pairs)
    with Looks() as looks:
        bool((before[0] != 0).any())
    assert looks.found, "the check must be able to fail"


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("kind", ["adamw", "adamw8", "lion", "sgd"])
def test_tables_under_capture_are_written_by_kernels(kind, device, monkeypatch):
    """The same bits as from uploaded tables, which are not made."""
    results = []
    for capturing in (False, True):
        step, sparse, optimizer = prepared(device, kind)
        with monkeypatch.context() as patch:
            if capturing:
                patch.setattr(_launch, "_capturing", lambda device: True)
                patch.setattr(_launch, "_uploads", None)  # using it would raise
            step()
        state = [x for s in optimizer.state.values() for x in s.values()]
        results.append([t.detach().clone() for t in (*sparse.parameters(), *state)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("device", LANES)
def test_numbers_written_by_kernels_are_exact(device):
    tables = [
        torch.tensor([[2**62 + 3, -(2**53) - 1, 0], [140_000_000_000_001, 1, -1]]),
        torch.tensor([0.1, -float("inf"), 1e-300], dtype=torch.float64),
        torch.empty(0, dtype=torch.int64),
    ]
    for table in tables:
        assert torch.equal(_launch.by_kernels(table, torch.device(device)).cpu(), table)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("counts", [((0, 3),), ((2, 1), (0, 0), (5, 4)), ((7, 0), (1, 2), (3, 0))])
def test_blocks_of_tensors_are_the_same_under_capture(counts, device, monkeypatch):
    where = torch.device(device)
    uploaded = _launch.spread(counts, where)
    monkeypatch.setattr(_launch, "_capturing", lambda device: True)
    written = _launch.spread(counts, where)
    assert written.dtype == uploaded.dtype == torch.int32
    assert written.tolist() == uploaded.tolist() == [n for n, times in counts for _ in range(times)]


@pytest.mark.parametrize("device", LANES)
def test_a_compiled_step_runs_the_kernels(device, monkeypatch):
    """The op chooses its backend when the graph runs, with the attachment's choice."""
    from sparseft_kernels import sparse_step

    torch._dynamo.reset()
    launched = []
    launch = sparse_step.launch
    monkeypatch.setattr(
        sparse_step,
        "launch",
        lambda kernel, *a, **k: (launched.append(kernel), launch(kernel, *a, **k)),
    )
    results = []
    for compiled in (False, True):
        step, sparse, optimizer = prepared(device, "adamw")
        launched.clear()
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
        step()
        step()
        assert len(launched) == 4  # rates and values, twice
        state = [x for s in optimizer.state.values() for x in s.values()]
        results.append([t.detach().clone() for t in (*sparse.parameters(), *state)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
