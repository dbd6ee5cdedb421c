"""The overlap report against its definition with sets and dense tensors."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import Adapter, SparseDiff, overlap_report
from sparseft.adapter import AdapterMetadata, DiffHeader, DiffSource
from sparseft.composition import overlap as overlap_module
from sparseft.composition.overlap import count_tensor
from sparseft.composition.overlap_groups import (
    group_tensors,
    kind_and_layer,
    layer_of,
    natural_key,
)
from sparseft.composition.overlap_pairs import MEASURES, PairOverlap
from sparseft.errors import BaseMismatchError, CompositionError, UnknownNameError
from sparseft.fingerprint import Fingerprint, fingerprint_tensor

SHAPES = {"embed.weight": (7, 3), "layer.2.w": (4, 4), "layer.10.w": (4, 4), "layer.10.b": (4,)}

# Few different values, so that zeros and equal magnitudes occur.
values = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])


@st.composite
def diffs(draw, numel: int):
    chosen = draw(st.dictionaries(st.integers(0, numel - 1), values))
    mode = draw(st.sampled_from(["add", "add", "add", "set"]))
    return chosen, mode


@st.composite
def several(draw):
    """Adapters as {tensor: ({position: value}, mode)}; not every tensor in every adapter."""
    count = draw(st.integers(2, 4))
    return [
        {
            name: draw(diffs(math.prod(shape)))
            for name, shape in SHAPES.items()
            if draw(st.booleans())
        }
        for _ in range(count)
    ]


def adapter_of(content, name: str, dtype=torch.float32) -> Adapter:
    made = {}
    for tensor, (entries, mode) in content.items():
        shape = SHAPES[tensor]
        at = sorted(entries)
        made[tensor] = SparseDiff(
            torch.tensor(at, dtype=torch.int32),
            torch.tensor([entries[i] for i in at], dtype=dtype),
            torch.Size(shape),
            mode,
        )
    return Adapter(made, name=name)


def naive(a, b, tensors) -> PairOverlap:
    """The definition, entry by entry."""
    total = PairOverlap()
    for tensor in tensors:
        ours, our_mode = a.get(tensor, ({}, "add"))
        theirs, their_mode = b.get(tensor, ({}, "add"))
        both = ours.keys() & theirs.keys()
        chance = len(ours) * len(theirs) / math.prod(SHAPES[tensor])
        if our_mode == their_mode == "add":
            total += PairOverlap(
                len(ours), len(theirs), len(both), chance, len(both),
                sum(ours[i] * theirs[i] < 0 for i in both),
                sum(ours[i] * theirs[i] for i in both),
                sum(v * v for v in ours.values()),
                sum(v * v for v in theirs.values()),
            )  # fmt: skip
        else:
            total += PairOverlap(len(ours), len(theirs), len(both), chance)
    return total


@given(contents=several())
@settings(max_examples=120, deadline=None)
def test_against_sets(contents):
    """All values are multiples of 1/4, so every sum is exact and may be compared with ==."""
    adapters = [adapter_of(content, f"a{i}") for i, content in enumerate(contents)]
    report = overlap_report(adapters)
    there = sorted({t for content in contents for t in content}, key=natural_key)
    assert report.tensors == there
    groups = {"ten": "layer.10.*"} if any(t.startswith("layer.10.") for t in there) else {}
    for i, one in enumerate(contents):
        norm = sum(v * v for e, m in one.values() if m == "add" for v in e.values()) ** 0.5
        assert report.norms[f"a{i}"] == norm
        assert report.nnz[f"a{i}"] == sum(len(e) for e, _ in one.values())
        for j, other in enumerate(contents):
            if i == j:
                continue
            a, b = f"a{i}", f"a{j}"
            assert report.pair(a, b) == naive(one, other, there)
            for tensor, found in report.by("tensor", a, b).items():
                assert found == naive(one, other, [tensor])
            for found in report.by(groups, a, b).values():
                ten = [t for t in there if t.startswith("layer.10.")]
                assert found == naive(one, other, ten)
            for measure in MEASURES:
                assert report.matrix(measure)[i][j] == getattr(naive(one, other, there), measure)


def dense_cosine(a: Adapter, b: Adapter) -> float:
    def flat(adapter):
        parts = [
            adapter[n].to_dense().double().reshape(-1) if n in adapter.names else torch.zeros(size)
            for n, size in ((n, math.prod(s)) for n, s in SHAPES.items())
        ]
        return torch.cat(parts)

    return float(torch.nn.functional.cosine_similarity(flat(a), flat(b), dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@given(seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_cosine_of_the_dense_changes(dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def content():
        draw = {n: torch.randn(4, generator=generator).tolist() for n in SHAPES}
        return {
            n: ({i: draw[n][i] for i in range(0, 4, 1 + k % 2)}, "add")
            for k, n in enumerate(SHAPES)
        }

    a, b = (adapter_of(content(), name, dtype) for name in "ab")
    pair = overlap_report([a, b]).pair("a", "b")
    assert pair.cosine == pytest.approx(dense_cosine(a, b), rel=1e-12, abs=1e-14)


def test_unions_of_many_pieces(monkeypatch):
    """The same counts whatever the width of a piece, at its borders, too."""
    generator = torch.Generator().manual_seed(0)
    found = []
    diffs = []
    for _ in range(3):
        dense = torch.randint(-2, 3, (40,), generator=generator).float()
        diffs.append(SparseDiff.from_dense(dense))
    union = len({int(i) for d in diffs for i in d.indices})
    for width in (1, 3, union - 1, union, union + 1, 1 << 16):
        monkeypatch.setattr(overlap_module, "_COLUMNS", width)
        counts = count_tensor([diffs[0], None, *diffs[1:]])
        found.append((counts.common, counts.opposed, counts.dots))
        assert counts.nnz.tolist() == [diffs[0].nnz, 0, diffs[1].nnz, diffs[2].nnz]
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    common = len(set(diffs[0].indices.tolist()) & set(diffs[2].indices.tolist()))
    assert found[0][0][0, 3] == common > 0


def test_positions_beyond_int32():
    shape = torch.Size((2**17, 2**17))

    def far(*at):
        return SparseDiff(torch.tensor(at), torch.ones(len(at)), shape)

    counts = count_tensor([far(1, 2**33), far(2**33, 2**33 + 1)])
    assert counts.common.tolist() == [[2, 1], [1, 2]]


def test_extremes():
    def one(value, dtype=torch.float32):
        return Adapter({"w": SparseDiff.from_dense(torch.tensor([value, value], dtype=dtype))})

    def cosine(a, b):
        return overlap_report({"a": a, "b": b}).pair("a", "b").cosine

    assert cosine(one(1.0), one(2.0)) == 1.0
    assert cosine(one(1.0), one(-2.0)) == -1.0
    assert cosine(one(3e38), one(-3e38)) == -1.0, "fp32's largest do not overflow"
    assert cosine(one(1e-45), one(1e-45)) == pytest.approx(1.0)
    assert cosine(one(1e150, torch.float64), one(1e150, torch.float64)) == 1.0
    assert cosine(one(1e300, torch.float64), one(1.0)) is None, "its square is infinite"
    empty = Adapter({"w": SparseDiff.from_dense(torch.zeros(2))})
    pair = overlap_report({"a": empty, "b": one(1.0)}).pair("a", "b")
    assert (pair.jaccard, pair.conflict, pair.cosine, pair.times_chance) == (0.0, None, None, None)
    nothing = overlap_report({"a": empty, "b": empty})
    assert nothing.pair("a", "b").jaccard == 0.0
    heads = Adapter({}, dense={"head": torch.ones(2)})
    assert overlap_report([heads, heads]).tensors == []


def test_what_chance_shares():
    a = Adapter({"w": SparseDiff.from_dense(torch.tensor([1.0, 1.0, 0.0, 0.0]))})
    pair = overlap_report({"a": a, "b": a}).pair("a", "b")
    assert pair.chance == 2 * 2 / 4
    assert pair.times_chance == 2.0


class Counting(DiffSource):
    """Diffs that know how often each was read, and how many are read and not dropped."""

    def __init__(self, inner):
        self.inner = inner
        self.read: list[str] = []

    def __getitem__(self, name):
        self.read.append(name)
        return self.inner[name]

    def __contains__(self, name):
        return name in self.inner

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)

    def header(self, name):
        diff = self.inner[name]
        return DiffHeader(diff.shape, diff.nnz, diff.mode, diff.dtype)


def test_lazy_adapters_are_read_once():
    content = {n: ({0: 1.0}, "add") for n in SHAPES}
    sources = [Counting(dict(adapter_of(content, "x").diffs)) for _ in range(5)]
    report = overlap_report([Adapter(s, name=f"a{i}") for i, s in enumerate(sources)])
    report.to_json()
    report.to_markdown()
    for source in sources:
        assert sorted(source.read) == sorted(SHAPES)


def test_names_and_files(tmp_path):
    one, two = (adapter_of({"layer.2.w": ({i: 1.0}, "add")}, "sw") for i in (0, 1))
    assert overlap_report([one, two]).names == ("sw", "sw-2")
    one.save(tmp_path / "one")
    two.save(tmp_path / "two")
    assert overlap_report({"x": tmp_path / "one", "y": tmp_path / "two"}).pair("x", "y").union == 2
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        overlap_report([tmp_path / "one", tmp_path / "tow"])
    with pytest.raises(CompositionError, match="got 1, wanted two or more"):
        overlap_report([one])
    with pytest.raises(CompositionError, match="one adapter was given"):
        overlap_report(one)


def test_other_bases_are_refused():
    def on(base, name):
        adapter = adapter_of({"layer.2.w": ({0: 1.0}, "add")}, name)
        print_ = fingerprint_tensor("layer.2.w", torch.full((4, 4), base))
        metadata = AdapterMetadata(fingerprint=Fingerprint({"layer.2.w": print_}))
        return Adapter(adapter.diffs, name=name, metadata=metadata)

    overlap_report([on(1.0, "a"), on(1.0, "b")])
    with pytest.raises(BaseMismatchError, match="'a' and 'b' were made on different bases: 'lay"):
        overlap_report([on(1.0, "a"), on(2.0, "b")])
    found = overlap_report([on(1.0, "a"), on(2.0, "b")], check_base=False)
    assert found.pair("a", "b").common == 1
    other = Adapter({"layer.2.w": SparseDiff.from_dense(torch.ones(2, 8))}, name="b")
    with pytest.raises(BaseMismatchError, match=r"\(4, 4\) in adapter 'a' but \(2, 8\) in 'b'"):
        overlap_report([on(1.0, "a"), other], check_base=False)


@pytest.fixture(scope="module")
def three():
    def content(k):
        return {
            n: ({i: (-1.0) ** (i * k) * (i + k) for i in range(k, 4)}, "add") for n in SHAPES
        }  # fmt: skip

    starts = {"sw": 1, "qu": 2, "nli": 0}
    return overlap_report([adapter_of(content(k), name) for name, k in starts.items()])


def test_tables(three):
    header, rows = three.table()
    assert [row[0] for row in rows] == ["sw | qu", "sw | nli", "qu | nli"]
    assert all(len(row) == len(header) for row in rows)
    header, rows = three.table("tensor")
    assert [row[0] for row in rows] == ["embed.weight", "layer.2.w", "layer.10.b", "layer.10.w"]
    assert rows[0][-1].startswith("sw | nli "), "3 of 4 entries in common"
    mean = sum(p.jaccard for p in (three.pair("sw", "qu", ["layer.2.w"]),
                                   three.pair("sw", "nli", ["layer.2.w"]),
                                   three.pair("qu", "nli", ["layer.2.w"]))) / 3  # fmt: skip
    assert rows[1][1] == f"{mean:.4f}"
    header, rows = three.table("layer", ("sw", "qu"))
    assert [row[0] for row in rows] == ["embed", "layer.2", "layer.10"]
    assert rows[2][1] == str(three.pair("sw", "qu", "layer.10.*").common)
    header, rows = three.table({"matrices": ["*.w", "*weight"], "vectors": "*.b"}, ("sw", "qu"))
    assert [row[0] for row in rows] == ["matrices", "vectors"]
    assert header[0] == "group"


def test_markdown(three):
    text = three.to_markdown(by="tensor", pair=("sw", "qu"))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    widths = {}
    for line in lines:
        cells = line.replace("\\|", "").count("|")
        widths.setdefault(cells, []).append(line)
    assert "| sw \\| qu |" in text
    assert sum(line.startswith("|---|") for line in lines) == 3
    assert len(lines) == 3 * 2 + 3 + 3 + 4
    assert text.startswith("# Overlap of adapters\n")
    assert sum(line.startswith("|---|") for line in three.to_markdown(None).splitlines()) == 2


def test_json(three):
    data = json.loads(json.dumps(three.to_json(), allow_nan=False))
    assert [a["name"] for a in data["adapters"]] == ["sw", "qu", "nli"]
    assert data["pairs"][0]["jaccard"] == three.pair("sw", "qu").jaccard
    assert [t["name"] for t in data["tensors"]] == three.tensors
    assert sum(t["pairs"][1]["common"] for t in data["tensors"]) == data["pairs"][1]["common"]


def test_unknown_names(three):
    with pytest.raises(UnknownNameError, match="no adapter is called 'sv'. Did you mean 'sw'"):
        three.pair("sv", "qu")
    with pytest.raises(CompositionError, match="a pair is two adapters; got 'sw' twice"):
        three.pair("sw", "sw")
    with pytest.raises(UnknownNameError, match="no tensor's name matches 'layr.2.w'"):
        three.pair("sw", "qu", "layr.2.w")
    with pytest.raises(UnknownNameError, match="no adapter has a diff of 'layer.2.x'. Did you"):
        three.pair("sw", "qu", ["layer.2.x"])
    with pytest.raises(UnknownNameError, match="no measure 'jacard'. Did you mean 'jaccard'"):
        three.matrix("jacard")
    with pytest.raises(UnknownNameError, match="'layers'. Did you mean 'layer'"):
        three.table("layers")


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("roberta.encoder.layer.3.output.dense.weight", "roberta.encoder.layer.3",
         ("roberta.encoder.layer.*.output.dense.weight", 3)),
        ("roberta.embeddings.LayerNorm.bias", "roberta.embeddings",
         ("roberta.embeddings.LayerNorm.bias", None)),
        ("lm_head.bias", "lm_head", ("lm_head.bias", None)),
        ("scale", "scale", ("scale", None)),
        ("experts.4.layer.10.w", "experts.4", ("experts.*.layer.10.w", 4)),
        ("body.0", "body", ("body.*", 0)),
    ],
)  # fmt: skip
def test_layers(name, layer, kind):
    assert layer_of(name) == layer
    assert kind_and_layer(name) == kind


@given(st.lists(st.text("ab.019", min_size=1, max_size=6), unique=True))
@settings(max_examples=60, deadline=None)
def test_natural_order_is_an_order(names):
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key)
    groups = group_tensors(names, "layer")
    assert sorted(t for group in groups.values() for t in group) == sorted(names)
