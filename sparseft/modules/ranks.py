"""How many processes there are, and a refusal by what is made for one."""

from __future__ import annotations

import os
from typing import Any

import torch

from sparseft.errors import SparseFtError

__all__ = ["processes", "refuse_several", "started"]


def processes(group: Any = None) -> int:
    """Return the size of a process group (default: the world), 1 where there is none."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(group)


def started() -> int:
    """Return how many processes a launcher has started together: before there is a group, too.

    Read from the environment that torchrun and accelerate launch set for each process.
    """
    count = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return max(processes(), int(count) if count.isdigit() else 1)


def refuse_several(what: str, instead: str) -> None:
    """Raise SparseFtError where a launcher has started several processes.

    Args:
        what: runs in one process.
        instead: what to do, a sentence.
    """
    count = started()
    if count > 1:
        raise SparseFtError(
            f"{what} runs in one process, but {count} were started together (torchrun, accelerate "
            f"launch): each would train on its own, and write the same files. {instead}"
        )
