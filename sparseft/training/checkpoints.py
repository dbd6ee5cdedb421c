"""`LoopTrainer`'s checkpoints: one file each, written whole or not at all, newest kept."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import ResumeError
from sparseft.io.atomic import atomic_write
from sparseft.modules.riders import riding
from sparseft.modules.rounded import rounded_keys, rounded_tensors

__all__ = ["CheckpointFolder", "load_trainable", "trainable"]

_FORMAT = 1


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters with ``requires_grad``, by name, and where masks that move are.

    After stochastic rounding, the rounded entries, too. Not copied.
    """
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return own | riding(model) | rounded_tensors(model)


def load_trainable(model: nn.Module, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Set the parameters that `trainable` returns.

    Raises:
        ResumeError: the names are others than the model's.
    """
    odd = sorted((set(trainable(model)) ^ set(tensors)) - rounded_keys(model))
    if odd:
        raise ResumeError(
            f"{where} holds other trainable parameters than the model; {len(odd)} differ, first "
            f"{odd[0]!r}. Use another output_dir, or delete this file."
        )
    # Through load_state_dict, because an attached model writes its weights in that call's hook.
    model.load_state_dict(dict(tensors), strict=False)


class CheckpointFolder:
    """The files ``checkpoint-<step>.pt`` and ``best.pt`` of one loop.

    Args:
        path: the folder; made when first written to.
        keep: newest checkpoints kept.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep
        self.best = path / "best.pt"

    def all(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        found = []
        for path in self.path.glob("checkpoint-*.pt"):
            number = path.stem.removeprefix("checkpoint-")
            if number.isdigit():
                found.append((int(number), path))
        return [path for _, path in sorted(found)]

    def latest(self) -> Path | None:
        """Return the newest checkpoint."""
        found = self.all()
        return found[-1] if found else None

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Write a checkpoint, then delete the oldest beyond ``keep``."""
        self.write(self.path / f"checkpoint-{step:08d}.pt", {"format": _FORMAT, **content})
        for old in self.all()[: -self.keep]:
            old.unlink(missing_ok=True)

    def write(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write one file."""
        with atomic_write(path) as file:
            torch.save(dict(content), file)

    def read(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint: tensors and plain containers only, nothing is executed.

        Raises:
            ResumeError: another format.
        """
        content = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ResumeError(f"{path} is no checkpoint of format {_FORMAT}; delete it.")
        return content

    def clear(self) -> None:
        """Delete all files, and the folder if nothing else is in it."""
        for path in (*self.all(), self.best):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
