"""Tables of what is alive: torch.compile iterates over them while models come and go."""

from __future__ import annotations

import gc

import torch
from torch import nn

from sparseft.modules import storage_stack
from sparseft.modules.weak_table import WeakTable


class Value:
    def __init__(self) -> None:
        self.key = object()


def put(table: WeakTable[Value]) -> Value:
    value = Value()
    table.put(value.key, value)
    return value


def test_values_are_found_by_identity_and_forgotten_when_they_die():
    table: WeakTable[Value] = WeakTable()
    first, second = put(table), put(table)
    assert table.get(first.key) is first
    assert table.get(object()) is None
    key = first.key
    del first
    gc.collect()
    assert table.get(key) is None
    assert table.values() == [second]
    table.remove(second.key)
    assert table.values() == []


def test_a_value_that_dies_under_an_iteration_ends_nothing():
    """The tracer of torch.compile met a collection there: "dictionary changed size"."""
    table: WeakTable[Value] = WeakTable()
    values = [put(table) for _ in range(3)]
    for _ in table._found.items():
        values.clear()
        gc.collect()
    assert table.values() == []
    alive = put(table)
    assert list(table._found) == [id(alive.key)], "the dead are dropped by the next put"


def test_an_address_that_was_taken_again_keeps_its_new_value():
    table: WeakTable[Value] = WeakTable()
    key, first = object(), Value()
    table.put(key, first)
    del first
    gc.collect()
    second = Value()
    table.put(key, second)
    put(table)
    assert table.get(key) is second


def test_a_parameter_that_dies_under_an_iteration_leaves_no_values():
    stacks = storage_stack._Stacks()
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    held = [stacks.made(p) for p in parameters]
    for stack in held:
        stack.append(storage_stack.Holder("x", None, torch.ones(2)))
    for _ in stacks._found.items():
        parameters.clear()
        gc.collect()
    assert len(stacks) == 0
    assert held == [[], [], []], "saved values are freed at once"
    alive = nn.Parameter(torch.zeros(2))
    stacks.made(alive)
    assert list(stacks._found) == [id(alive)]
