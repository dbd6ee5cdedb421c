"""`Found`: a foreign adapter on disk, before it is converted; `Conversion` and `Written`: after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.errors import AdapterFormatError, OptionError
from sparseft.io.foreign.base import Base
from sparseft.io.foreign.names import parameter_name
from sparseft.io.pickles import check_tensors, is_pickle, load_pickle

__all__ = ["Conversion", "Found", "Written"]

_DIFF_FILE = "pytorch_diff.bin"  # says nothing about whose it is


@dataclass(frozen=True)
class Conversion:
    """An adapter that was read from a foreign file.

    Args:
        adapter: the result.
        format: name of the format it came from.
        nbytes: bytes of the files read.
        lost: what the files hold and the adapter does not, a sentence each.
        errors: for lossy formats, parameter -> relative Frobenius error of its change.
        error: the same over all parameters together; None where nothing is lost.
    """

    adapter: Adapter
    format: str
    nbytes: int
    lost: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None


@dataclass(frozen=True)
class Written:
    """What was written in a foreign format.

    Args:
        files: the files.
        nbytes: their bytes.
        entries: entries in them, fillers included.
        lost: what the adapter holds and the files do not, a sentence each.
        added: what the files hold on top, a sentence each.
    """

    files: tuple[Path, ...]
    nbytes: int
    entries: int
    lost: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


class Found:
    """A foreign adapter on disk.

    Args:
        path: what was given.
        file: the file with its tensors.
        format: name of its format in the registry.
        config: ``adapter_config.json``, if it has one.
        base: the base that the caller gave.
    """

    def __init__(
        self,
        path: Path,
        file: Path,
        format: str = "",
        config: Mapping[str, Any] | None = None,
        base: Base | None = None,
    ) -> None:
        self.path = path
        self.file = file
        self.format = format
        self.config = dict(config or {})
        self.given_base = base

    @property
    def name(self) -> str:
        """Name of the adapter: its folder's, or that of a file with a name of its own."""
        own = self.path.resolve()
        if own.parent.name == "snapshots":  # the cache of downloads: models--OWNER--NAME/snapshots
            return own.parent.parent.name.rpartition("--")[2]
        if not self.path.is_file():
            return own.name
        return own.parent.name if self.config or own.name == _DIFF_FILE else own.stem

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        config = self.file.with_name("adapter_config.json")
        more = config.stat().st_size if self.config and config.is_file() else 0
        return self.file.stat().st_size + more

    def fail(self, message: str) -> NoReturn:
        """Raise with the file's name in front."""
        raise AdapterFormatError(f"{self.file}: {message}")

    def what(self, key: str) -> str:
        """Return file and tensor for a message."""
        return f"{self.file}: {key[:200]!r}"

    @property
    def base_name(self) -> str | None:
        """The base that its configuration names."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @cached_property
    def base(self) -> Base:
        """The base that was given, or else the one its configuration names, if that is here.

        Raises:
            OptionError: neither is there.
        """
        if self.given_base is not None:
            return self.given_base
        try:
            if self.base_name is None:
                raise FileNotFoundError("its configuration names no base")
            return Base(self.base_name, given=False)
        except (OSError, ValueError) as bad:
            raise OptionError(
                f"{self.file}: this format ({self.format}) stores positions without the shapes of "
                f"the parameters, and {str(bad).rstrip('.')}. Give the base, a folder with "
                "config.json: `sparseft convert SOURCE OUT --base FOLDER`."
            ) from None

    @cached_property
    def pickle(self) -> Any:
        """What a file of ``torch.save`` holds."""
        return load_pickle(self.file)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors by their names in the file; those of safetensors are read when asked for."""
        if self.file.suffix == ".safetensors":
            return _SafeTensors(self.file)
        state = self.pickle
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            self.fail(f"holds a {type(state).__name__}, wanted a mapping from name to tensor.")
        check_tensors(self.file, state)
        return state

    def parameter(self, key: str, *, module: bool = False) -> str:
        """Return the bare model's name of a tensor or module of the file."""
        name = parameter_name(key, module=module)
        if not name or any(not part for part in name.split(".")):
            self.fail(f"{key[:200]!r} cannot name a parameter.")
        return name


class _SafeTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each mapped when it is asked for."""

    def __init__(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._handle: Any = safe_open(str(file), framework="pt", device="cpu")
            self._names = list(self._handle.keys())
            self.metadata: dict[str, str] = self._handle.metadata() or {}
        except SafetensorError as bad:
            why = "it is a pickle (torch.save) by another name" if is_pickle(file) else str(bad)
            raise AdapterFormatError(f"{file} is no safetensors file, or damaged: {why}.") from None

    def __getitem__(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
