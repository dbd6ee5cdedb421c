"""Recognise the base an adapter was made on: a digest per tensor, and samples that survive casts.

Pure data and its comparison. Reading a model's tensors, through attached adapters down to the
bottom base, is `sparseft.modules.fingerprint`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sparseft._integrity import hash_tensor

__all__ = [
    "SAMPLES",
    "Fingerprint",
    "TensorFingerprint",
    "Verdict",
    "compare",
    "fingerprint_tensor",
    "same_samples",
    "sample_positions",
]

SAMPLES = 16

Verdict = Literal["equal", "cast", "quantised", "different"]


@dataclass(frozen=True)
class TensorFingerprint:
    """What is remembered of one base tensor.

    Args:
        shape: its shape.
        dtype: its dtype without the ``torch.`` prefix, e.g. ``"bfloat16"``; of a quantised tensor
            the scheme, e.g. ``"bnb.nf4"``.
        digest: 32 hex digits of BLAKE2b over its raw bytes: codes and scales, where quantised.
        samples: fp32 values at `sample_positions`, dequantised; empty for a tensor without entries.
        step: how far neighbouring values of a quantised tensor are apart, at most, where the
            samples are; 0 for others.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str
    samples: tuple[float, ...]
    step: float = 0.0

    def __str__(self) -> str:
        head = ", ".join(f"{s:.6g}" for s in self.samples[:3])
        return f"{self.dtype}{list(self.shape)} digest {self.digest[:12]} samples [{head}, ...]"


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprints of the base tensors that an adapter touches, by canonical parameter name."""

    tensors: Mapping[str, TensorFingerprint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", dict(sorted(self.tensors.items())))


def sample_positions(name: str, numel: int) -> Tensor:
    """Return `SAMPLES` flat positions, a function of the name and the size alone: (16,) int64.

    Position i is BLAKE2b(i, name) mod numel: no random generator of any library is involved.
    """
    if numel == 0:
        return torch.empty(0, dtype=torch.int64)
    hashes = (
        hashlib.blake2b(f"{i}:{name}".encode(), digest_size=8).digest() for i in range(SAMPLES)
    )
    return torch.tensor([int.from_bytes(h, "little") % numel for h in hashes], dtype=torch.int64)


def fingerprint_tensor(name: str, tensor: Tensor) -> TensorFingerprint:
    """Fingerprint one tensor: any shape, dtype and device; read in pieces, no copy if contiguous.

    Args:
        name: canonical parameter name; seeds the sample positions.
        tensor: the base tensor. A ``DTensor`` is gathered, on every process: a collective.
    """
    gather = getattr(tensor.detach(), "full_tensor", None)
    if gather is not None:
        tensor = gather()
    digest = hashlib.blake2b(digest_size=16)
    hash_tensor(digest, tensor)
    positions = sample_positions(name, tensor.numel()).to(tensor.device)
    samples = tensor.detach().reshape(-1)[positions].float().cpu().tolist()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorFingerprint(tuple(tensor.shape), dtype, digest.hexdigest(), tuple(samples))


def _rounding(dtype_name: str) -> tuple[float, float, float]:
    """Return (unit roundoff, half the smallest subnormal, largest finite) of a floating dtype."""
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return 0.0, 0.0, math.inf
    info = torch.finfo(dtype)
    return info.eps / 2, info.tiny * info.eps / 2, info.max


def _same_up_to_cast(x: float, y: float, a_dtype: str, b_dtype: str) -> bool:
    if x == y or (math.isnan(x) and math.isnan(y)):
        return True
    # Each side is at most one rounding away from a common value, so they differ by no more than the
    # sum of the two half-ulps; a value past the narrower range has become infinite.
    (ua, sa, ma), (ub, sb, mb) = _rounding(a_dtype), _rounding(b_dtype)
    if math.isinf(x) or math.isinf(y):
        finite = y if math.isinf(x) else x
        sign = math.copysign(1.0, x) == math.copysign(1.0, y)
        limit = ma if math.isinf(x) else mb
        return sign and not math.isinf(finite) and abs(finite) > limit * (1 - max(ua, ub))
    return abs(x - y) <= (ua + ub) * max(abs(x), abs(y)) + sa + sb


def same_samples(a: Sequence[float], a_dtype: str, b: Sequence[float], b_dtype: str) -> bool:
    """Say whether samples of two plain tensors, at the same places, may be of the same base.

    Equal values of one dtype, or values of two that a cast may have rounded.
    """
    if len(a) != len(b):
        return False
    if a_dtype == b_dtype:
        return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True))
    return all(_same_up_to_cast(x, y, a_dtype, b_dtype) for x, y in zip(a, b, strict=True))


def compare(a: TensorFingerprint, b: TensorFingerprint) -> Verdict:
    """Say whether two fingerprints, taken under one name, are of the same base tensor.

    "equal": same shape, dtype and bytes. "cast": same shape, different dtypes, and every sample
    equal up to the rounding of the coarser dtype. "quantised": at least one side is, and every
    sample equal within one quantisation step of each side that is; by the same scheme, within the
    rounding of scales to bf16. "different": anything else; within one plain dtype any changed byte
    counts, because no cast can have happened.

    "quantised" is weaker than the others: a base that was fine-tuned a little looks the same.
    """
    if a.shape != b.shape:
        return "different"
    if a.dtype == b.dtype and a.digest == b.digest:
        return "equal"
    if len(a.samples) != len(b.samples):
        return "different"
    pairs = list(zip(a.samples, b.samples, strict=True))
    if a.step or b.step:
        rounding = _rounding("bfloat16")[0] if a.dtype == b.dtype else 0.0
        step = 0.0 if a.dtype == b.dtype else a.step + b.step
        near = all(abs(x - y) <= step + 2 * rounding * max(abs(x), abs(y)) for x, y in pairs)
        return "quantised" if near else "different"
    if a.dtype == b.dtype:
        return "different"
    same = all(_same_up_to_cast(x, y, a.dtype, b.dtype) for x, y in pairs)
    return "cast" if same else "different"
