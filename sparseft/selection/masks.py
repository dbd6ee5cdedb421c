"""`Masks`: which entries of which parameters; what `select` returns and `attach` takes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sparseft.diff import MaskLike, SparsePattern, as_pattern
from sparseft.errors import MaskError
from sparseft.io import atomic_write

__all__ = ["MaskRow", "Masks"]


@dataclass(frozen=True)
class MaskRow:
    """One parameter of a selection."""

    name: str
    shape: tuple[int, ...]
    nnz: int
    density: float


class Masks(dict[str, SparsePattern]):
    """Parameter name -> pattern, in canonical order (sorted names).

    A plain dict otherwise: anything that takes a mapping of masks takes it.
    """

    @classmethod
    def of(cls, masks: Mapping[str, MaskLike]) -> Masks:
        """Build from patterns or bool tensors (True = kept)."""
        return cls({n: as_pattern(masks[n], name=n, shape=masks[n].shape) for n in sorted(masks)})

    @property
    def nnz(self) -> int:
        """Entries kept."""
        return sum(pattern.nnz for pattern in self.values())

    @property
    def numel(self) -> int:
        """Entries of all parameters here."""
        return sum(pattern.numel for pattern in self.values())

    @property
    def density(self) -> float:
        """nnz / numel, 0 without entries."""
        return self.nnz / self.numel if self.numel else 0.0

    def summary(self) -> list[MaskRow]:
        """Return a row per parameter."""
        return [MaskRow(n, tuple(p.shape), p.nnz, p.density) for n, p in self.items()]

    def equals(self, other: Mapping[str, SparsePattern]) -> bool:
        """Same names and the same positions; devices aside."""
        return set(self) == set(other) and all(p.equals(other[n]) for n, p in self.items())

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
        """Write a safetensors file: per parameter its indices, shapes in the metadata; atomic.

        The same masks give the same bytes. The metadata has one key, ``shapes``: JSON, parameter
        name to list of sizes.

        ``select(model, "file", path=...)`` and `load` read it.
        """
        from safetensors.torch import save

        shapes = {name: list(pattern.shape) for name, pattern in self.items()}
        # One key: safetensors keeps metadata in a hash map, whose order changes between processes.
        metadata = {"shapes": json.dumps(shapes)}
        tensors = {n: p.indices.detach().cpu().clone() for n, p in self.items()}
        with atomic_write(path, overwrite=overwrite) as file:
            file.write(save(tensors, metadata=metadata))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read a file of `save`, or the masks of an adapter (folder or file); all is checked.

        Raises:
            FileNotFoundError: nothing there.
            MaskError: damaged, or of another format; names the tensor that is wrong.
            AdapterFormatError: a damaged adapter.
        """
        from safetensors import SafetensorError, safe_open

        from sparseft.adapter import Adapter

        where = Path(path)
        if where.is_dir() or not where.exists():
            return cls({n: d.pattern for n, d in Adapter.load(where).diffs.items()})
        try:
            with safe_open(str(where), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") == "sparseft-adapter":
                    return cls({n: d.pattern for n, d in Adapter.load(where).diffs.items()})
                shapes = _shapes(metadata, where)
                found = set(file.keys())
                if found != set(shapes):
                    odd = sorted(found ^ set(shapes))
                    raise MaskError(f"{where}: {odd[0]!r} has a tensor or a shape, but not both.")
                return cls(
                    {n: _pattern(file.get_tensor(n), shapes[n], n, where) for n in sorted(shapes)}
                )
        except SafetensorError as bad:
            raise MaskError(f"{where} is no safetensors file, or damaged: {bad}.") from bad


def _shapes(metadata: Mapping[str, str], where: Path) -> dict[str, list[int]]:
    wrong = MaskError(
        f"{where} holds no masks: its metadata has no table of shapes. Wanted a file of Masks.save "
        "or an adapter."
    )
    try:
        shapes = json.loads(metadata["shapes"])
    except (KeyError, ValueError, RecursionError):
        raise wrong from None
    if not isinstance(shapes, dict) or not all(
        isinstance(s, list) and all(type(n) is int and n >= 0 for n in s) for s in shapes.values()
    ):
        raise wrong
    return shapes


def _pattern(indices: torch.Tensor, shape: list[int], name: str, where: Path) -> SparsePattern:
    try:
        return SparsePattern.from_indices(indices, shape)
    except MaskError as bad:
        raise MaskError(f"{where}: mask of {name!r}: {bad}") from None
