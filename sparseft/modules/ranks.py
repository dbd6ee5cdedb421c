"""How many processes there are, and a refusal by what is made for one."""

from __future__ import annotations

import os
from typing import Any

import torch

from sparseft.errors import SparseFtError

__all__ = ["processes", "refuse_several", "refuse_unconnected", "started"]


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


def refuse_unconnected(what: str) -> None:
    """Raise SparseFtError where a launcher has started several processes that have no group yet."""
    count = started()
    if count > 1 and processes() == 1:
        raise SparseFtError(
            f"{count} processes were started together (torchrun, accelerate launch), but they do "
            f"not know of each other yet, and {what} writes files: call "
            "torch.distributed.init_process_group() first (transformers.TrainingArguments, made "
            "before, do it, too)."
        )
