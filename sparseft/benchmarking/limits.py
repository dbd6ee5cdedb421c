"""Memory that is free, and cases that need more: they are skipped, and say by how much."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from sparseft._text import human_bytes

__all__ = ["TooLittleMemory", "memory_free", "out_of_memory", "require_memory", "too_little"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# torch's words when the host's allocator gives nothing; its number is in bytes.
_HOST = re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory.*?(\d{6,}) bytes")
_CUDA = re.compile(r"Tried to allocate (\d[\d.]* [KMGT]iB)")


class TooLittleMemory(Exception):
    """A case that cannot be built here; the message has both numbers."""


def memory_free(device: torch.device | str) -> int:
    """Return the bytes that can be allocated on a device now.

    On CUDA what the driver has left and what torch's allocator keeps unused; on a CPU what the
    system calls available, within the limit of the control group (a container's) if it has one.
    """
    where = torch.device(device)
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        kept = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return free + kept
    return int(min(_available(), _group_left()))


def too_little(needed: float, device: torch.device | str) -> str:
    """Return why ``needed`` bytes cannot be had, with both numbers; empty where they can."""
    free = memory_free(device)
    if needed <= free:
        return ""
    return f"needs {human_bytes(needed)} of memory; {torch.device(device)} has {human_bytes(free)}"


def require_memory(needed: float, device: torch.device | str) -> None:
    """Refuse to go on with less: called first in a case's ``build``.

    A host hands out memory that it does not have and kills who uses it, so asking first is the only
    way to be told.

    Raises:
        TooLittleMemory: the case becomes "skipped", with the numbers.
    """
    reason = too_little(needed, device)
    if reason:
        raise TooLittleMemory(reason)


def out_of_memory(error: BaseException, device: torch.device | str) -> str:
    """Return the reason of a skip if an error says that memory ran out; else empty."""
    if isinstance(error, TooLittleMemory):
        return str(error)
    text = str(error)
    host = _HOST.search(text)
    if not (host or isinstance(error, torch.OutOfMemoryError | MemoryError)):
        return ""
    found = _CUDA.search(text)
    wanted = human_bytes(int(host[1])) if host else found[1] if found else "an unknown amount"
    where = torch.device(device)
    return f"out of memory: asked for {wanted} more; {where} has {human_bytes(memory_free(where))}"


def _available() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    # Elsewhere only the total is to be had without further packages.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_left() -> float:
    """What the control group may still take; its page cache of files counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = (_CGROUP / "memory.stat").read_text()
    except (OSError, ValueError):
        return float("inf")
    if limit == "max":
        return float("inf")
    cache = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)
    return max(0, int(limit) - used + (int(cache[1]) if cache else 0))
