"""DeFT-X's selection: magnitude's masks in the limits, else the largest denoised differences."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging

import pytest
import torch
from torch import nn

from sparseft import Denoise, denoised, select
from sparseft.errors import DecompositionError, MaskError, OptionError
from sparseft.selection import selectors

SCOPES = ["global", "tensor", "row"]
NUMEL = 24 + 18 + 30 + 1 + 36 + 7


def in_scope(scores, nnz, scope):
    """Flat positions kept, by sorting (score descending, name, index) in each part of a scope."""

    def best(entries, count):
        return sorted(entries, key=lambda e: (-e[0], e[1], e[2]))[:count]

    names = sorted(scores)
    flat = {n: [(v, n, i) for i, v in enumerate(scores[n].reshape(-1).tolist())] for n in names}
    whole = sum(len(x) for x in flat.values())
    shares = {n: divmod(nnz * len(flat[n]), whole) for n in names}
    counts = {n: q for n, (q, _) in shares.items()}
    order = sorted(names, key=lambda n: (-shares[n][1], n))
    for n in order[: nnz - sum(counts.values())]:
        counts[n] += 1
    if scope == "global":
        kept = best([e for n in names for e in flat[n]], nnz)
    elif scope == "tensor":
        kept = [e for n in names for e in best(flat[n], counts[n])]
    else:
        kept = []
        for n in names:
            shape = scores[n].shape
            rows = shape[0] if len(shape) > 1 and flat[n] else min(1, len(flat[n]))
            width = len(flat[n]) // max(1, rows)
            for r in range(rows):
                count = counts[n] // rows + (r < counts[n] % rows)
                kept += best(flat[n][r * width : (r + 1) * width], count)
    return {n: sorted(i for _, m, i in kept if m == n) for n in names}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "limit",
    [{"rank": 1, "residual": 1}, {"rank": 9}, {"energy": 1.0}, {"hard": "median", "residual": 1.0}],
    ids=["all residual", "full rank", "all energy", "all residual, hard"],
)
def test_in_the_limit_the_masks_of_magnitude(pair, scope, limit):
    for dtype in (torch.float32, torch.bfloat16):
        base, tuned = pair(dtype)
        for nnz in (0, 7, 50, NUMEL):
            wanted = select(tuned, "magnitude", nnz=nnz, scope=scope, base=base)
            masks = select(tuned, "deltas_svd", nnz=nnz, scope=scope, base=base, **limit)
            assert masks.equals(wanted)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("memory", ["1GiB", 1500], ids=["one window", "many"])
def test_the_largest_denoised_differences(pair, scope, memory):
    base, tuned = pair(ties=False)
    before = dict(base.named_parameters())
    after = {n: p for n, p in tuned.named_parameters() if p.is_floating_point()}
    pairs = [(n, after[n], before[n]) for n in sorted(after)]
    how = Denoise(rank=2, residual=0.2)
    scores = {n: value.abs() for n, value in denoised(pairs, how)}
    for nnz in (1, 20, 55, 100):
        masks = select(
            tuned,
            "deltas_svd",
            nnz=nnz,
            scope=scope,
            base=base,
            rank=2,
            residual=0.2,
            memory=memory,
        )
        found = {n: p.indices.tolist() for n, p in masks.items()}
        assert found == in_scope(scores, nnz, scope)
    plain = select(tuned, "magnitude", nnz=55, scope=scope, base=base)
    assert not plain.equals(
        select(tuned, "deltas_svd", nnz=55, scope=scope, base=base, rank=2, residual=0.2)
    ), "else nothing was denoised"


def test_equal_scores_go_to_the_first_name_though_shapes_are_taken_together():
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(12, 20, generator=generator)
    other = 0.01 * torch.randn(20, 20, generator=generator)
    model = nn.ParameterDict(
        # a and c share a chunk, b is of another shape and lies between
        {n: nn.Parameter(torch.zeros_like(x)) for n, x in zip("cba", (change, other, change))}  # noqa: B905
    )
    base = {n: p.detach().clone() for n, p in model.items()}
    with torch.no_grad():
        for name, step in zip("cba", (change, other, change), strict=True):
            model[name].add_(step)
    for nnz in (1, 3, 101, 301):
        masks = select(model, "deltas_svd", nnz=nnz, base=base, rank=3)
        first, second = (set(masks[n].indices.tolist()) for n in "ac")
        assert masks["b"].nnz == 0
        assert second < first
        assert len(first) - len(second) == 1


def test_shares_and_strides_of_tall_matrices():
    """Tall matrices lie transposed in their chunk; positions are those of the parameter."""
    base = nn.Linear(5, 60, bias=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.weight += torch.outer(torch.arange(60.0), torch.tensor([1.0, 2, 3, 4, 5])) * 0.1
        tuned.weight[7, 2] += 50
    masks = select(tuned, "deltas_svd", nnz=2, base=base, rank=1, residual=0.0)
    wide = (tuned.weight - base.weight).detach().double()
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    low = (u[:, :1] * s[:1] @ vh[:1]).abs().view(-1)
    assert masks["weight"].indices.tolist() == sorted(low.topk(2).indices.tolist())


def test_embeddings_and_vectors_by_option(pair):
    base, tuned = pair(ties=False)
    plain = {}
    options = {"nnz": 60, "base": base, "rank": 1, "residual": 0.0, "scope": "tensor"}
    plain = select(tuned, "magnitude", nnz=60, base=base, scope="tensor")
    for embeddings, vectors in (("pass", "pass"), ("denoise", "denoise")):
        masks = select(tuned, "deltas_svd", embeddings=embeddings, vectors=vectors, **options)
        same = {n: p.equals(plain[n]) for n, p in masks.items()}
        assert same["cube"]
        assert same["scalar"]
        assert not same["matrix"]
        assert same["embed.weight"] is (embeddings == "pass"), "tied to a head, and an embedding"
        assert same["vector"] is (vectors == "pass")


def test_the_weight_as_target_needs_no_base(pair):
    base, tuned = pair(ties=False)
    masks = select(tuned, "deltas_svd", nnz=30, rank=2, residual=0.1, target="weight")
    given = select(tuned, "deltas_svd", nnz=30, rank=2, target="weight", base=base)
    other = select(base, "deltas_svd", nnz=30, rank=2, target="weight", tuned=tuned)
    weights = sorted((n, p, None) for n, p in tuned.named_parameters() if p.is_floating_point())
    how = Denoise(rank=2, target="weight")
    scores = {n: value.abs() for n, value in denoised(weights, how)}
    assert {n: p.indices.tolist() for n, p in masks.items()} == in_scope(scores, 30, "global")
    assert masks.equals(given)
    assert masks.equals(other)


def test_sources(pair, tmp_path):
    from safetensors.torch import save_file

    base, tuned = pair(ties=False)
    options = {"nnz": 40, "rank": 2}
    wanted = select(tuned, "deltas_svd", base=base, **options)
    state = {n: p.detach().contiguous() for n, p in base.named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    assert select(tuned, "deltas_svd", base=tmp_path, **options).equals(wanted)
    assert select(base, "deltas_svd", base=state, tuned=tuned, **options).equals(wanted)
    with pytest.raises(MaskError, match="holds the very tensors of the tuned model"):
        select(tuned, "deltas_svd", base=tuned, **options)


def test_its_options_are_those_of_denoise():
    entry = selectors()["deltas_svd"]
    defaults = {f.name: f.default for f in dataclasses.fields(Denoise)}
    assert entry.options == {"base": None, "tuned": None, **defaults}
    assert "denoised" in entry.summary
    how = json.loads(json.dumps(dataclasses.asdict(Denoise(rank=1))))
    base, tuned = nn.Linear(4, 3), nn.Linear(4, 3)
    assert select(tuned, "deltas_svd", nnz=5, base=base, **how).nnz == 5


def test_refusals(pair):
    base, tuned = pair()
    with pytest.raises(OptionError, match=r"'deltas_svd' needs base=.*'low_rank'"):
        select(tuned, "deltas_svd", nnz=3, rank=2)
    with pytest.raises(OptionError, match="method 'deltas_svd': got none.* rank=, energy=, hard="):
        select(tuned, "deltas_svd", nnz=3, base=base)
    with pytest.raises(OptionError, match="^selection method 'low_rank': rank is '4'; wanted an"):
        select(tuned, "low_rank", nnz=3, rank="4")
    for name in ("matrix", "vector", "cube"):
        broken = copy.deepcopy(tuned)
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[2] = float("nan")
        with pytest.raises(DecompositionError, match=rf"'{name}'.*NaN.*diverge"):
            select(broken, "deltas_svd", nnz=3, base=base, rank=2)


def test_entries_that_did_not_move_are_reported(caplog):
    base = nn.Linear(10, 10)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.bias += 1
    with caplog.at_level(logging.WARNING, logger="sparseft"):
        masks = select(tuned, "deltas_svd", nnz=15, base=base, rank=2)
    assert masks["bias"].nnz == 10
    assert "'deltas_svd' finds only 10" in caplog.text
    assert "the other 5 kept did not move" in caplog.text
