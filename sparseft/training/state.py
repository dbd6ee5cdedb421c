"""What a run leaves on disk so that it can be killed at any moment and continued: its state file,
tensors and lock.

The state file is JSON, replaced whole. It names the settings of the run and the phases that have
finished; anything it does not name does not count, whatever lies in the folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseft.errors import ResumeError
from sparseft.io.atomic import atomic_write, atomic_write_json

__all__ = [
    "MASK_KEYS",
    "START_OVER",
    "RunState",
    "TensorFile",
    "differences",
    "exclusive",
    "flatten",
    "save_tensors",
]

_FORMAT = 1
# Settings that only decide which entries are chosen.
MASK_KEYS = ("nnz", "selector", "scope", "selector_options")
# How a caller from Python starts over. The commands, which have no such argument, replace it.
START_OVER = "pass resume=False to start over"


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file, read one at a time when asked for (memory-mapped)."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        self._file = safe_open(str(path), framework="pt", device="cpu")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all."""
    from safetensors.torch import save

    # .clone() would not do: save() wants tensors that share no storage, and detached CPU copies
    # share none.
    plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    with atomic_write(path) as file:
        # Never without metadata: safetensors 0.8 cannot read its own header of no tensors.
        file.write(save(plain, metadata={"format": "pt"}))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one level with dotted keys; everything else as it is in JSON."""
    if isinstance(value, Mapping):
        out: dict[str, Any] = {}
        for key, inner in value.items():
            out.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
        return out
    return {prefix: json.loads(json.dumps(value, default=str))}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``"key: was a, now b"`` for each key whose values differ, keys sorted."""
    a, b = flatten(old), flatten(new)
    missing = "(absent)"
    return [
        f"{key}: was {a.get(key, missing)!r}, now {b.get(key, missing)!r}"
        for key in sorted({*a, *b})
        if a.get(key, missing) != b.get(key, missing)
    ]


def _first_key(line: str) -> str:
    """Return the top key of a line of `differences`."""
    return line.partition(":")[0].partition(".")[0]


class RunState:
    """The state file of a run.

    Args:
        path: where it lies.
        settings: what decides the result; a state with others is refused.
        free: names of settings that may still change.
        writes: False leaves the file to another process, which does the same.

    Raises:
        ResumeError: the file was written with other settings (each differing key is named), by
            another version of the format, or is not readable.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        free: Collection[str] = (),
        writes: bool = True,
    ) -> None:
        self.path, self.writes = path, writes
        self.settings = flatten(settings)
        self.phases: dict[str, dict[str, Any]] = {}
        if not path.exists():
            self.write()
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, found = content["format_version"], content["settings"]
            self.phases = content["phases"]
        except (ValueError, KeyError, TypeError) as bad:
            raise ResumeError(
                f"{path} is not a state file of a run ({bad}); delete {path.parent} to start over."
            ) from None
        if version != _FORMAT:
            raise ResumeError(
                f"{path} has format {version!r}, wanted {_FORMAT}: another version wrote it. "
                "Use another output_dir."
            )
        changed = differences(found, self.settings)
        bound = [line for line in changed if _first_key(line) not in free]
        if bound:
            share = ""
            if all(_first_key(line) in MASK_KEYS for line in bound):
                share = f" (with phase1={str(path.parent)!r}, its dense phase is not run again)"
            raise ResumeError(
                f"{path.parent} holds a run with other settings, which these cannot go on with:\n  "
                + "\n  ".join(bound)
                + f"\nRestore them, use another output_dir{share}, or {START_OVER}."
            )
        if changed:
            self.write()

    def write(self) -> None:
        """Replace the file."""
        if self.writes:
            atomic_write_json(
                self.path,
                {"format_version": _FORMAT, "settings": self.settings, "phases": self.phases},
            )

    def done(self, phase: str) -> bool:
        """Whether a phase has finished and its result is on disk."""
        return self.phases.get(phase, {}).get("status") == "done"

    def start(self, phase: str, trainer: Mapping[str, Any]) -> None:
        """Note that a phase runs with these trainer settings; refuse others than it began with.

        Raises:
            ResumeError: the phase had begun with other settings; each differing key is named.
        """
        known = self.phases.get(phase)
        settings = flatten(trainer)
        if known is None:
            self.phases[phase] = {"status": "running", "trainer": settings}
            self.write()
            return
        changed = differences(known["trainer"], settings)
        if changed:
            raise ResumeError(
                f"phase {phase!r} in {self.path.parent} was begun with other trainer settings:\n  "
                + "\n  ".join(changed)
                + f"\nRestore them, use another output_dir, or {START_OVER}."
            )

    def finish(self, phase: str, **facts: Any) -> None:
        """Note that a phase is done; call after its result is on disk."""
        self.phases.setdefault(phase, {}).update(status="done", **facts)
        self.write()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go when the process ends, however it ends.

    Raises:
        ResumeError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder are the user's to avoid there
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResumeError(
                f"another process is running in {folder}; wait for it, or use another output_dir."
            ) from None
        # A killed process leaves half-written temporary files; nobody else writes here now.
        for debris in folder.glob("**/.*.tmp"):
            with contextlib.suppress(OSError):
                debris.unlink()
        yield
