"""The CPU's composition in blocks: the bits of the definition, exact undo, and Ctrl-C."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.ops import _compose_cpu, write_sum_
from sparseft.ops._common import bits
from sparseft.ops._compose_cpu import CpuLayout, apply, restore, rewrite, suits
from sparseft.ops.combine import Rule, Term, combine

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COEFFS = (1.0, -0.5, 1.0, 0.3, 2.5, -1.0, 1e-3, 0.7, 1.0)
# NaNs of either kind with payloads, both zeros, infinities, the smallest subnormal.
ODD = (0x7FA12345, 0x7FC54321, -0x80000000, 0, 0x7F800000, -0x800000, 1, -0x7FFFFFFF)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(_compose_cpu, "BLOCK", 64)
    _compose_cpu._SCRATCH.held.clear()  # so that scratch is poisoned anew


def weight_of(shape, dtype=torch.float32):
    """Random values, every seventh an odd one: narrower dtypes get what the cast makes of it."""
    weight = torch.randn(shape) * 0.02
    flat = weight.view(-1)
    odd = torch.tensor(ODD, dtype=torch.int32).view(torch.float32)
    at = torch.arange(0, flat.numel(), 7)
    flat[at] = odd.repeat(len(at) // len(ODD) + 1)[: len(at)]
    narrow = weight.to(dtype)
    if dtype in (torch.bfloat16, torch.float16):  # a signalling NaN, which no cast makes
        signalling = 0x7F91 if dtype == torch.bfloat16 else 0x7C11
        bits(narrow).view(-1)[::21] = signalling
    return narrow


def shares_of(masks, dtype=torch.float32):
    """Return (union, shares): values with explicit zeros of either sign among them."""
    union = torch.stack(list(masks)).any(0).view(-1).nonzero().view(-1)
    shares = []
    for mask in masks:
        at = mask.view(-1).nonzero().view(-1)
        values = torch.randn(len(at)) * 1e-2
        values[::5], values[1::10] = 0.0, -0.0
        place = torch.searchsorted(union, at).int() if len(at) < len(union) else None
        shares.append((values.to(dtype), place))
    return union.int(), shares


def terms_of(shares, coeffs):
    return [Term(c, v, p) for c, (v, p) in zip(coeffs, shares, strict=True) if c]


def defined(weight, union, shares, coeffs):
    """Return (a copy with the composition written, what it overwrote), by the definition."""
    out = weight.clone()
    saved = bits(out).reshape(-1)[union.long()].view(weight.dtype)
    terms = terms_of(shares, coeffs)
    if terms:
        total = combine(terms, len(union), Rule("sum"))
        write_sum_(out, union, saved, total, backend="reference")
    return out, saved


def same(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(bits(a.contiguous()), bits(b.contiguous()))


def random_masks(count, shape, density=0.3):
    return [torch.rand(shape) < density for _ in range(count)]


def check(weight, union, shares, coeffs, *, keep=False):
    before = weight.clone()
    layout = CpuLayout.of(union, shares, keep=keep)
    wanted, overwritten = defined(weight, union, shares, coeffs)
    for _ in range(2):  # the second time from the kept totals
        out = torch.empty_like(overwritten)
        saved = apply(weight, layout, coeffs, out=out)
        assert saved is out
        same(saved, overwritten)
        same(weight, wanted)
        restore(weight, union, saved)
        same(weight, before)
        same(apply(weight, layout, coeffs), overwritten)
        rewrite(weight, layout, saved, coeffs)
        same(weight, wanted)
        restore(weight, union, saved)
        same(weight, before)
    assert (layout.total(coeffs) is not None) == (keep and any(coeffs))
    return layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, 10))
def test_the_bits_of_the_definition(count, dtype):
    union, shares = shares_of(random_masks(count, (29, 31)))
    check(weight_of((29, 31), dtype), union, shares, COEFFS[:count], keep=count % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_of_other_dtypes(dtype):
    union, shares = shares_of(random_masks(3, (29, 31)), dtype)
    for weight_dtype in DTYPES:
        check(weight_of((29, 31), weight_dtype), union, shares, (0.3, 1.0, -1.5))
    # A share that is left out does not widen the sum.
    mixed = [shares[0], (shares[1][0].float(), shares[1][1]), (shares[2][0].float(), shares[2][1])]
    for coeffs in ((0.0, 1.0, 0.3), (0.3, 1.0, 0.0)):
        check(weight_of((29, 31)), union, mixed, coeffs)


def identical(shape):
    return random_masks(1, shape) * 3


def disjoint(shape):
    owner = torch.randint(0, 4, shape)
    return [owner == i for i in range(3)]


def nested(shape):
    first, second = random_masks(2, shape)
    return [first, first & second, first | second]


def clustered(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[1:3] = True
    return [mask, ~mask, torch.zeros(shape, dtype=torch.bool)]


def full(shape):
    return [torch.ones(shape, dtype=torch.bool)] * 2


@pytest.mark.parametrize("masks", [identical, disjoint, nested, clustered, full])
@pytest.mark.parametrize("shape", [(1,), (5,), (65,), (8, 8), (64, 1), (3, 43), (3, 5, 29)])
@pytest.mark.parametrize("coeffs", [(1.0, 1.0, 1.0), (0.3, 0.0, -2.0), (0.0, 0.0, 0.0)])
def test_masks_shapes_and_coefficients(masks, shape, coeffs):
    made = masks(shape)
    union, shares = shares_of(made)
    check(weight_of(shape), union, shares, coeffs[: len(made)], keep=True)


def test_nothing_at_all():
    for shape in ((0,), (0, 4), (4, 4)):
        union, shares = shares_of([torch.zeros(shape, dtype=torch.bool)] * 2)
        layout = check(weight_of(shape), union, shares, (1.0, 0.5))
        assert layout.surely_finite((1.0, 0.5))


def test_addresses_of_either_width():
    union, shares = shares_of(random_masks(2, (29, 31)))
    wide = [(v, p.long()) for v, p in shares]
    check(weight_of((29, 31)), union.long(), wide, (1.0, 0.3))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 400),
    st.lists(st.tuples(st.floats(0, 1), st.floats(-3, 3, width=32)), min_size=1, max_size=9),
    st.integers(1, 70),
    st.integers(0, 2**31),
)
def test_any_masks_and_coefficients(numel, adapters, block, seed):
    torch.manual_seed(seed)
    masks = [torch.rand(numel) < density for density, _ in adapters]
    union, shares = shares_of(masks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compose_cpu, "BLOCK", block)
        check(weight_of(numel), union, shares, [c for _, c in adapters], keep=seed % 2 == 0)


def test_other_coefficients_over_the_same_saved_entries():
    union, shares = shares_of(random_masks(3, (29, 31)))
    weight = weight_of((29, 31))
    before = weight.clone()
    layout = CpuLayout.of(union, shares, keep=True)
    saved = apply(weight, layout, (1.0, 1.0, 1.0))
    for coeffs in ((0.5, 0.25, 1.0), (0.0, 1.0, 0.0), (1.0, 1.0, 1.0)):
        rewrite(weight, layout, saved, coeffs)
        same(weight, defined(before, union, shares, coeffs)[0])
        assert layout.kept is not None
        assert layout.kept[0] == coeffs
    rewrite(weight, layout, saved, (0.0, 0.0, 0.0))
    same(weight, before)


def test_weights_with_strides_go_through_the_definition():
    union, shares = shares_of(random_masks(2, (31, 29)))
    layout = CpuLayout.of(union, shares)
    whole = weight_of((29, 62))
    before = whole.clone()
    weight = whole[:, ::2].t()
    wanted, _ = defined(weight.contiguous(), union, shares, (1.0, 0.3))
    saved = apply(weight, layout, (1.0, 0.3))
    same(weight, wanted)
    rewrite(weight, layout, saved, (0.0, 0.0))
    same(whole, before)
    rewrite(weight, layout, saved, (1.0, 0.3))
    same(weight, wanted)
    restore(weight, union, saved)
    same(whole, before)


@pytest.mark.parametrize("step", ["_address", "_add_up"])  # before a capture; after it
@pytest.mark.parametrize("failing", range(5))
def test_an_interrupt_leaves_the_weight_as_it_was(failing, step, monkeypatch):
    union, shares = shares_of(random_masks(2, (29, 31)))
    weight = weight_of((29, 31))
    before = weight.clone()
    layout = CpuLayout.of(union, shares, keep=True)
    real, calls = getattr(_compose_cpu, step), iter(range(100))

    def interrupted(*arguments):
        if next(calls) == failing:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(_compose_cpu, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(weight, layout, (1.0, 0.3))
    same(weight, before)
    assert layout.kept is None  # half of the totals are not kept
    monkeypatch.setattr(_compose_cpu, step, real)
    check(weight, union, shares, (1.0, 0.3), keep=True)


def test_whoever_counts_the_captured_entries_restores_them(monkeypatch):
    union, shares = shares_of(random_masks(2, (29, 31)))
    weight = weight_of((29, 31))
    before = weight.clone()
    layout, calls, real = CpuLayout.of(union, shares), iter(range(100)), _compose_cpu._address

    def interrupted(*arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(_compose_cpu, "_address", interrupted)
    out, done = torch.empty(len(union)), [0]
    with pytest.raises(KeyboardInterrupt):
        apply(weight, layout, (1.0, 0.3), out=out, done=done)
    assert done == [3 * 64]
    changed = bits(weight) != bits(before)
    assert bool(changed.any())  # left to the caller
    restore(weight, union[: done[0]], out[: done[0]])
    same(weight, before)


def test_parameters_record_no_gradient_and_count_the_write():
    union, shares = shares_of(random_masks(2, (6, 5)))
    parameter = torch.nn.Parameter(torch.randn(6, 5))
    version = parameter._version
    values = [(v.requires_grad_(), p) for v, p in shares]
    saved = apply(parameter, CpuLayout.of(union, values), (1.0, 0.5))
    assert not saved.requires_grad
    assert parameter.is_leaf
    assert parameter._version > version


def test_totals_that_may_overflow_are_not_called_finite():
    def layout(*peaks, dtype=torch.float32):
        union, shares = shares_of([torch.ones(3, dtype=torch.bool)] * len(peaks))
        return CpuLayout.of(
            union, [(torch.tensor([0.0, -p, p / 2], dtype=dtype), None) for p in peaks]
        )

    assert layout(1.0, 1e30).surely_finite((1.0, 1e6))
    assert not layout(1e30).surely_finite((1e9,))
    assert not layout(2e38, 2e38).surely_finite((1.0, 1.0))
    assert layout(2e38, 2e38).surely_finite((0.5, 0.0))
    assert not layout(1e-30).surely_finite((1e39,))  # rounds to inf before it meets the value
    assert layout(1e-30, dtype=torch.float64).surely_finite((1e39,))
    assert not layout(float("inf")).surely_finite((1.0,))
    assert not layout(float("nan")).surely_finite((1.0,))


def test_what_the_fast_path_is_for():
    weight = torch.zeros(4, 3)
    assert suits(weight, Rule("sum"))
    assert suits(torch.nn.Parameter(weight), Rule("sum"))
    assert not suits(weight, Rule("elect"))
    assert not suits(weight, lambda terms, size: torch.zeros(size))
    assert not suits(weight.t(), Rule("sum"))
    assert not suits(weight.int(), Rule("sum"))
    assert not suits(weight.to("meta"), Rule("sum"))
