"""Tile tables. No run-time autotuning: the same shapes always run the same code (P8)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "COMPOSE",
    "DIFFERENCE",
    "DOTS",
    "EMBEDDING_DIFF",
    "EMBEDDING_ROWS",
    "ENTRYWISE",
    "GATHER_REDUCE",
    "GROUP",
    "MULTI_TENSOR",
    "OPTIMIZER",
    "PLACE_SHIFT",
    "RESIDUAL",
    "SKETCH",
    "SPMM_FEW",
    "SPMM_MANY",
    "SPMM_ONE",
    "TILE",
    "TOPK",
    "TRANSPOSE",
    "Config",
    "DotsConfig",
    "ResidualConfig",
    "RowsConfig",
    "SampledPlan",
    "SpmmConfig",
    "Target",
    "TileConfig",
    "TopkConfig",
    "cholesky_warps",
    "plan_sampled_grad",
    "residual_precision",
    "tile_configs",
]


class Target(NamedTuple):
    """A device, as far as the tables tell devices apart."""

    kind: str  # "cuda" or "hip"
    capability: tuple[int, int]
    processors: int


class Config(NamedTuple):
    """Entries per program and warps per program."""

    block: int
    num_warps: int


# Gathers and scatters are bound by one 32-byte sector of the weight per entry, so the tile matters
# little: 8 entries a thread give enough loads in flight, and four warps compile to 36 registers or
# fewer on sm_80 to sm_100, so occupancy is full. (Ahead-of-time figures; nothing here was tuned on
# a GPU yet.)
ENTRYWISE = Config(block=1024, num_warps=4)

# Compositions: all three kernels share one table of blocks, so one block size. Four entries a
# thread: with eight the sum takes 96 registers and an election 128, on sm_90, which halves the
# warps that wait for memory. (Ahead-of-time figures.)
COMPOSE = Config(block=512, num_warps=4)
MULTI_TENSOR = Config(block=COMPOSE.block, num_warps=4)
# Gradients of coefficients: one pass over the entries, and a sum per adapter and block.
GATHER_REDUCE = Config(block=512, num_warps=4)

# A block serves one tensor, and a tensor of a few thousand entries should not waste half of one.
# Eight entries a thread are two 16-byte loads per fp32 vector, seven vectors in flight.
OPTIMIZER = Config(block=1024, num_warps=4)


class TopkConfig(NamedTuple):
    """Tile and bounds of the exact top-k."""

    block: int
    num_warps: int
    spans: int  # at most so many runs of blocks a program each, plus one per tensor
    sample: int  # keys looked at to guess the k-th
    spare: int  # listed keys allowed beyond 2 k


# 8 entries a thread: one 16-byte load of bf16 per operand. 32 Ki programs are 30 waves on 132 SMs,
# so uneven ones even out, and their tables stay near 3 MiB. With 512 Ki samples the guess of 1 % is
# off by 1.4 % (one standard deviation), of 0.01 % by 14 %. (Reckoned, not tuned: no GPU yet.)
TOPK = TopkConfig(block=2048, num_warps=8, spans=1 << 15, sample=1 << 19, spare=1 << 18)


# ---- products with a sparse diff


class SpmmConfig(NamedTuple):
    """Tokens, outputs and entries of each output that a program takes at a time."""

    block_t: int
    block_m: int
    block_k: int
    num_warps: int


# 16 neighbouring outputs are one 32-byte sector of a bf16 row, so stores fill whole sectors. One or
# a few tokens: 32 entries of each output are in flight, indices are shared by the tokens. Many: 32
# tokens of a column are 64 bytes of the transposed copy, and with 8 warps the whole loop fits 128
# registers. (Reckoned and compiled, not measured: no GPU yet.)
SPMM_ONE = SpmmConfig(block_t=1, block_m=16, block_k=32, num_warps=4)
SPMM_FEW = SpmmConfig(block_t=4, block_m=16, block_k=16, num_warps=4)
SPMM_MANY = SpmmConfig(block_t=32, block_m=16, block_k=4, num_warps=8)
# A row of an embedding's diff has tens to hundreds of entries.
EMBEDDING_DIFF = Config(block=128, num_warps=1)


# ---- truncated SVD


class ResidualConfig(NamedTuple):
    """A tile of a matrix, columns of its factors per step, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Square tiles: where the output is transposed, lines of 128 bytes or more are read and written.
