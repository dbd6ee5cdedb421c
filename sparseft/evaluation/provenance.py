"""What made a result: versions, commit, threads.

No time and no path, so the same run has the same bytes.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from sparseft._version import __version__

__all__ = ["git_state", "provenance"]

_PACKAGES = ("transformers", "accelerate", "datasets", "safetensors", "numpy", "triton")


def git_state(folder: str | Path | None = None) -> dict[str, Any] | None:
    """Return ``{"sha", "dirty"}`` of the checkout that holds a folder, None outside of one.

    Args:
        folder: any folder; None takes the one sparseft is imported from, if that is a checkout of
            sparseft and not, say, a virtual environment inside some other repository.
    """
    if folder is None:
        folder = Path(__file__).resolve().parents[2]
        if not (folder / ".git").exists():
            return None

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        return {
            "sha": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def provenance(**extra: Any) -> dict[str, Any]:
    """Return versions, commit and machine facts that results depend on, with ``extra`` added."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "sparseft": __version__,
        "git": git_state(),
        "versions": versions,
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
        },
        **extra,
    }
