"""What scores are ranked by, and how they are read: the bits of a float, in flat pieces.

Without their sign the bits of floats are integers in the order of magnitudes, NaN above infinity.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import numpy as np
import torch
from torch import Tensor

from sparseft.errors import MaskError

__all__ = [
    "CHUNK",
    "above",
    "check_count",
    "check_pair",
    "check_room",
    "check_tensor",
    "difference",
    "flat_chunks",
    "flat_part",
    "infinity",
    "keys_of",
    "kth_largest",
    "nan_difference",
    "nan_score",
    "negative_score",
]

# Scores looked at together: 1 Mi entries, so temporaries stay near 12 MiB.
CHUNK = 1 << 20


def keys_of(scores: Tensor) -> Tensor:
    """Return the magnitude bits of a floating tensor: int32, or int64 for float64."""
    if scores.dtype == torch.float64:
        return scores.contiguous().view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF
    return scores.to(torch.float32).contiguous().view(torch.int32) & 0x7FFF_FFFF


def infinity(keys: Tensor) -> int:
    return 0x7FF0_0000_0000_0000 if keys.dtype == torch.int64 else 0x7F80_0000


def kth_largest(keys: Tensor, k: int) -> int:
    """Return the k-th largest of a 1-D integer tensor, 1 <= k <= len."""
    if keys.device.type == "cpu":
        # numpy's selection is vectorised: 1.0 ms for 1 Mi int32 against 29 ms for torch.topk, 17 ms
        # for kthvalue.
        place = keys.numel() - k
        return int(np.partition(keys.numpy(), place)[place])
    return int(torch.topk(keys, k, sorted=False).values.min())


def above(keys: Tensor, threshold: int) -> Tensor:
    """Return int64 positions of keys above the threshold, ascending."""
    if keys.device.type == "cpu":
        # 1.7 ms for 1 Mi against 3.8 ms for torch's comparison and nonzero
        return torch.from_numpy(np.flatnonzero(keys.numpy() > threshold))
    return (keys > threshold).nonzero().view(-1)


def check_count(nnz: int, what: str) -> None:
    if isinstance(nnz, bool) or not isinstance(nnz, int) or nnz < 0:
        raise MaskError(f"{what} is {nnz!r}; it should be an integer >= 0")


def check_tensor(name: str, tensor: Tensor, known: Container[str]) -> None:
    if name in known:
        raise MaskError(f"scores for {name!r} were added twice")
    if not tensor.is_floating_point():
        raise MaskError(f"scores for {name!r} have dtype {tensor.dtype}; they should be floating")


def check_pair(name: str, theta1: Tensor, theta0: Tensor) -> None:
    if theta1.shape != theta0.shape:
        raise MaskError(
            f"theta1 of {name!r} has shape {tuple(theta1.shape)} but theta0 has "
            f"{tuple(theta0.shape)}; they should be one tensor before and after training"
        )
    if not theta0.is_floating_point():
        raise MaskError(f"theta0 of {name!r} has dtype {theta0.dtype}; it should be floating")


def check_room(nnz: int, seen: int) -> None:
    if seen < nnz:
        raise MaskError(f"nnz={nnz} entries were asked for but only {seen} scores were added")


def negative_score(name: str, at: int) -> str:
    return f"scores for {name!r} hold negative values; pass abs=True to rank magnitudes"


def nan_score(name: str, at: int) -> str:
    return (
        f"scores for {name!r} hold NaN (first seen at flat index {at}); a selection cannot rank it"
    )


def nan_difference(name: str, at: int) -> str:
    return (
        f"differences of {name!r} are NaN (first at flat index {at}); a selection cannot rank "
        "them. Did training diverge?"
    )


def difference(theta1: Tensor, theta0: Tensor) -> Tensor:
    """Return theta1 - theta0 on theta1's device, in fp32, or fp64 if either side is fp64."""
    wide = torch.promote_types(torch.promote_types(theta1.dtype, theta0.dtype), torch.float32)
    return theta1.to(wide) - theta0.to(device=theta1.device, dtype=wide)


def flat_part(tensor: Tensor, part: slice) -> Tensor:
    """Return entries ``part`` of a tensor in row-major order; only strided tensors are copied."""
    if tensor.is_contiguous() or tensor.ndim < 2:
        return tensor.reshape(-1)[part]
    # Whole rows around the part, so that no copy of the tensor is made.
    width = tensor.numel() // tensor.shape[0]
    first, last = part.start // width, -(-part.stop // width)
    rows = tensor[first:last].reshape(-1)
    return rows[part.start - first * width : part.stop - first * width]


def flat_chunks(scores: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first flat index, 1-D piece); a non-contiguous tensor is copied a piece at a time."""
    if scores.is_contiguous() or scores.ndim < 2:
        flat = scores.reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            yield start, flat[start : start + CHUNK]
        return
    width = max(1, scores.numel() // max(1, scores.shape[0]))
    rows = max(1, CHUNK // width)
    for row in range(0, scores.shape[0], rows):
        yield row * width, scores[row : row + rows].reshape(-1)