DIFFERENCE = Config(block=64, num_warps=8)
SKETCH = Config(block=64, num_warps=4)
# One for all passes: the same tile sums a product in the same order, so that all see the same keys.
# A running sum over a tile spills with 32 entries a thread, not with 16. (Compile-time finding.)
RESIDUAL = ResidualConfig(block_m=64, block_n=64, block_k=32, num_warps=8, num_stages=2)


def residual_precision(target: Target) -> str:
    """Return how fp32 factors are multiplied: as three TF32 products, near fp32, where there are
    such; AMD's matrix cores take fp32 as it is.
    """
    return "ieee" if target.kind == "hip" else "tf32x3"


def cholesky_warps(padded: int) -> int:
    """Return the warps of a program that holds two square matrices of ``padded`` in registers."""
    return 8 if padded > 64 else 4


# ---- sampled weight gradient


class TileConfig(NamedTuple):
    """A tile of dW: its sides, tokens per step, warps, pipeline stages.

    ``resident`` programs share a processor; ``rate`` is the multiply-adds per ns of the whole
    processor that the cost rule reckons with; at most ``cap`` entries are picked at a time.
    """

    block_m: int
    block_n: int
    block_t: int
    num_warps: int
    num_stages: int
    resident: int
    rate: float
    cap: int = 1024


class DotsConfig(NamedTuple):
    """Entries per program and tokens per step; bytes of the two transposed slabs together."""

    entries: int
    block_t: int
    num_warps: int
    slab_bytes: int


class RowsConfig(NamedTuple):
    """Positions of a token and masked entries of its row looked at together."""

    positions: int
    entries: int
    num_warps: int


class SampledPlan(NamedTuple):
    """Tiles by ``config`` with the tokens in ``split`` parts; dots where ``config`` is None."""

    config: TileConfig | None
    split: int


# Masks are ordered by 128x128 tiles of the weight; a program takes one, or two side by side.
TILE = 128
# Programs are ordered in groups of 8 rows of tiles, so that those in flight share operands in L2.
GROUP = 8
# An entry's code is place << 14 | r * 128 + c. In 32 bits that leaves 2**18 entries to 128 rows.
PLACE_SHIFT = 14

# The gather's buffer is the fp32 tile, 64 or 128 KiB, over the pipeline's dead stages. AMD has 64
# KiB in all: 128x128. sm_90 and sm_100 hold 128x256 in 196 registers or fewer without spills; sm_80
# spills there. Two programs of 128x128 a processor overlap one's gather with the other's products.
# 'ieee' fp32 has no tensor-core form on NVIDIA. (Compile-time figures. The rates are rooflines of
# an H200, 600 TF bf16, 45 TF fp32 on 132 processors, and serve only for ratios: nothing here was
# measured on a GPU.)
_HALF, _TF32, _IEEE = 2270.0, 600.0, 170.0
_TILE_TABLE: dict[tuple[str, str], tuple[TileConfig, ...]] = {
    ("hopper", "half"): (
        TileConfig(128, 256, 64, 8, 3, 1, _HALF, cap=2048),
        TileConfig(128, 128, 64, 8, 3, 2, 0.9 * _HALF),
    ),
    # operands that come in no 16-byte pieces: through registers, so fewer of them in flight
    ("hopper", "loose"): (TileConfig(128, 128, 32, 8, 2, 1, 0.4 * _HALF),),
    ("hopper", "tf32"): (TileConfig(128, 128, 32, 8, 3, 1, _TF32),),
    ("hopper", "ieee"): (TileConfig(128, 128, 16, 8, 2, 2, _IEEE),),
    ("ampere", "half"): (TileConfig(128, 128, 32, 8, 4, 1, _HALF),),
    ("ampere", "loose"): (TileConfig(128, 128, 32, 8, 4, 1, 0.4 * _HALF),),
    ("ampere", "tf32"): (TileConfig(128, 128, 32, 8, 2, 1, _TF32),),
    ("ampere", "ieee"): (TileConfig(128, 128, 16, 8, 2, 1, _IEEE),),
    ("hip", "half"): (TileConfig(128, 128, 32, 8, 2, 1, _HALF),),
    ("hip", "loose"): (TileConfig(128, 128, 32, 8, 2, 1, 0.4 * _HALF),),
    ("hip", "ieee"): (TileConfig(128, 128, 16, 8, 2, 1, _TF32),),
}

