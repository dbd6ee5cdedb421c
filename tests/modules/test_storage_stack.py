"""The stack of holders: last in, first out; the bottom base under any of them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseft.errors import StackOrderError
from sparseft.modules.storage_stack import (
    Holder,
    bottom_value,
    holders,
    parents_of,
    pop,
    push,
    require_top,
)
from sparseft.ops import gather_entries, write_entries_


def apply(parameter, indices, values, label="x", parents=()):
    saved = gather_entries(parameter.detach(), indices)
    holder = Holder(label, indices, saved, parents)
    push(parameter, holder)
    write_entries_(parameter, indices, values.to(parameter.dtype))
    return holder


def test_out_of_order_names_what_lies_above():
    p = nn.Parameter(torch.zeros(4))
    at = torch.tensor([0, 2], dtype=torch.int32)
    first = apply(p, at, torch.ones(2), "Composer(sw)")
    second = apply(p, at, torch.ones(2), "attach('w')")
    third = apply(p, at, torch.ones(2), "Composer(nli)")
    assert holders(p) == (first, second, third)
    message = r"cannot revert 'w': attach\('w'\) and then Composer\(nli\).*Undo Composer\(nli\)"
    with pytest.raises(StackOrderError, match=message):
        require_top(p, first, name="w", action="revert")
    for holder in (third, second, first):
        pop(p, holder, name="w")
    assert holders(p) == ()
    with pytest.raises(StackOrderError, match="no longer holds"):
        pop(p, first, name="w")


def test_bottom_value_is_the_parameter_itself_when_nobody_holds_it():
    p = nn.Parameter(torch.randn(3))
    assert bottom_value(p).data_ptr() == p.data_ptr()
    assert not bottom_value(p).requires_grad


def test_whole_tensors_and_parents():
    p = nn.Parameter(torch.randn(3, 2))
    base = p.detach().clone()
    push(p, Holder("full", None, base.clone(), ("aa",)))
    with torch.no_grad():
        p.add_(1)
    apply(p, torch.tensor([5], dtype=torch.int32), torch.tensor([9.0]), parents=("bb", "cc"))
    assert torch.equal(bottom_value(p), base)
    assert parents_of(p) == ("aa", "bb", "cc")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 11), min_size=1, unique=True), max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_stack_unwinds_bit_for_bit(layers, dtype):
    p = nn.Parameter(torch.randn(12).to(dtype))
    states, stack = [p.detach().clone()], []
    for positions in layers:
        at = torch.tensor(sorted(positions), dtype=torch.int32)
        stack.append(apply(p, at, torch.randn(len(positions))))
        assert torch.equal(bottom_value(p), states[0])
        states.append(p.detach().clone())
    while stack:
        assert torch.equal(p, states.pop())
        holder = stack.pop()
        pop(p, holder)
        write_entries_(p, holder.indices, holder.saved)
        assert torch.equal(bottom_value(p), states[0])


def test_a_dropped_parameter_is_freed():
    p = nn.Parameter(torch.zeros(4))
    apply(p, torch.tensor([1], dtype=torch.int32), torch.ones(1))
    gone = weakref.ref(p)
    del p
    gc.collect()
    assert gone() is None
