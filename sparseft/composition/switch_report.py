"""What a change of the active adapters did: entries, bytes, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparseft._text import human_bytes
from sparseft.composition.residency_report import Moved

__all__ = ["SwitchReport"]


@dataclass(frozen=True)
class SwitchReport:
    """One apply, switch or revert.

    Args:
        active: name -> coefficient, afterwards.
        method: by which they are combined.
        tensors: parameters that hold adapters now.
        restored: entries whose own bits were put back.
        written: entries written; those of dense tensors (heads) included.
        weight_bytes: bytes of both in the weights' dtypes.
        reweighted: whether only coefficients changed, so that nothing was captured or put back.
        union_built: whether the union of this set of adapters was made for it, and not found.
        moved: what the adapters' tensors were read and copied for it.
        seconds: in all; a GPU has finished by then.
    """

    active: Mapping[str, float]
    method: str
    tensors: int
    restored: int
    written: int
    weight_bytes: int
    reweighted: bool
    union_built: bool
    moved: Moved
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return {**asdict(self), "active": dict(self.active)}

    def __str__(self) -> str:
        names = " + ".join(
            name if coeff == 1 else f"{coeff:g} * {name}" for name, coeff in self.active.items()
        )
        did = "re-weighted" if self.reweighted else "written"
        parts = [f"{self.written:,} entries {did} in {self.tensors} tensors"] if names else []
        if self.restored:
            parts.append(f"{self.restored:,} put back")
        if self.union_built:
            parts.append("union built")
        copied = self.moved.host_bytes + self.moved.device_bytes
        if copied:
            parts.append(f"{human_bytes(copied)} of adapters copied")
        what = ", ".join(parts) or "nothing to do"
        return (
            f"{names or 'base'}: {what}, {human_bytes(self.weight_bytes)} of weights, "
            f"{1e3 * self.seconds:.1f} ms"
        )
