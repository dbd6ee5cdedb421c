"""Tile tables. No run-time autotuning: the same shapes always run the same code (P8)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ENTRYWISE", "OPTIMIZER", "TOPK", "Config", "Target", "TopkConfig"]


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
