"""rows, blocks, tiles and n:m against their definitions; what they refuse; what tiles save."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseft import ops, select
from sparseft.errors import MaskError, OptionError, UnknownNameError
from sparseft.selection import options_of, tiles
from sparseft.selection.counts import apportion

SHAPES = [(), (0,), (5,), (2, 3), (4, 7), (3, 0), (2, 2, 3), (6, 1)]
# Few values, so that units tie and sums are exact.
VALUES = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0])


@st.composite
def scored(draw):
    """Scores by name."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    found = {}
    for i, shape in enumerate(shapes):
        count = math.prod(shape)
        values = draw(st.lists(VALUES, min_size=count, max_size=count))
        found[f"p{i}"] = torch.tensor(values, dtype=torch.float32).reshape(shape)
    return found


def chosen(scores, method, **options):
    """Positions by name, of a model whose scores are these."""
    model = nn.ParameterDict({n: nn.Parameter(torch.zeros_like(s)) for n, s in scores.items()})
    masks = select(model, method, score="function", fn=lambda n, p: scores[n], **options)
    return {name: pattern.indices.tolist() for name, pattern in masks.items()}


def numel(scores):
    return sum(s.numel() for s in scores.values())


def matrix(scores):
    """(dim 0, the rest); vectors and scalars are one row."""
    return scores.reshape(scores.shape[0], -1) if scores.numel() and scores.ndim > 1 else (
        scores.reshape(1, -1)
    )  # fmt: skip


def units(scores, cut):
    """Every unit as (-mass, name, number, positions), from rectangles ``cut(tensor)`` wide."""
    found = []
    for name, tensor in scores.items():
        table = matrix(tensor)
        height, width = cut(tensor, table)
        tops = range(0, table.shape[0], height)
        lefts = range(0, table.shape[1], width)
        for number, (top, left) in enumerate(itertools.product(tops, lefts)):
            rows = range(top, min(top + height, table.shape[0]))
            columns = range(left, min(left + width, table.shape[1]))
            places = [r * table.shape[1] + c for r in rows for c in columns]
            mass = sum(table.reshape(-1)[i].item() for i in places)
            found.append((-mass, name, number, places))
    return sorted(found)


def best(scores, name, places, count):
    """The best positions of one tensor among some, ties to the first."""
    flat = scores[name].reshape(-1)
    return sorted(places, key=lambda i: (-flat[i].item(), i))[:count]


def whole_units(scores, cut, nnz):
    """The definition: units in order while there is room, then the best of the next."""
    kept = {name: [] for name in scores}
    for _, name, _, places in units(scores, cut):
        took = places if len(places) <= nnz else best(scores, name, places, nnz)
        kept[name] += took
        nnz -= len(took)
        if not nnz:
            break
    return {name: sorted(places) for name, places in kept.items()}


CUTS = {
    "rows": ({}, lambda tensor, table: (1, max(1, table.shape[1]))),
    "columns": (
        {"dim": "in"},
        lambda tensor, table: (
            (max(1, table.shape[0]), 1) if tensor.ndim > 1 else (1, max(1, table.shape[1]))
        ),
    ),
    "blocks": ({"block": (2, 3)}, lambda tensor, table: (2, 3)),
    "high blocks": ({"block": [100, 2]}, lambda tensor, table: (100, 2)),
}


