"""``random``: a uniformly random subset, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from sparseft.selection.registry import Candidates, Piece, pieces_of, register_selector

__all__ = ["select_random"]

# Numbers made at a time: 256 KiB stay in L2 (15 ns a number on a busy core, 57 in one go).
_BLOCK = 1 << 15

_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
_MIX1 = np.uint64(0xBF58_476D_1CE4_E5B9)
_MIX2 = np.uint64(0x94D0_49BB_1331_11EB)


@register_selector("random", reference="https://arxiv.org/abs/2110.07560")
def select_random(candidates: Candidates, *, seed: int = 0) -> Iterator[Piece]:
    """Keep a uniformly random subset; nested as nnz grows.

    Every entry gets a number from (seed, parameter name, flat index), and the largest are kept. The
    number depends on nothing else: not on the model's other parameters, on memory layout, device or
    any generator's state.

    Args:
        candidates: parameters.
        seed: any integer.

    Numerics: SplitMix64 (https://doi.org/10.1145/2660193.2660195) of a BLAKE2b key; integer
    arithmetic only. Its upper 30 bits are read as the bits of a positive float, whose order is
    theirs. Two entries share a number with probability 2**-30; only pairs at the threshold matter.
    """
    for name, parameter in candidates.parameters.items():
        digest = hashlib.blake2b(f"{int(seed)}:{name}".encode(), digest_size=8).digest()
        key = np.uint64(int.from_bytes(digest, "little"))
        for part in pieces_of(parameter.numel()):
            bits = np.empty(part.stop - part.start, dtype=np.int32)
            for start in range(part.start, part.stop, _BLOCK):
                stop = min(start + _BLOCK, part.stop)
                numbers = _splitmix64(key, start, stop)
                bits[start - part.start : stop - part.start] = numbers >> np.uint64(34)
            scores = torch.from_numpy(bits.view(np.float32))
            yield Piece(name, part.start, scores.to(parameter.device))


def _splitmix64(key: np.uint64, start: int, stop: int) -> np.ndarray:
    """Return outputs ``start`` to ``stop`` of SplitMix64 with state ``key``: uint64."""
    state = np.arange(start + 1, stop + 1, dtype=np.uint64)
    state *= _GOLDEN
    state += key
    mixed = state >> np.uint64(30)
    state ^= mixed
    state *= _MIX1
    np.right_shift(state, np.uint64(27), out=mixed)
    state ^= mixed
    state *= _MIX2
    np.right_shift(state, np.uint64(31), out=mixed)
    state ^= mixed
    return state
