"""Which entries go and which come, against one sort of everything."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparseft.diff import SparsePattern
from sparseft.training.drop_and_grow import (
    Found,
    candidate_counts,
    counts_to_move,
    drop_and_grow,
)

SHAPES = {"a": (9, 7), "b": (5, 5), "c": (40,)}
NNZ = {"a": 20, "b": 10, "c": 3}


def make(seed=0, ties=False):
    """Return masks with random diffs, and scores for some entries outside of each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        x = torch.randn(n, generator=generator)
        return (x * 2).round() if ties else x

    masks, found = {}, {}
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        order = torch.randperm(numel, generator=generator)
        inside, outside = order[: NNZ[name]].sort().values, order[NNZ[name] :].sort().values
        masks[name] = SimpleNamespace(
            pattern=SparsePattern.from_indices(inside, shape), leaf=draw(NNZ[name]),
            base=draw(NNZ[name]),
        )  # fmt: skip
        found[name] = Found(outside[::2].int(), draw(outside[::2].numel()))
    return masks, found


def by_hand(masks, found, names, count, drop):
    """Return {name: set} after moving ``count`` entries among ``names``, ties as documented."""
    inside = [
        (float(score), order, int(i), n)
        for order, n in enumerate(names)
        for i, score in zip(
            masks[n].pattern.indices,
            masks[n].leaf.abs() if drop == "diff" else (masks[n].base + masks[n].leaf).abs(),
            strict=True,
        )
    ]
    best = {n: max((e for e in inside if e[3] == n), key=lambda e: (e[0], -e[2])) for n in names}
    if len(names) > 1:  # the best of each tensor stays
        inside = [(float("inf"), *e[1:]) if e == best[e[3]] else e for e in inside]
    kept = sorted(inside, key=lambda e: (-e[0], e[1], e[2]))[: len(inside) - count]
    outside = [
        (float(abs(s)), order, int(i), n)
        for order, n in enumerate(names)
        for i, s in zip(*found[n], strict=True)
    ]
    grown = sorted(outside, key=lambda e: (-e[0], e[1], e[2]))[:count]
    return {n: {e[2] for e in kept + grown if e[3] == n} for n in names}


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("drop", ["diff", "weight"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_it_is_one_sort_of_diffs_and_one_of_scores(scope, drop, ties):
    for seed in range(5):
        masks, found = make(seed, ties)
        new = drop_and_grow(masks, found, rate=0.35, scope=scope, drop=drop)
        groups = [list(masks)] if scope == "global" else [[n] for n in masks]
        for names in groups:
            useful = sum(int((found[n].scores != 0).sum()) for n in names)
            count = min(int(0.35 * sum(NNZ[n] for n in names)), useful)
            for name, wanted in by_hand(masks, found, names, count, drop).items():
                got = new[name] if name in new else masks[name].pattern
                assert set(got.indices.tolist()) == wanted, (seed, name)
                SparsePattern(got.indices, got.shape)  # ascending, unique, in range
                assert scope == "global" or got.nnz == NNZ[name]
        assert sum((new.get(n) or masks[n].pattern).nnz for n in masks) == sum(NNZ.values())


def test_the_total_is_exact_where_one_tensor_takes_all():
    masks, found = make()
    for name in ("a", "b"):
        found[name] = Found(found[name].indices, found[name].scores * 1e-6)
        masks[name].leaf *= 1e-6
    new = drop_and_grow(masks, found, rate=0.9, scope="global", drop="diff")
    counts = {n: new[n].nnz for n in masks}
    assert sum(counts.values()) == sum(NNZ.values())
    assert counts["c"] > NNZ["c"]
    assert min(counts.values()) >= 1


def test_few_candidates_or_none_with_a_gradient_move_less():
    masks, found = make()
    found["a"] = Found(found["a"].indices[:2], found["a"].scores[:2])
    found["b"] = Found(found["b"].indices, torch.zeros_like(found["b"].scores))
    del found["c"]
    new = drop_and_grow(masks, found, rate=0.5, scope="tensor", drop="diff")
    assert list(new) == ["a"]
    lost = set(masks["a"].pattern.indices.tolist()) - set(new["a"].indices.tolist())
    assert len(lost) == 2


def test_candidates_that_the_mask_has_taken_in_since_are_left_out():
    masks, found = make()
    taken = masks["a"].pattern.indices[:4]
    indices, order = torch.cat([found["a"].indices, taken]).sort()
    scores = torch.cat([found["a"].scores, torch.full((4,), 100.0)])[order]
    plain = drop_and_grow(masks, found, rate=0.3, scope="tensor", drop="diff")
    found["a"] = Found(indices, scores)
    again = drop_and_grow(masks, found, rate=0.3, scope="tensor", drop="diff")
    assert again["a"].equals(plain["a"])


def test_counts():
    assert counts_to_move({"a": 20, "b": 1, "c": 3}, 0.5, "tensor") == {"a": 10, "b": 0, "c": 1}
    assert counts_to_move({"a": 20, "b": 1, "c": 3}, 0.5, "global") == {"": 12}
    assert counts_to_move({"a": 2, "b": 1}, 0.9, "global") == {"": 1}
    patterns = {n: m.pattern for n, m in make()[0].items()}
    # At most what is free: b has 15 entries outside of its mask, c may grow one.
    assert candidate_counts(patterns, 0.5, "tensor", 4.0) == {"a": 40, "b": 15, "c": 4}
    assert candidate_counts(patterns, 0.01, "tensor", 4.0) == {}
    # 16 move in all, of 128 entries: a has 63 of them, b 25, c 40.
    assert candidate_counts(patterns, 0.5, "global", 2.0) == {"a": 16, "b": 7, "c": 10}