@pytest.mark.parametrize("kind", CUTS)
@given(scores=scored(), part=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_whole_units_by_definition(kind, scores, part):
    options, cut = CUTS[kind]
    method = "blocks" if "blocks" in kind else "rows"
    nnz = round(part * numel(scores))
    assert chosen(scores, method, nnz=nnz, **options) == whole_units(scores, cut, nnz)
    shares = apportion(nnz, [s.numel() for s in scores.values()])
    wanted = {
        name: whole_units({name: s}, cut, share)[name] if share else []
        for (name, s), share in zip(scores.items(), shares, strict=True)
    }
    assert chosen(scores, method, nnz=nnz, scope="tensor", **options) == wanted


def inside_tiles(scores, nnz, fraction):
    """The definition of tiles: as many as asked for, or as nnz needs; then the best inside."""
    matrices = {n: s for n, s in scores.items() if s.ndim > 1}
    ranked = units(matrices, lambda tensor, table: (2, 2))
    open_to = {n: set(range(s.numel())) for n, s in scores.items() if s.ndim < 2}
    room = sum(map(len, open_to.values()))
    for i, (_, name, _, places) in enumerate(ranked):
        if i >= math.ceil(fraction * len(ranked)) and room >= nnz:
            break
        open_to.setdefault(name, set()).update(places)
        room += len(places)
    entries = [
        (-scores[n].reshape(-1)[i].item(), n, i) for n, places in open_to.items() for i in places
    ]
    kept = sorted(entries)[:nnz]
    return {name: sorted(i for _, n, i in kept if n == name) for name in scores}


class TestTiles:
    @given(scores=scored(), part=st.floats(0, 1), fraction=st.sampled_from([0.01, 0.2, 0.5, 1.0]))
    @settings(max_examples=60, deadline=None)
    def test_by_definition(self, scores, part, fraction):
        nnz = round(part * numel(scores))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "TILE", 2)
            assert chosen(scores, "tiles", nnz=nnz, fraction=fraction) == inside_tiles(
                scores, nnz, fraction
            )
            shares = apportion(nnz, [s.numel() for s in scores.values()])
            wanted = {
                n: inside_tiles({n: s}, share, fraction)[n]
                for (n, s), share in zip(scores.items(), shares, strict=True)
            }
            assert chosen(scores, "tiles", nnz=nnz, fraction=fraction, scope="tensor") == wanted

    def test_all_tiles_are_the_plain_mask(self, pair):
        base, tuned = pair()
        for scope in ("global", "tensor"):
            plain = select(tuned, nnz=50, base=base, scope=scope)
            free = select(tuned, "tiles", nnz=50, base=base, scope=scope, fraction=1.0)
            assert free.equals(plain)

    def test_the_sampled_gradient_skips_the_other_tiles(self):
        """Fewer programs on a GPU, fewer rows and columns on a CPU; the gradient is the same."""
        pytest.importorskip("triton")
        from sparseft.ops._layout import layout_of
        from sparseft.ops._tiles import tiles_of
        from sparseft_kernels._configs import TILE

        assert tiles.TILE == TILE, "the kernels' own tile"
        generator = torch.Generator().manual_seed(0)
        rows, cols = 5 * TILE + 40, 4 * TILE + 72  # 6 x 5 tiles, smaller at the edges
        heavy = {(1, 2), (4, 0), (4, 2), (5, 4)}
        weight = torch.rand(rows, cols, generator=generator)
        for down, across in heavy:
            weight[down * TILE : (down + 1) * TILE, across * TILE : (across + 1) * TILE] += 3
        model = nn.ParameterDict({"w": nn.Parameter(weight)})
        nnz = 9000
        options = {"nnz": nnz, "score": "weight_magnitude"}
        few = select(model, "tiles", fraction=4 / 30, **options)["w"]
        plain = select(model, "random", nnz=nnz)["w"]

        def used(pattern):
            return tiles_of(pattern.indices, rows, cols)

        at = torch.stack([few.indices // cols // TILE, few.indices % cols // TILE])
        assert set(map(tuple, at.t().tolist())) == heavy
        assert used(plain).work[1].table.shape[0] == 30
        assert used(few).work[1].table.shape[0] <= 4
        layout = layout_of(few.indices, rows, cols)
        computed = sum(last - first for first, last, *_ in layout.runs(1024, 512))
        assert computed == 2 * TILE + 40, "the row blocks of tiles 1, 4 and 5 alone"
        everything = layout_of(plain.indices, rows, cols)
        assert sum(last - first for first, last, *_ in everything.runs(1024, 512)) == rows

        x, dy = (torch.randn(16, n, generator=generator) for n in (cols, rows))
        got = ops.sampled_weight_grad(dy, x, few)
        assert torch.allclose(got, (dy.t() @ x).view(-1)[few.indices.long()], atol=1e-4)

    def test_more_tiles_where_nnz_needs_them(self):
        model = nn.ParameterDict({"w": nn.Parameter(torch.rand(256, 256))})
        for nnz, wanted in ((1, 1), (128 * 128, 1), (128 * 128 + 1, 2), (256 * 256, 4)):
            mask = select(model, "tiles", score="weight_magnitude", nnz=nnz, fraction=1e-9)["w"]
            at = (mask.indices // 256 // 128) * 2 + mask.indices % 256 // 128
            assert (mask.nnz, len(at.unique())) == (nnz, wanted)

    def test_vectors_take_part(self):
        """They cost the sampled gradient nothing, so no tile keeps them out."""
        model = nn.ParameterDict(
            {"b": nn.Parameter(torch.full((3,), 9.0)), "w": nn.Parameter(torch.rand(300, 300))}
        )
        masks = select(model, "tiles", score="weight_magnitude", nnz=10, fraction=0.01)
        assert masks["b"].nnz == 3
        assert masks["w"].nnz == 7


def n_of_m(tensor, n, m):
    """The definition: each row of the last dim in groups, a shorter one in proportion."""
    width = tensor.shape[-1] if tensor.ndim else 1
    flat = tensor.reshape(-1).tolist()
    kept = []
    for start in range(0, len(flat), width or 1):
        for first in range(start, start + width, m):
            group = range(first, min(first + m, start + width))
            count = len(group) * n // m
            kept += sorted(group, key=lambda i: (-flat[i], i))[:count]
    return sorted(kept)


class TestNOfM:
    @given(scores=scored(), of=st.sampled_from([(2, 4), (1, 2), (1, 1), (3, 5), (5, 20), (17, 18)]))
    @settings(max_examples=60, deadline=None)
    def test_by_definition(self, scores, of):
        n, m = of
        assert chosen(scores, "n:m", n=n, m=m) == {k: n_of_m(s, n, m) for k, s in scores.items()}

    def test_two_of_four_by_default(self):
        model = nn.ParameterDict({"w": nn.Parameter(torch.randn(64, 96)), "s": nn.Parameter(
            torch.ones(()))})  # fmt: skip
        mask = select(model, "n:m", score="weight_magnitude")
        groups = mask["w"].to_mask().view(-1, 4)
        assert groups.sum(1).eq(2).all()
        size = model["w"].detach().abs().view(-1, 4)
        assert (size * groups).amax(1).equal(size.amax(1))
        assert (
            torch.where(groups, size, torch.inf)
            .amin(1)
            .ge(torch.where(groups, 0, size).amax(1))
            .all()
        )
        assert mask["s"].nnz == 0

    def test_a_count_must_be_the_structures(self):
        model = nn.ParameterDict({"w": nn.Parameter(torch.randn(6, 8))})
        given = {"score": "weight_magnitude"}
        wanted = select(model, "n:m", **given)
        assert select(model, "n:m", nnz=24, **given).equals(wanted)
        assert select(model, "n:m", density=0.5, **given).equals(wanted)
        with pytest.raises(MaskError, match="23 entries were asked for but the masks of 'n:m'"):
            select(model, "n:m", nnz=23, **given)

    @pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (2.0, 4), (True, 4), (2, None)])
    def test_refusals(self, n, m):
        model = nn.ParameterDict({"w": nn.Parameter(torch.randn(6, 8))})
        with pytest.raises(OptionError, match=r"wanted integers with 1 <= n <= m"):
            select(model, "n:m", n=n, m=m, score="weight_magnitude")


class TestWeightMagnitude:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_the_largest_and_the_smallest(self, dtype):
        weight = torch.randn(40, 30, dtype=torch.float64).to(dtype)
        weight[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny / 4, torch.inf])
        model = nn.ParameterDict({"w": nn.Parameter(weight)})
        order = weight.abs().double().view(-1)
        most = order.argsort(descending=True, stable=True)
        least = order.argsort(stable=True)
        for nnz in (1, 2, 3, 400, 1200):
            kept = select(model, "weight_magnitude", nnz=nnz)["w"].indices
            assert kept.tolist() == most[:nnz].sort().values.tolist()
            kept = select(model, "weight_magnitude", nnz=nnz, largest=False)["w"].indices
            assert kept.tolist() == least[:nnz].sort().values.tolist()

    def test_nan_is_refused_at_either_end(self):
        model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([1.0, torch.nan, 2.0]))})
        for largest in (True, False):
            with pytest.raises(MaskError, match="'w' are NaN .first at flat index 1"):
                select(model, "weight_magnitude", nnz=1, largest=largest)

    def test_the_mask_is_of_the_weights_as_they_are(self, pair):
        base, tuned = pair()
        assert not select(tuned, "weight_magnitude", nnz=30).equals(
            select(base, "weight_magnitude", nnz=30)
        )
        assert "base" not in options_of("weight_magnitude")

    def test_refusals(self, pair):
        base, tuned = pair()
        with pytest.raises(OptionError, match="largest is 'no', wanted True or False"):
            select(tuned, "weight_magnitude", nnz=1, largest="no")
        for method in ("rows", "blocks", "tiles"):
            with pytest.raises(OptionError, match="largest=False ranks entries, but units"):
                select(tuned, method, score="weight_magnitude", largest=False, nnz=4)
        masks = select(tuned, "n:m", score="weight_magnitude", largest=False, n=1, m=2)
        size = tuned.matrix.detach().abs().view(-1, 2)
        assert masks["matrix"].to_mask().view(-1, 2).eq(size == size.amin(1, keepdim=True)).all()


