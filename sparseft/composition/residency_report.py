"""What a `Residency` holds and has moved, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from sparseft._text import human_bytes

__all__ = ["Moved", "ResidencyReport", "Resident", "Tier"]

# "memory": the adapter's own tensors, of an adapter that comes from no file.
Tier: TypeAlias = Literal["device", "host", "mapped", "memory"]


@dataclass(frozen=True)
class Moved:
    """Counts over a time; the difference of two snapshots is the count between them.

    Args:
        hits: tensors that were where they were asked for.
        misses: tensors that had to be read or copied.
        streamed: misses that found no room there, and will be misses again.
        host_bytes: bytes copied to host memory.
        device_bytes: bytes copied to devices.
        evicted: adapters moved down a tier.
    """

    hits: int = 0
    misses: int = 0
    streamed: int = 0
    host_bytes: int = 0
    device_bytes: int = 0
    evicted: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Moved)))

    def __sub__(self, other: Moved) -> Moved:
        return Moved(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Moved)))

    def __str__(self) -> str:
        return (
            f"{self.hits} hits, {self.misses} misses ({self.streamed} streamed), "
            f"{human_bytes(self.host_bytes)} to the host, {human_bytes(self.device_bytes)} to "
            f"devices, {self.evicted} moved down"
        )


@dataclass(frozen=True)
class Resident:
    """One adapter.

    Args:
        name: its name here.
        tier: the highest in which it has room.
        nbytes: of all its diffs.
        host_bytes: of what lies in host memory, here; dense tensors included.
        device_bytes: the same, by device.
    """

    name: str
    tier: Tier
    nbytes: int
    host_bytes: int
    device_bytes: Mapping[str, int]


@dataclass(frozen=True)
class ResidencyReport:
    """All adapters, most recently used first, and the totals.

    Args:
        residents: one each.
        device_budget: bytes of each device; None: no limit.
        host_budget: bytes of host memory; None: no limit.
        moved: counts since the beginning.
    """

    residents: tuple[Resident, ...]
    device_budget: int | None
    host_budget: int | None
    moved: Moved

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(r.host_bytes for r in self.residents)

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes by device."""
        names = sorted({device for r in self.residents for device in r.device_bytes})
        return {d: sum(r.device_bytes.get(d, 0) for r in self.residents) for d in names}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return (header, rows): an adapter a row, then the totals."""
        devices = self.device_bytes
        header = ["adapter", "tier", "size", *devices, "host"]
        rows = [
            [
                r.name,
                r.tier,
                human_bytes(r.nbytes),
                *(human_bytes(r.device_bytes.get(d, 0)) for d in devices),
                human_bytes(r.host_bytes),
            ]
            for r in self.residents
        ]
        rows.append(
            [
                "total",
                "",
                human_bytes(sum(r.nbytes for r in self.residents)),
                *(_of(n, self.device_budget) for n in devices.values()),
                _of(self.host_bytes, self.host_budget),
            ]
        )
        return header, rows

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return {
            **asdict(self),
            "residents": [asdict(r) for r in self.residents],
            "host_bytes": self.host_bytes,
            "device_bytes": self.device_bytes,
        }

    def __str__(self) -> str:
        header, rows = self.table()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [header, *rows]
        )


def _of(nbytes: int, budget: int | None) -> str:
    held = human_bytes(nbytes)
    return held if budget is None else f"{held} of {human_bytes(budget)}"
