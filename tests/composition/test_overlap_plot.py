"""The heat map: a PNG of the right size and colours, the same bytes each time."""

from __future__ import annotations

import struct

import pytest
import torch

from sparseft import Adapter, SparseDiff, overlap_report
from sparseft.composition.overlap_plot import _by_kind, _by_layer
from sparseft.errors import CompositionError, UnknownNameError

PNG = b"\x89PNG\r\n\x1a\n"


def size_of(path):
    head = path.read_bytes()[:24]
    assert head[:8] == PNG
    return struct.unpack(">II", head[16:])


def pixels(path):
    from matplotlib.image import imread

    return torch.from_numpy(imread(path)[:, :, :3].copy())


def report_of(count: int, *, layers: int = 2, long_names: bool = False, flat: bool = False):
    generator = torch.Generator().manual_seed(0)
    prefix = "organisation/a-rather-long-name-of-an-adapter-" if long_names else "n"
    adapters = {}
    for i in range(count):
        tensors = ["embeddings.word.weight"]
        tensors += [f"encoder.layer.{k}.{part}" for k in range(layers) for part in ("q.w", "out.b")]
        if flat:
            tensors = [f"part{k:03d}x.weight" for k in range(200)]
        diffs = {
            n: SparseDiff.from_dense(
                torch.randn(20, generator=generator) * (torch.rand(20, generator=generator) < 0.5)
            )
            for n in tensors
        }
        adapters[f"{prefix}{i}"] = Adapter(diffs)
    return overlap_report(adapters)


@pytest.fixture(scope="module")
def means(tmp_path_factory):
    """Report of three adapters and the picture of their means, drawn once."""
    report = report_of(3)
    return report, report.heatmap(tmp_path_factory.mktemp("means") / "means.png").read_bytes()


@pytest.mark.parametrize("count", [2, 3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_picture(tmp_path, count, means):
    report = report_of(count)
    path = report.heatmap(tmp_path / "new" / "a.png")
    assert path == tmp_path / "new" / "a.png"
    wide, high = size_of(path)
    assert 600 < wide < 4000
    assert 200 < high < 4000
    image = pixels(path)
    assert image.std() > 0.1
    assert len(torch.unique((image.reshape(-1, 3) * 255).int(), dim=0)) > 50
    if count == 3:
        assert means[1] == path.read_bytes(), "the same adapters, the same bytes"


def test_a_pair_of_many_shows_its_tensors(tmp_path, means):
    report, whole = means
    pair = report.heatmap(tmp_path / "pair.png", pair=("n0", "n2")).read_bytes()
    assert pair != whole
    with pytest.raises(UnknownNameError, match="no adapter is called 'n9'"):
        report.heatmap(tmp_path / "none.png", pair=("n0", "n9"))
    with pytest.raises(CompositionError, match="two adapters; got 'n0' twice"):
        report.heatmap(tmp_path / "none.png", pair=("n0", "n0"))
    assert not (tmp_path / "none.png").exists()


def test_what_is_drawn():
    report = report_of(3)
    grid = _by_kind(report, ("n0", "n1"))
    kinds = ["embeddings.word.weight", "encoder.layer.*.out.b", "encoder.layer.*.q.w"]
    assert list(grid.rows) == kinds
    assert list(grid.columns) == ["–", "0", "1"]
    jaccard, conflict, cosine = grid.values
    assert jaccard[0][1:] == [None, None], "the embeddings are in no layer"
    assert jaccard[2][2] == report.pair("n0", "n1", ["encoder.layer.1.q.w"]).jaccard
    assert cosine[0][0] == report.pair("n0", "n1", ["embeddings.word.weight"]).cosine
    assert conflict[1][1] == report.pair("n0", "n1", ["encoder.layer.0.out.b"]).conflict
    grid = _by_layer(report)
    assert list(grid.rows) == ["embeddings", "encoder.layer.0", "encoder.layer.1"]
    mean = (report.pair("n1", "n0", "*layer.1.*").cosine
            + report.pair("n1", "n2", "*layer.1.*").cosine) / 2  # fmt: skip
    assert grid.values[2][2][1] == pytest.approx(mean)


def test_long_names_and_many_tensors(tmp_path):
    wide, high = size_of(report_of(4, long_names=True).heatmap(tmp_path / "long.png"))
    assert max(wide, high) < 4000
    flat = report_of(2, flat=True)
    wide, high = size_of(flat.heatmap(tmp_path / "flat.png"))
    assert max(wide, high) < 4000
    grid = _by_kind(flat, flat.pairs[0])
    assert len(grid.rows) == 200
    assert list(grid.columns) == [""]


def test_masks_without_changes(tmp_path):
    """Nothing but "set" diffs: no signs and no angle, and a picture all the same."""
    weights = SparseDiff.from_dense(torch.tensor([1.0, 2.0]), mode="set")
    report = overlap_report({n: Adapter({"w": weights}) for n in "abc"})
    assert report.matrix("cosine") == [[None] * 3] * 3
    size_of(report.heatmap(tmp_path / "two.png", pair=("a", "b")))