class TestOptions:
    def test_those_of_the_scores_go_through(self, pair):
        base, tuned = pair(ties=False)
        for method in ("rows", "blocks", "tiles"):
            plain = select(tuned, method, nnz=50, base=base)
            denoised = select(
                tuned, method, nnz=50, score="deltas_svd", base=base, rank=1, residual=0
            )
            assert not plain.equals(denoised)
            swapped = select(base, method, nnz=50, base=base, tuned=tuned)
            assert swapped.equals(plain)
            seeded = [select(tuned, method, nnz=50, score="random", seed=s) for s in (0, 1, 0)]
            assert seeded[0].equals(seeded[2])
            assert not seeded[0].equals(seeded[1])

    def test_what_a_method_takes_depends_on_its_score(self):
        assert {"base", "tuned", "dim", "score"} <= set(options_of("rows"))
        assert "base" not in options_of("rows", {"score": "random"})
        assert {"rank", "base"} <= set(options_of("tiles", {"score": "deltas_svd"}))
        assert options_of("random") == {"seed": 0}

    def test_refusals(self, pair):
        base, tuned = pair()
        for method, options, message in (
            ("rows", {"dim": "inn"}, "dim='inn' is not 'out' or 'in'.*Did you mean 'in'"),
            ("blocks", {"block": 16}, r"block is 16, wanted rows and columns"),
            ("blocks", {"block": (16, 0)}, r"block is \(16, 0\), wanted"),
            ("blocks", {"block": "ab"}, r"block is 'ab', wanted"),
            ("tiles", {"fraction": 0}, r"fraction is 0, wanted a part of the tiles in \(0, 1\]"),
            ("tiles", {"fraction": 20}, "fraction is 20, wanted"),
            ("tiles", {"fraction": "0.2"}, "fraction is '0.2', wanted"),
            ("tiles", {"score": "function", "fn": iter([1])}, "fn is a list_iterator, .*read once"),
        ):
            given = {"base": base} if "base" in options_of(method, options) else {}
            with pytest.raises(OptionError, match=message):
                select(tuned, method, nnz=5, **given, **options)
        for method in ("rows", "blocks", "tiles"):
            with pytest.raises(MaskError, match=f"scope='row' means nothing for '{method}'"):
                select(tuned, method, nnz=5, base=base, scope="row")
            with pytest.raises(MaskError, match="one of the two; got neither"):
                select(tuned, method, base=base)
        with pytest.raises(UnknownNameError, match="no option 'dimm'.*Did you mean 'dim'"):
            select(tuned, "rows", nnz=5, base=base, dimm="in")
        with pytest.raises(UnknownNameError, match="no option 'fraktion'.*Did you mean 'fraction'"):
            select(tuned, "tiles", nnz=5, base=base, fraktion=0.5)


