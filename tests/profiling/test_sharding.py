"""What one of several ranks holds: the arithmetic against sums taken by hand."""

from __future__ import annotations

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseft.profiling.memory import MemoryUse
from sparseft.profiling.predict import predict
from sparseft.profiling.sharding import Shards, shard
from sparseft.profiling.sides import build
from sparseft.profiling.workload import Way, Workload

WORK = Workload(model="decoder:3x32x100", batch=2, length=8)
LAYER = 4 * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32)
ROOT = 4 * (2 * 100 * 32 + 32)
USE = MemoryUse(weights=1000, diff=100, gradients=80, optimizer=160, activations=500, temporary=50)


def shards(way, ranks=4):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return Shards.of(build(WORK, way, "cpu"), ranks)


def test_layers_and_the_root_are_told_apart():
    found = shards(Way("attached", 0.1))
    assert found.weights == 3 * LAYER + ROOT
    assert found.gathered == 2 * LAYER + ROOT
    assert found.reducing == 0


def test_frozen_weights_are_shared_and_what_trains_is_on_each_rank():
    found = shard(USE, Shards(4, weights=900, gathered=300))
    assert found.weights == 100 + 225
    assert found.temporary == 50 + 300
    assert (found.diff, found.gradients, found.optimizer) == (100, 80, 160)
    assert found.activations == 500


def test_where_weights_train_gradients_and_state_are_shared_too():
    found = shard(USE, Shards(4, weights=1000, gathered=300, reducing=40, trains_weights=True))
    assert (found.weights, found.gradients, found.optimizer) == (250, 20, 40)
    assert found.temporary == 50 + 300 + 40


def test_one_rank_is_one_device():
    assert shard(USE, shards(Way("dense"), ranks=1)) is USE


def test_ranks_sum_up_the_leaves_gradients_alone():
    way = Way("attached", 0.1)
    alone, four = predict(WORK, way), predict(WORK, way, world_size=4)
    assert alone.reduced == 0
    assert four.reduced == 4 * four.trainable
    assert four.use.weights < alone.use.weights / 3
    assert four.use.optimizer == alone.use.optimizer
    assert any("4 ranks" in text for text in four.assumed)


@pytest.mark.parametrize("ranks", [2, 8])
def test_dense_training_divides_its_state(ranks):
    alone, several = predict(WORK, Way("dense")), predict(WORK, Way("dense"), world_size=ranks)
    assert several.use.optimizer == -(-alone.use.optimizer // ranks)
