"""Several pictures in one file; memory profiles drawn from their JSON."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sparseft.io.atomic import atomic_write

__all__ = ["drawn", "memory_picture", "stacked"]


def drawn(draw: Callable[[Path], Any]) -> bytes | None:
    """Return what ``draw(path)`` writes; None if it writes nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "one.png"
        draw(path)
        return path.read_bytes() if path.is_file() else None


def memory_picture(found: Mapping[str, Any]) -> bytes | None:
    """Return the bars of what `profile_json` gave; None where nothing was found."""
    from sparseft.profiling.memory import MemoryUse
    from sparseft.profiling.plot import plot_profile
    from sparseft.profiling.workload import Way, Workload

    def use(parts: Mapping[str, int] | None) -> MemoryUse | None:
        if parts is None:
            return None
        return MemoryUse(**{name: size for name, size in parts.items() if name != "peak"})

    def row(data: Mapping[str, Any]) -> Any:
        timed = None if data["steps"] is None else SimpleNamespace(steps=data["steps"])
        return SimpleNamespace(
            way=Way(**data["way"]),
            predicted=use(data["predicted"]),
            measured=use(data["measured"]),
            measurement=timed,
        )

    rows = tuple(row(data) for data in found["rows"])
    if not any(each.predicted or each.measured for each in rows):
        return None
    profile: Any = SimpleNamespace(
        workload=Workload(**found["workload"]),
        device=found["device"],
        world_size=found["world_size"],
        how=found["measured_how"],
        rows=rows,
        fits=tuple(SimpleNamespace(**fit) for fit in found["fits"]),
    )
    return drawn(lambda path: plot_profile(profile, path))


def stacked(pictures: Iterable[bytes | None], path: Path) -> Path | None:
    """Write PNGs below each other into one; None, and no file, if there are none."""
    from PIL import Image  # matplotlib's own

    given: Sequence[bytes] = [data for data in pictures if data is not None]
    if not given:
        return None
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in given]
    size = max(image.width for image in images), sum(image.height for image in images)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    with atomic_write(path) as file:
        sheet.save(file, format="PNG")
    return path