class TestWalks:
    """How often the scores are computed: what a costly scoring method pays."""

    @pytest.mark.parametrize(
        ("method", "options", "walks"),
        [
            ("rows", {"nnz": [5, 50, 20]}, 2),
            ("rows", {"nnz": [6, 12], "include": ["matrix"]}, 1),  # whole rows of 6
            ("blocks", {"nnz": [5, 50, 20]}, 2),
            ("tiles", {"nnz": [5, 50, 20]}, 2),
            ("n:m", {}, 1),
        ],
    )
    def test_whatever_the_number_of_counts(self, pair, method, options, walks):
        _, tuned = pair()
        asked = []

        def score(name, parameter):
            asked.append(name)
            return parameter.abs()

        select(tuned, method, score="function", fn=score, **options)
        assert max(map(asked.count, asked)) == walks


@pytest.mark.parametrize("method", ["rows", "blocks", "tiles"])
def test_units_without_any_score_are_said(method, caplog):
    """As with plain masks: the count stays exact, and both numbers are said."""
    base = {"a": torch.zeros(6, 4), "b": torch.zeros(3)}
    tuned = {"a": torch.zeros(6, 4), "b": torch.ones(3)}
    tuned["a"][2] = 1.0
    model = nn.ParameterDict({n: nn.Parameter(t) for n, t in tuned.items()})
    options = {"block": (1, 4)} if method == "blocks" else {}
    with caplog.at_level(logging.WARNING):
        assert select(model, method, nnz=7, base=base, **options).nnz == 7
        assert not caplog.records
        assert select(model, method, nnz=10, base=base, **options).nnz == 10
    [said] = [record.getMessage() for record in caplog.records]
    assert (
        f"10 entries were asked for, but '{method}' finds only 7 in {method} with a score" in said
    )
    assert "the other 3 kept did not move" in said
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        copied = {n: t.clone() for n, t in tuned.items()}
        select(model, method, nnz=10, base=copied, **options)
    assert "Is base the model as it was before training" in caplog.text
