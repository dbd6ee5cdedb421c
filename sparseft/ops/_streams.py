"""Tensors that are made once and read by whoever comes later, maybe on a stream of its own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Readers", "settle", "stream_of"]


def stream_of(device: torch.device) -> int | None:
    """Return the handle of a device's current stream; None where there are no streams."""
    if device.type != "cuda":
        return None
    return torch._C._cuda_getCurrentRawStream(device.index)


def settle(device: torch.device) -> None:
    """Wait for the current stream: what was made on it is then there for every other."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _record(tensor: Tensor) -> None:
    tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Readers:
    """The streams that read some tensors, which the allocator is told of once each.

    Else memory that is freed while such a stream still reads it could be handed out again on the
    stream that it was allocated on.
    """

    def __init__(self) -> None:
        self._told: set[int] = set()

    def note(self, device: torch.device, *tensors: Tensor | None) -> None:
        """Tell of the stream that is current; call where the tensors are about to be read."""
        stream = stream_of(device)
        if stream is None or stream in self._told:
            return
        for tensor in tensors:
            if tensor is not None:
                _record(tensor)
        self._told.add(stream)
