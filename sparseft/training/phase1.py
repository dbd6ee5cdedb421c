"""Phase 1 of lottery tickets: full fine-tuning, run once, shared by every mask chosen from it.

On disk::

    state.json                   settings, finished phases
    theta0.safetensors           everything trainable before the phase
    iteration-0/dense/           the trainer's checkpoints
    iteration-0/dense.safetensors   the result
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseft.errors import ResumeError
from sparseft.training.state import differences, flatten

__all__ = ["DENSE", "THETA0", "Phase1"]

THETA0 = "theta0.safetensors"
DENSE = "iteration-0/dense"

# What a dense phase depends on, of the settings of a run; and metadata.data, where both have it.
_SHARED = ("candidates", "full_params", "source_adapters", "seed", "base")


@dataclass(frozen=True)
class Phase1:
    """A finished dense phase in the folder of another run.

    Args:
        folder: of `lottery_ticket` or `dense_phase`.
        history: log of the phase.
    """

    folder: Path
    history: list[dict[str, Any]]

    @property
    def dense(self) -> Path:
        """Safetensors file with its result."""
        return self.folder / f"{DENSE}.safetensors"

    @classmethod
    def of(cls, folder: str | Path, settings: Mapping[str, Any]) -> Phase1:
        """Open a finished phase, checking that it is the one a run with ``settings`` would make.

        Args:
            folder: of the run, or the file that `dense_phase` returned.
            settings: of the run that wants to share it.

        Raises:
            FileNotFoundError: no run there.
            ResumeError: its dense phase has not finished, or was run with other settings; each
                differing key is named.
        """
        folder = Path(folder)
        if folder.name == Path(f"{DENSE}.safetensors").name:  # what `dense_phase` returns
            folder = folder.parent.parent
        path = folder / "state.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"phase1={str(folder)!r} holds no run: {path} does not exist. Wanted the "
                "output_dir of an earlier lottery_ticket or dense_phase."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        phase = content["phases"].get(DENSE, {})
        if phase.get("status") != "done" or not (folder / f"{DENSE}.safetensors").is_file():
            raise ResumeError(
                f"the dense phase in {folder} has not finished; run it to its end first."
            )
        wanted = _settings_of_phase1(flatten(settings))
        made = _settings_of_phase1(content["settings"])
        if not any(key.startswith("metadata.data") for key in made):
            wanted = {k: v for k, v in wanted.items() if not k.startswith("metadata.data")}
        changed = differences(made, wanted)
        if changed:
            raise ResumeError(
                f"the dense phase in {folder} was run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse the same, or run another dense phase."
            )
        return cls(folder, list(phase.get("history", [])))


def _settings_of_phase1(settings: Mapping[str, Any]) -> dict[str, Any]:
    shared = {k: v for k, v in settings.items() if k.partition(".")[0] in _SHARED}
    shared |= {k: v for k, v in settings.items() if k.startswith("metadata.data")}
    l1 = settings.get("l1")
    return {**shared, "l1 of phase 1": l1[0] if isinstance(l1, list) else l1}
