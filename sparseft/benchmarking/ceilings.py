"""What the machine can do at most, measured in the same run: a copy, and a product per dtype.

Vendors' figures are for other clocks, threads and cooling. A share of a ceiling says how far a
kernel is from this machine, now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseft.benchmarking.catalogue import DTYPES
from sparseft.benchmarking.limits import memory_free
from sparseft.benchmarking.rotation import Clock, rotate

__all__ = ["Ceilings", "measure_ceilings"]

# Several times the largest last cache of a GPU (126 MB), and larger than most hosts'.
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
_QUICK_COPY_BYTES = 32 << 20
# The side of a square product: the largest that takes about _GEMM_SECONDS.
_GEMM_SIDES = {"cuda": (8192, 4096, 2048), "cpu": (2048, 1024, 512)}
_QUICK_SIDES = (256,)
_GEMM_SECONDS = 0.15
_PROBE = 256


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Bytes and operations a second, of the fastest of several rounds.

    Attributes:
        copy: bytes read plus bytes written a second, by ``Tensor.copy_`` of a buffer that no cache
            holds. What reads more than it writes can be faster than that.
        gemm: operations a second of a square ``A @ B`` (2 n^3), by dtype.
        sizes: the bytes of the copied buffer, the sides of the products.
    """

    copy: float
    gemm: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def shares(self, moved: float | None, flops: float | None, dtype: str, seconds: float) -> dict:
        """Return GB/s, TFLOP/s and their shares in percent, as far as they are known.

        Args:
            moved: bytes.
            flops: operations.
            dtype: whose product is the ceiling.
            seconds: that both took.
        """
        out: dict[str, float] = {}
        if moved is not None:
            out["GB/s"] = moved / seconds * 1e-9
            out["% of copy"] = 100 * moved / seconds / self.copy
        if flops is not None:
            out["TFLOP/s"] = flops / seconds * 1e-12
            if dtype in self.gemm:
                out["% of GEMM"] = 100 * flops / seconds / self.gemm[dtype]
        return out

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        products = ", ".join(f"{name} {speed * 1e-12:.3g}" for name, speed in self.gemm.items())
        return f"copy {self.copy * 1e-9:.3g} GB/s; GEMM {products} TFLOP/s"


def measure_ceilings(
    device: torch.device | str,
    dtypes: Sequence[str] = ("fp32",),
    *,
    quick: bool = False,
    clock: Clock | None = None,
) -> Ceilings:
    """Measure, with the threads and the precision settings that torch has now.

    Args:
        device: where.
        dtypes: of `DTYPES`; the products' types.
        quick: buffers that fit into caches: a second at most, for a smoke test.
        clock: of the times that are set beside it: on a busy machine the wall clock's ceilings are
            below what the processor's clock says of everything. None: the device's.
    """
    where = torch.device(device)
    size = _QUICK_COPY_BYTES if quick else _COPY_BYTES.get(where.type, _COPY_BYTES["cpu"])
    while size > 1 << 20 and 4 * size > memory_free(where):
        size //= 2
    fastest = _copy_seconds(size, where, clock)
    speeds, sizes = {}, {"copy": size}
    for name in dtypes:
        speeds[name], sizes[name] = _gemm(getattr(torch, DTYPES[name]), where, quick, clock)
    return Ceilings(copy=2 * size / fastest, gemm=speeds, sizes=sizes)


def _copy_seconds(size: int, device: torch.device, clock: Clock | None) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return _fastest(lambda: target.copy_(source), device, clock)


def _gemm(
    dtype: torch.dtype, device: torch.device, quick: bool, clock: Clock | None
) -> tuple[float, int]:
    """Return (operations a second, the side); some hosts take minutes for what a GPU does in ms."""
    left, right = _square(_PROBE, dtype, device)
    probe = _fastest(lambda: left @ right, device, clock)
    sides = _QUICK_SIDES if quick else _GEMM_SIDES.get(device.type, _GEMM_SIDES["cpu"])
    expected = {side: probe * (side / _PROBE) ** 3 for side in sides}
    # A product of 256 is bound by its launch on a GPU: the guess is far too long there.
    chosen = next((n for n in sides if expected[n] < _GEMM_SECONDS), sides[-1])
    if device.type == "cuda":
        chosen = sides[0]
    left, right = _square(chosen, dtype, device)
    return 2 * chosen**3 / _fastest(lambda: left @ right, device, clock), chosen


def _square(side: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    # Random values: a GPU multiplies zeros faster, as they cost less power.
    left, right = (torch.randn(side, side, device=device, generator=generator) for _ in range(2))
    return left.to(dtype), right.to(dtype)


def _fastest(run: Any, device: torch.device, clock: Clock | None) -> float:
    timing = rotate(
        {"it": run},
        device=device,
        clock=clock or "device",
        rounds=15,
        least=3,
        seconds=1.0,
        warmup=2,
    )
    return min(timing.seconds["it"])
