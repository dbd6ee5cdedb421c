"""What ranks exchange: counted, and on the wire."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sparseft.profiling.communication import Communication, Counter
from sparseft.profiling.sharding import fake_ranks
from sparseft.profiling.tracker import MemoryTracker


def test_a_ring_sends_each_part_but_the_own_once_or_twice():
    all_reduced = Communication(all_reduced=1200)
    gathered = Communication(all_gathered=1200)
    scattered = Communication(reduce_scattered=1200)
    assert [all_reduced.on_the_wire(n) for n in (1, 2, 4)] == [0, 1200, 1800]
    # A reduce-scatter and an all-gather make an all-reduce.
    for n in (1, 2, 3, 4):
        parts = gathered.on_the_wire(n) + scattered.on_the_wire(n)
        assert parts == all_reduced.on_the_wire(n)
    assert [Communication(broadcast=7).on_the_wire(n) for n in (1, 2, 16)] == [0, 7, 7]


def test_json_there_and_back():
    sent = Communication(all_reduced=1, all_gathered=2, reduce_scattered=4, broadcast=8)
    data = sent.to_json(2)
    assert data["on_the_wire"] == sent.on_the_wire(2) == 1 + 1 + 2 + 8
    assert Communication.from_json(data) == sent
    assert sent.payload == 15


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_collectives_are_counted_by_the_whole_tensor():
    counter = Counter()

    def see(func, args, kwargs):
        counter.see(func, args)
        return 0

    part, whole = torch.zeros(10), torch.zeros(40)
    with fake_ranks(4), MemoryTracker(workspace=see):
        dist.all_reduce(part)
        dist.all_reduce(part.bfloat16())
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.broadcast(part.double(), 0)
        part + 1
    assert counter.total() == Communication(
        all_reduced=40 + 20, all_gathered=160, reduce_scattered=160, broadcast=80
    )
