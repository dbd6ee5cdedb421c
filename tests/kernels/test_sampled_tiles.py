"""What the sampled gradient does before a kernel runs: a mask's tiles, and the choice of a way."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sparseft.diff import SparsePattern

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
from sparseft.ops import _tiles
from sparseft_kernels._configs import (
    GROUP,
    PLACE_SHIFT,
    TILE,
    Target,
    plan_sampled_grad,
    tile_configs,
)

H200 = Target("cuda", (9, 0), 132)
MI300 = Target("hip", (9, 4), 304)


def decoded(tiles: _tiles.Tiles, indices: torch.Tensor, width: int) -> list[tuple[int, int, int]]:
    """Return (flat place, row, column) of every entry, as the kernel reads them off."""
    codes = tiles.codes(indices).long() & ((1 << 32) - 1)
    out = []
    for row_tile, group, first, middle, end, base in tiles.work[width].table.tolist():
        assert first < end, "an empty program is launched"
        for e in range(first, end):
            local = int(codes[e]) & ((1 << PLACE_SHIFT) - 1)
            row, col = row_tile * TILE + local // TILE, (group * width) * TILE + local % TILE
            col += TILE if e >= middle else 0
            out.append((base + (int(codes[e]) >> PLACE_SHIFT), row, col))
    return out


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(("rows", "cols"), [(300, 400), (1500, 140), (40, 1000), (129, 129)])
def test_every_entry_is_read_and_written_once(rows, cols, width):
    pattern = SparsePattern.from_mask(torch.rand(rows, cols) < 0.05)
    tiles = _tiles.tiles_of(pattern.indices, rows, cols)
    found = decoded(tiles, pattern.indices, width)
    flat = pattern.indices.tolist()
    assert sorted(found) == [(e, i // cols, i % cols) for e, i in enumerate(flat)]


@pytest.mark.parametrize("axis", [0, 1])
def test_inactive_rows_and_columns_are_packed_away(axis):
    mask = torch.zeros(900, 900, dtype=torch.bool)
    mask.select(axis, 3)[:] = True
    mask.select(axis, 600)[::2] = True
    pattern = SparsePattern.from_mask(mask)
    tiles = _tiles.tiles_of(pattern.indices, 900, 900)
    packed, other = (tiles.rows, tiles.cols)[:: 1 - 2 * axis]
    assert packed.active.tolist() == [3, 600] + [600] * 6  # to whole 16-byte pieces
    assert other.active is None
    assert tiles.work[1].table.shape[0] == 8
    found = decoded(tiles, pattern.indices, 1)
    for place, *at in found:
        at[axis] = (3, 600)[at[axis]]
        assert pattern.indices[place] == at[0] * 900 + at[1]
    assert len(found) == pattern.nnz


def test_one_dense_block_is_not_packed():
    """Leaving out empty tiles does as much, and needs no copy."""
    mask = torch.zeros(512, 512, dtype=torch.bool)
    mask[128:256, 256:384] = True
    tiles = _tiles.tiles_of(SparsePattern.from_mask(mask).indices, 512, 512)
    assert tiles.rows.active is None
    assert tiles.work[1].table[:, :2].tolist() == [[1, 2]]


def test_programs_go_by_groups_of_rows_of_tiles():
    mask = torch.ones(TILE * (GROUP + 2), 2 * TILE, dtype=torch.bool)
    indices = SparsePattern.from_mask(mask).indices
    work = _tiles.tiles_of(indices, *mask.shape).work[1]
    head = [[row, col] for col in range(2) for row in range(GROUP)]
    tail = [[row, col] for col in range(2) for row in range(GROUP, GROUP + 2)]
    assert work.table[:, :2].tolist() == head + tail
    assert work.groups == [0, 2 * GROUP, 2 * GROUP + 4]
    assert work.widest == TILE * TILE


def test_codes_widen_where_a_band_has_too_many_entries():
    few = SparsePattern.from_mask(torch.ones(128, 2048, dtype=torch.bool)).indices
    many = SparsePattern.from_mask(torch.ones(128, 2049, dtype=torch.bool)).indices
    assert _tiles.tiles_of(few, 128, 2048).codes(few).dtype == torch.int32
    assert _tiles.tiles_of(many, 128, 2049).codes(many).dtype == torch.int64
    last = _tiles.tiles_of(few, 128, 2048).codes(few).long() & ((1 << 32) - 1)
    assert int(last.max()) == (1 << 32) - 1  # the 32 bits are used up


def test_tiles_are_kept_per_index_tensor_and_die_with_it():
    indices = SparsePattern.from_mask(torch.rand(40, 30) < 0.2).indices
    tiles = _tiles.tiles_of(indices, 40, 30)
    tiles.codes(indices)
    assert _tiles.tiles_of(indices, 40, 30) is tiles
    indices[-1] += 0  # a write makes them stale
    assert _tiles.tiles_of(indices, 40, 30) is not tiles
    alive = weakref.ref(tiles)
    del tiles, indices
    gc.collect()
    assert alive() is None


def plan(density: float, rows: int, cols: int, tokens: int, precision="half", target=H200):
    down, across = -(-rows // TILE), -(-cols // TILE)
    programs = {1: down * across, 2: down * -(-across // 2)}
    size = 2 if precision == "half" else 4
    nnz = max(1, int(density * rows * cols))
    return plan_sampled_grad(tokens, (rows, cols), nnz, programs, size, precision, target)


@pytest.mark.parametrize(("rows", "cols"), [(4096, 4096), (11008, 4096)])
def test_dots_win_only_at_very_low_density(rows, cols):
    assert plan(0.0005, rows, cols, 4096).config is None
    for density in (0.01, 0.05, 1.0):
        assert plan(density, rows, cols, 4096).config is not None


def test_small_layers_split_the_tokens_and_large_ones_do_not():
    assert plan(0.05, 768, 768, 16384).split > 1
    assert plan(0.05, 768, 768, 1024).split == 1
    assert plan(0.05, 11008, 4096, 16384).split == 1
    # the parts' vectors stay below 16 MiB
    whole = plan(1.0, 1024, 1024, 16384)
    assert whole.split * 1024 * 1024 * 4 <= 16 << 20


def test_clustered_masks_pay_for_their_tiles_alone():
    """The same entries in a tenth of the tiles: tiles win where dots did."""
    nnz = int(0.003 * 4096 * 4096)
    all_tiles, some = {1: 1024, 2: 512}, {1: 102, 2: 51}
    spread = plan_sampled_grad(4096, (4096, 4096), nnz, all_tiles, 2, "half", H200)
    packed = plan_sampled_grad(4096, (4096, 4096), nnz, some, 2, "half", H200)
    assert spread.config is None
    assert packed.config is not None


def test_amd_gets_tiles_that_fit_64_kib():
    for precision in ("half", "loose", "tf32", "ieee"):
        for config in tile_configs(MI300, precision):
            assert 4 * config.block_m * config.block_n <= 65_536


@pytest.mark.parametrize(
    ("setting", "precision"), [("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32")]
)
def test_fp32_products_follow_torch_s_own_setting(setting, precision, monkeypatch):
    from sparseft.ops._sampled_gpu import _precision

    x = torch.zeros(1, 1)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        assert _precision(x, x) == precision
        assert _precision(x.half(), x.half()) == "half"
        assert _precision(x.half(), x.bfloat16()) == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
