"""How many processes there are."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["processes"]


def processes(group: Any = None) -> int:
    """Return the size of a process group (default: the world), 1 where there is none."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(group)
