"""Tensors by parameter name from wherever they are: a model, a mapping, a checkpoint on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.errors import MaskError
from sparseft.modules import ParameterIndex, canonical_name
from sparseft.modules.prefixes import find_name
from sparseft.modules.weight_storage import full_value

__all__ = ["Checkpoint", "Source", "TensorSource"]

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

_INDEX = "model.safetensors.index.json"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")  # what torch.save is mostly called


def _pickle_hint(file: Path, what: str) -> str:
    """Return how to hand over the tensors of a file of ``torch.save``, "" if it is not like one."""
    with file.open("rb") as start:
        magic = start.read(4)
    # A zip archive since torch 1.6, a pickle before.
    if magic != b"PK\x03\x04" and magic[:1] != b"\x80" and file.suffix not in _PICKLES:
        return ""
    given = f"{what}=torch.load" if what else "torch.load"
    return (
        f" {file.name} looks like a file of torch.save, which is not opened by its path, as "
        f"unpickling can run code. Give the tensors: {given}({str(file)!r}, weights_only=True)."
    )


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a safetensors file, or of a folder of shards; each is mapped when asked for.

    Args:
        path: the file, or a folder with ``model.safetensors`` or its index of shards.
        what: what it is for, in messages, e.g. ``"base"``.

    Raises:
        FileNotFoundError: nothing there.
        MaskError: not safetensors.
    """

    def __init__(self, path: str | os.PathLike[str], what: str = "") -> None:
        self.path = Path(path)
        self._what = what
        self._said = f"{what}: " if what else ""
        files = self._files()
        self._open: dict[Path, Any] = {}
        self._home: dict[str, Path] = {}
        for file in files:
            for name in self._handle(file).keys():  # noqa: SIM118  (a handle is no mapping)
                self._home[name] = file

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{self._said}no checkpoint at {self.path}: the path does not exist. Wanted a "
                ".safetensors "
                "file or a folder written by save_pretrained."
            )
        if (self.path / _INDEX).is_file():
            table = json.loads((self.path / _INDEX).read_text(encoding="utf-8"))
            return [self.path / name for name in sorted(set(table["weight_map"].values()))]
        files = sorted(self.path.glob("*.safetensors"))
        if (self.path / "model.safetensors") in files:
            files = [self.path / "model.safetensors"]
        if len(files) != 1:
            pickles = sorted(f for f in self.path.iterdir() if f.suffix in _PICKLES)
            hint = " Name the file itself."
            if pickles and not files:
                hint = _pickle_hint(pickles[0], self._what)
            raise FileNotFoundError(
                f"{self._said}folder {self.path} holds {len(files)} .safetensors files and no "
                f"{_INDEX}; wanted model.safetensors.{hint}"
            )
        return files

    def _handle(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                self._open[file] = safe_open(str(file), framework="pt", device="cpu")
            except SafetensorError as bad:
                raise MaskError(
                    f"{self._said}{file} is no safetensors file, or damaged: {bad}."
                    f"{_pickle_hint(file, self._what)}"
                ) from bad
        return self._open[file]

    def __getitem__(self, name: str) -> Tensor:
        return self._handle(self._home[name]).get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


class TensorSource:
    """Finds the tensor that belongs to a parameter of ``model`` in another place.

    Args:
        source: a model, a mapping from name to tensor (a state dict), or a path.
        model: whose names are asked for; tied parameters are found under any of their names, and
            an encoder's also with or without a head's prefix.
        what: in messages, e.g. ``"base"``.
    """

    def __init__(self, source: Source, model: nn.Module, what: str) -> None:
        self.what = what
        self._model = model
        self._index = ParameterIndex(model)
        self._tensors: Mapping[str, Tensor]
        if isinstance(source, nn.Module):
            other = ParameterIndex(source)
            self._tensors = {n: other.get(n) for n in other.names}
            self._names = {a: n for n in other.names for a in (n, *other.aliases(n))}
        elif isinstance(source, Mapping):
            self._tensors = source
            self._names = {canonical_name(n): n for n in source} | {n: n for n in source}
        elif isinstance(source, str | os.PathLike):
            self._tensors = Checkpoint(source, what)
            self._names = {n: n for n in self._tensors}
        else:
            raise TypeError(
                f"{what} is {type(source).__name__}, wanted a model, a mapping from name to "
                "tensor, or the path of a checkpoint."
            )

    def _nested(self) -> str:
        """Say where the tensors may lie if this is a training checkpoint with a state dict in."""
        if isinstance(self._tensors, Checkpoint):
            return ""
        inner = next((n for n, t in self._tensors.items() if isinstance(t, Mapping)), None)
        return "" if inner is None else f" {self.what}[{inner!r}] is a mapping itself: give that."

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of a parameter, detached.

        Raises:
            MaskError: there is none, or it has another shape.
        """
        found = None
        for form in (name, *self._index.aliases(name)):
            found = found or find_name(self._model, form, self._names.__contains__)
        if found is None:
            raise MaskError(
                f"{self.what} has no tensor for parameter {name!r}."
                f"{did_you_mean(name, self._names)}{self._nested()} "
                "Leave the parameter out with exclude=[...], or give the whole base."
            )
        tensor = self._tensors[self._names[found]]
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{self.what}[{self._names[found]!r}] is {type(tensor).__name__}, wanted a tensor. "
                "A checkpoint on disk is given by its path alone."
            )
        tensor = full_value(tensor)
        if tuple(tensor.shape) != tuple(shape):
            raise MaskError(
                f"{self.what} has shape {tuple(tensor.shape)} for {name!r} but the model has "
                f"{tuple(shape)}; they are different models."
            )
        return tensor
