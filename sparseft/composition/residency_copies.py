"""How tensors are copied to host memory and onto a device; the one place that knows of streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Copies", "CudaCopies", "Landed", "PlainCopies", "copies_for"]


class Landed(NamedTuple):
    """Tensors on a device.

    Args:
        parts: the copies; whoever made them may use them at once.
        ready: call before any later use: it makes the stream that is current then wait for the
            copy. None: nothing to wait for.
    """

    parts: list[Tensor]
    ready: Callable[[], None] | None


class Copies(Protocol):
    """What a kind of device needs: tests put a counting one in its place."""

    pins: bool

    def host_cost(self, nbytes: int) -> int:
        """Return the bytes of host memory that a copy of one tensor of ``nbytes`` takes."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a complete copy in host memory that shares nothing with ``tensor``."""

    def to_device(self, parts: Sequence[Tensor], device: torch.device, *, pinned: bool) -> Landed:
        """Copy tensors to ``device``; ``pinned``: they came from `to_host`."""


class PlainCopies:
    """Ordinary memory and blocking copies: what CPUs need, and devices we know nothing about."""

    pins = False

    def host_cost(self, nbytes: int) -> int:
        return nbytes

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.to("cpu", copy=True)

    def to_device(self, parts: Sequence[Tensor], device: torch.device, *, pinned: bool) -> Landed:
        return Landed([part.to(device) for part in parts], None)


class _Arrival:
    """Orders uses of copies after the copying, whichever stream they are on."""

    def __init__(self, parts: Sequence[Tensor], stream: torch.cuda.Stream) -> None:
        self._parts = parts
        self._stream = stream
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def __call__(self) -> None:
        now = torch.cuda.current_stream(self._stream.device)
        if now != self._stream:
            now.wait_event(self._event)
            for part in self._parts:
                # Else the memory, freed while this stream still reads it, could be handed out
                # again on the stream it was allocated on.
                part.record_stream(now)


class CudaCopies:
    """Pinned memory and asynchronous copies on the current stream (CUDA and ROCm).

    Pinned tensors may be dropped while a copy from them is under way: torch's allocator of pinned
    memory hands their blocks out again only after the copy. It rounds every block up to a power of
    two, which is counted, and keeps freed blocks for the next pinned tensor, which is not.
    """

    pins = True

    def host_cost(self, nbytes: int) -> int:
        return 1 << (nbytes - 1).bit_length() if nbytes else 0

    def to_host(self, tensor: Tensor) -> Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor)  # blocking: complete when it returns

    def to_device(self, parts: Sequence[Tensor], device: torch.device, *, pinned: bool) -> Landed:
        # From memory that is not pinned a copy blocks anyway, and mapped pages must have been read
        # before the file's state is forgotten.
        stream = torch.cuda.current_stream(device)
        moved = [part.to(device, non_blocking=pinned) for part in parts]
        return Landed(moved, _Arrival(moved, stream))


def copies_for(device: torch.device) -> Copies:
    """Return how to copy for what runs on ``device``; touches no device."""
    return CudaCopies() if device.type == "cuda" else PlainCopies()
