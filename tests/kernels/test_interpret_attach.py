"""Training attached models on the Triton backend equals the reference, interpreted and on a GPU.

Only the backend differs between the two sides of a test, so forward passes and input gradients are
the same bits; what may differ is the order of the sums behind each compact gradient.
"""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparseft import SparseSGD, attach, ops, select

LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


class Model(nn.Module):
    """Tied embedding and head, two layers, one of them used twice, one that reads its weight."""

    def __init__(self, vocab: int = 37, width: int = 24, recompute: str = "") -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width, padding_idx=0)
        self.up = nn.Linear(width, 40)
        self.down = nn.Linear(40, width, bias=False)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.emb.weight
        self.recompute = recompute

    def block(self, h):
        h = h + self.down(F.gelu(self.up(h)))
        return torch.tanh(self.mix(self.mix(h))) + h @ self.mix.weight

    def forward(self, ids):
        h = self.emb(ids)
        if self.recompute:
            h = checkpoint(self.block, h, use_reentrant=self.recompute == "reentrant")
        else:
            h = self.block(h)
        return self.head(h)


def trained(backend, device, *, dtype=torch.float32, autocast=None, pieces=1, recompute="",
            compiled=False, density=0.3):  # fmt: skip
    """Return the leaves and weights after two steps with decay and momentum."""
    torch.manual_seed(0)
    model = Model(recompute=recompute)
    masks = {n: torch.rand(p.shape) < density for n, p in model.named_parameters() if p.ndim == 2}
    model = model.to(dtype).to(device)
    sparse = attach(model, masks, backend=backend, full_params=["*.bias"], input_grads=True)
    optimizer = SparseSGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):  # the second moves by the first one's momentum, from weights it wrote
        ids = torch.randint(0, 37, (4, 9), generator=generator).to(device)
        for part in ids.chunk(pieces):
            low = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
            with low:
                logits = call(part)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten())
            (loss / pieces).backward()
        torch.nn.utils.clip_grad_norm_(list(sparse.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    leaves = {n: leaf.detach().clone() for n, leaf in sparse.leaves.items()}
    weights = {n: m.weight.detach().clone() for n, m in sparse._masked.items()}
    sparse.detach(restore=True)
    return leaves, weights


CASES = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "autocast": {"autocast": torch.bfloat16},
    "accumulation": {"pieces": 2},
    "checkpointing": {"recompute": "non_reentrant"},
    "reentrant checkpointing": {"recompute": "reentrant"},
    "low density": {"density": 0.02},
    "compiled": {"compiled": True},
}


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_reference(case, device, poisoned_launcher):
    torch._dynamo.reset()
    mine, _ = trained("triton", device, **CASES[case])
    theirs, weights = trained("reference", device, **CASES[case])
    assert mine.keys() == theirs.keys()
    # Leaves feed back through weights of the model's dtype, where a last bit may fall either way.
    step = max(torch.finfo(w.dtype).eps for w in weights.values())
    for name, expected in theirs.items():
        assert expected.abs().max() > 0, f"{name}: the case tests nothing"
        far = float((mine[name] - expected).norm() / expected.norm())
        assert far <= max(1e-5, 2 * step), (name, far)


@pytest.mark.parametrize("device", LANES)
def test_masks_are_the_same_on_both_backends(device):
    torch.manual_seed(0)
    model = Model().to(device)
    base = {n: p + 0.01 * torch.randn_like(p) for n, p in model.state_dict().items()}
    chosen = {}
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            chosen[backend] = select(model, method="magnitude", base=base, density=0.1)
    for name, pattern in chosen["reference"].items():
        assert torch.equal(chosen["triton"][name].indices, pattern.indices), name


@pytest.mark.gpu
def test_triton_is_taken_without_being_asked(caplog):
    with caplog.at_level(logging.WARNING, logger="sparseft.backend"):
        mine, _ = trained(None, "cuda")
        theirs, _ = trained("triton", "cuda")
    assert caplog.messages == []
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
