"""Tile tables. No run-time autotuning: the same shapes always run the same code (P8)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ENTRYWISE", "Config"]


class Config(NamedTuple):
    """Entries per program and warps per program."""

    block: int
    num_warps: int


# Gathers and scatters are bound by one 32-byte sector of the weight per entry, so the tile matters
# little: 8 entries a thread give enough loads in flight, and four warps compile to 36 registers or
# fewer on sm_80 to sm_100, so occupancy is full. (Ahead-of-time figures; nothing here was tuned on
# a GPU yet.)
ENTRYWISE = Config(block=1024, num_warps=4)