# 16 entries x 256 tokens of fp32 sums are 32 registers a thread. Both slabs together leave L2 (50
# MiB on an H200) room for the entries.
DOTS = DotsConfig(entries=16, block_t=256, num_warps=4, slab_bytes=30 << 20)
# 64x64 through shared memory: both sides move whole 128-byte lines.
TRANSPOSE = Config(block=64, num_warps=4)
# 16 rows in flight a thread. A token of 4096 positions is then 256 steps of one program.
EMBEDDING_ROWS = RowsConfig(positions=16, entries=128, num_warps=4)

# Bytes per ns the rule reckons with: L2 reads of the dots, copies through DRAM, vectors of parts.
_L2, _COPY, _DRAM = 5500.0, 3500.0, 4300.0
# Filling a program's pipeline and emptying its tile: 0.6 us of shared memory and a few latencies.
_PROGRAM_NS = 1500.0
# A part should outlast its epilogue, and the vectors of all parts together should stay small.
_LEAST_SLAB = 1024
_MOST_PARTS = 16
_PARTS_BYTES = 16 << 20


def tile_configs(target: Target, precision: str) -> tuple[TileConfig, ...]:
    """Return the rows of the table for a device; ``precision`` is that of a plan."""
    if target.kind == "hip":
        # no tf32 there; its matrix cores take fp32 as it is
        return _TILE_TABLE["hip", "ieee" if precision == "tf32" else precision]
    # sm_9x and sm_10x have 228 KiB of shared memory; sm_12x has the 100 KiB of sm_86.
    arch = "hopper" if target.capability[0] in (9, 10) else "ampere"
    return _TILE_TABLE[arch, precision]


def plan_sampled_grad(
    tokens: int,
    shape: tuple[int, int],
    nnz: int,
    programs: dict[int, int],
    itemsize: int,
    precision: str,
    target: Target,
) -> SampledPlan:
    """Choose tiles or dots, the tile and the split, by the cheapest reckoned time.

    Args:
        tokens: T.
        shape: of the weight, rows and columns.
        nnz: entries of the mask.
        programs: non-empty program tiles, by their width in tiles (1 or 2).
        itemsize: bytes per element of the operands.
        precision: "half", "tf32" or "ieee".
        target: the device.

    On 4096x4096 bf16 dots win below 0.38 % by these rates, on 768x768 below 0.05 %.
    """
    best, chosen = float("inf"), SampledPlan(None, 1)
    for config in tile_configs(target, precision):
        work = programs[config.block_n // TILE]
        slots = target.processors * config.resident
        rate = config.rate / config.resident
        most = min(tokens // _LEAST_SLAB, _MOST_PARTS, _PARTS_BYTES // (4 * nnz))
        for split in range(1, max(most, 1) + 1):
            waves = -(-work * split // slots)
            steps = -(-tokens // (split * config.block_t))
            tile = steps * config.block_m * config.block_n * config.block_t / rate
            time = waves * (tile + _PROGRAM_NS)
            if split > 1:
                time += 8 * split * nnz / _DRAM
            if time < best:
                best, chosen = time, SampledPlan(config, split)
    rows = -(-tokens // DOTS.block_t) * DOTS.block_t
    dots = 2 * itemsize * rows * (nnz / _L2 + sum(shape) / _COPY)
    return SampledPlan(None, 1) if dots < best else chosen
