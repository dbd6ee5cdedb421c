"""Compositions over many tensors: the kernels give the definition's bits."""

from __future__ import annotations

import pytest
import torch

from sparseft.diff import SparseDiff, SparsePattern
from sparseft.ops import compose_diffs, pack_diffs, sum_entries
from sparseft.ops.combine import MEANS, VOTES, Rule, Term, combine
from sparseft.ops.compose import capture_many, compose_many_, restore_many_
from sparseft.ops.packed import BLOCK, EntryTable, PackedTerm, PackedUnion
from sparseft.ops.union import union_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
RULES = [
    Rule("sum"),
    *(Rule("elect", vote=v, mean=m) for v in VOTES for m in MEANS),
    Rule("largest"),
    Rule("consensus", least=2, strength=0.7),
]

pytestmark = pytest.mark.usefixtures("poisoned_launcher")
LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGER[x.element_size()])


class Scene:
    """Several weights and adapters; sizes around one block, an empty tensor, one nobody touches."""

    def __init__(self, dtype, device, *, adapters=3, value_dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.shapes = [(23, 41), (BLOCK,), (1,), (5, 3)]
        self.weights = [torch.randn(s, generator=g).to(dtype).to(device) for s in self.shapes]
        self.indices, self.terms = [], []
        for weight in self.weights:
            lists, values = [], []
            for _ in range(adapters):
                chosen = torch.rand(weight.numel(), generator=g) < 0.4
                lists.append(chosen.nonzero().flatten().int().to(device))
                v = torch.randn(lists[-1].numel(), generator=g)
                v[torch.rand(v.shape, generator=g) < 0.1] = 0.0
                # equal magnitudes, so that votes and largest values tie
                v = torch.where(torch.rand(v.shape, generator=g) < 0.3, v.sign(), v)
                values.append(v.to(value_dtype).to(device))
            union, places = union_of(lists)
            self.indices.append(union)
            self.terms.append(
                [PackedTerm(i, v, p) for i, (v, p) in enumerate(zip(values, places, strict=True))]
            )
        self.union = PackedUnion.pack(self.indices, self.terms, adapters)
        self.adapters = adapters
        self.state = torch.zeros(2, dtype=torch.int32, device=device)

    def expected(self, coeffs, rule):
        out = []
        for weight, union, terms in zip(self.weights, self.indices, self.terms, strict=True):
            used = [Term(coeffs[t.ordinal], t.values, t.positions) for t in terms]
            used = [t for t in used if t.coeff]
            new = weight.clone()
            if used:
                total = combine(used, union.numel(), rule)
                base = weight.view(-1)[union.long()]
                new.view(-1)[union.long()] = sum_entries(base, total, weight.dtype)
            out.append(new)
        return out


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.kind}-{r.vote}-{r.mean}")
def test_every_rule_gives_the_definitions_bits(rule, dtype, device):
    s = Scene(dtype, device)
    before = [w.clone() for w in s.weights]
    for coeffs in ([1.0, 1.0, 1.0], [0.3, -1.7, 0.0]):
        wanted = s.expected(coeffs, rule)
        saved = s.union.empty(dtype)
        s.state.zero_()
        compose_many_(s.weights, s.union, coeffs, rule, saved=saved, base=None, state=s.state)
        assert s.state.tolist() == [1, 0]
        for got, want in zip(s.weights, wanted, strict=True):
            assert torch.equal(bits(got), bits(want))
        # over the saved entries, without a new capture
        compose_many_(
            s.weights, s.union, [0.1, 0.2, 0.3], rule, saved=saved, base=saved, state=s.state
        )
        compose_many_(s.weights, s.union, coeffs, rule, saved=saved, base=saved, state=s.state)
        for got, want in zip(s.weights, wanted, strict=True):
            assert torch.equal(bits(got), bits(want))
        restore_many_(s.weights, s.union, saved)
        for got, want in zip(s.weights, before, strict=True):
            assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_of_other_dtypes(value_dtype, device):
    s = Scene(torch.float32, device, value_dtype=value_dtype, adapters=9)
    coeffs = [0.1 * (i - 4) for i in range(9)]
    wanted = s.expected(coeffs, Rule("sum"))
    compose_many_(
        s.weights, s.union, coeffs, Rule("sum"), saved=s.union.empty(torch.float32), base=None,
        state=s.state,
    )  # fmt: skip
    for got, want in zip(s.weights, wanted, strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capture_and_restore_move_every_bit(dtype, device):
    s = Scene(dtype, device)
    integer = INTEGER[s.weights[0].element_size()]
    for w in s.weights:  # NaNs with payloads among them
        w.copy_(torch.randint(-(2**15), 2**15, w.shape, dtype=integer).view(dtype))
    before = [bits(w).clone() for w in s.weights]
    table = EntryTable.of(s.indices)
    saved = capture_many(s.weights, table)
    for piece, union, old in zip(table.pieces(saved), s.indices, before, strict=True):
        assert torch.equal(bits(piece), old.view(-1)[union.long()])
    assert torch.equal(bits(table.join(table.pieces(saved))), bits(saved))
    for w in s.weights:
        w.fill_(1.0)
    restore_many_(s.weights, table, saved)
    for w, union, old in zip(s.weights, s.indices, before, strict=True):
        wanted = bits(torch.ones_like(w)).view(-1)
        wanted[union.long()] = old.view(-1)[union.long()]
        assert torch.equal(bits(w).view(-1), wanted)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sum_out_of_range_is_reported_and_a_base_out_of_range_is_not(dtype, device):
    s = Scene(dtype, device)
    s.weights[0].view(-1)[int(s.indices[0][0])] = float("inf")
    saved = s.union.empty(dtype)
    compose_many_(s.weights, s.union, [1.0] * 3, Rule(), saved=saved, base=None, state=s.state)
    assert s.state.tolist() == [1, 0]
    huge = torch.finfo(torch.float32).max if dtype == torch.float32 else 1e6
    compose_many_(s.weights, s.union, [huge] * 3, Rule(), saved=saved, base=saved, state=s.state)
    assert s.state.tolist() == [1, 1]


@pytest.mark.parametrize("device", LANES)
def test_what_nobody_adds_to_keeps_its_bits(device):
    """A base of -0.0, and a NaN with a payload where every coefficient is 0, stay as they are."""
    indices = torch.arange(4, dtype=torch.int32, device=device)
    weight = torch.tensor([-0.0, 0.0, -0.0, 1.0], device=device)
    first = PackedTerm(
        0, torch.tensor([-0.0, 1.0], device=device), torch.tensor([0, 3], device=device)
    )
    second = PackedTerm(
        1, torch.tensor([5.0, 5.0], device=device), torch.tensor([1, 2], device=device)
    )
    union = PackedUnion.pack([indices], [[first, second]], 2)
    saved, state = union.empty(weight.dtype), torch.zeros(2, dtype=torch.int32, device=device)
    for rule in RULES:
        new = weight.clone()
        compose_many_([new], union, [1.0, 0.0], rule, saved=saved, base=None, state=state)
        assert torch.equal(bits(new[:3]), bits(weight[:3])), rule


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_sum(dtype, device, assert_as_accurate):
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 50, generator=g).to(dtype).to(device).requires_grad_()
    diffs = []
    for _ in range(3):
        pattern = SparsePattern.from_mask(torch.rand(40, 50, generator=g) < 0.5).to(device)
        values = torch.randn(pattern.nnz, generator=g).to(device).requires_grad_()
        diffs.append(SparseDiff.from_pattern(pattern, values, "add"))
    upstream = torch.randn(40, 50, generator=g).to(dtype).to(device)
    packed = pack_diffs(diffs)
    results = []
    for backend, wide in (("triton", None), ("reference", None), ("reference", torch.float64)):
        coeffs = torch.tensor([0.7, 0.0, -1.3], device=device)
        w, d, up = weight.detach(), diffs, upstream
        if wide is not None:
            coeffs, w, up = coeffs.to(wide), w.to(wide), up.to(wide)
            d = [SparseDiff(x.indices, x.values.detach().to(wide), x.shape) for x in diffs]
        leaves = [x.values.detach().requires_grad_() for x in d]
        d = [SparseDiff._trusted(x.indices, v, x.shape) for x, v in zip(d, leaves, strict=True)]
        w.requires_grad_()
        coeffs.requires_grad_()
        own = packed if wide is None else None
        out = compose_diffs(w, d, coeffs, packed=own, backend=backend)
        out.backward(up)
        results.append((out.detach(), w.grad, coeffs.grad, torch.cat([v.grad for v in leaves])))
    mine, theirs, exact = results
    assert torch.equal(bits(mine[0]), bits(theirs[0]))
    assert torch.equal(bits(mine[1]), bits(upstream))
    assert torch.equal(bits(mine[3]), bits(theirs[3]))
    assert_as_accurate(mine[2], theirs[2], exact[2], name="coeffs")


@pytest.mark.interpret
def test_the_block_size_is_the_kernels():
    from sparseft_kernels import compose
    from sparseft_kernels._configs import COMPOSE, MULTI_TENSOR

    assert compose.BLOCK == COMPOSE.block == MULTI_TENSOR.block == BLOCK


@pytest.mark.gpu
def test_a_switch_of_many_tensors_needs_no_sync():
    s = Scene(torch.bfloat16, "cuda")
    saved = s.union.empty(torch.bfloat16)

    def once():
        compose_many_(
            s.weights, s.union, [1.0, 0.5, 0.2], Rule(), saved=saved, base=None, state=s.state
        )
        restore_many_(s.weights, s.union, saved)

    once()  # compiled, tables uploaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
