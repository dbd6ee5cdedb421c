"""`Base`: what a foreign file leaves out. The shapes of the base's parameters, and their values.

SpIEL, SHiRA, Super-Tuning and RoSA store positions without the shape of what they index.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.errors import AdapterFormatError, BaseMismatchError
from sparseft.io.foreign.names import checked_shape, parameter_name
from sparseft.io.pickles import check_tensors, load_pickle

__all__ = ["Base", "BaseLike"]

_INDEX = "model.safetensors.index.json"
# A model, a configuration of transformers, shapes or tensors by name, or a folder or name.
BaseLike = Any


class Base:
    """Parameters of a base model: shapes always, values where the source has them.

    Args:
        source: a model; a configuration of transformers; a mapping from name to tensor or shape; a
            folder or checkpoint file; or a name on the hub, of which the cache is looked at (its
            configuration is enough).
        given: False if the name was read in an adapter's file, not given by the caller: then
            nothing is downloaded.

    Raises:
        FileNotFoundError: a path that does not exist.
        AdapterFormatError: a folder without weights and configuration; a damaged checkpoint.
    """

    def __init__(self, source: BaseLike, *, given: bool = True) -> None:
        self.given = given
        self.label = type(source).__name__
        self.name: str | None = None  # to be named as the base of what is written
        self._modules: nn.Module | None = None
        self._config: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._read: Callable[[str], Tensor] | None = None
        if isinstance(source, nn.Module):
            self._take_model(source)
        elif isinstance(source, Mapping):
            self._take_mapping(source)
        elif isinstance(source, str | os.PathLike):
            self.label = self.name = str(source)
            self._take_path(Path(source).expanduser())
        elif hasattr(source, "model_type"):
            self._config = source
        else:
            raise TypeError(
                f"base is {type(source).__name__}, wanted a model, its configuration, a mapping "
                "from name to tensor or shape, a folder, or a name."
            )

    def _take_model(self, model: nn.Module) -> None:
        found = dict(model.named_parameters(remove_duplicate=False))
        tensors = {parameter_name(name): p.detach() for name, p in found.items()}
        self._modules = model
        self._shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        if not any(t.is_meta for t in tensors.values()):
            self._read = tensors.__getitem__

    def _take_mapping(self, source: Mapping[str, Any]) -> None:
        tensors = {parameter_name(n): t for n, t in source.items() if isinstance(t, Tensor)}
        self._shapes = {
            parameter_name(n): tuple(t.shape)
            if isinstance(t, Tensor)
            else checked_shape(t, f"base[{n!r}]")
            for n, t in source.items()
        }
        if len(tensors) == len(source):
            self._read = tensors.__getitem__

    def _take_path(self, path: Path) -> None:
        if path.is_file():
            self._take_files([path])
            return
        folder = path if path.is_dir() else self._cached()
        if folder is None:
            if self.label.startswith((".", "/", "~")) or len(path.parts) > 2:
                raise FileNotFoundError(f"base: no folder {self.label}.")
            self._config = self._downloaded()
            return
        files = [folder / "model.safetensors"]
        if (folder / _INDEX).is_file():
            try:
                table = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
                files = [folder / Path(name).name for name in sorted(set(table.values()))]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as bad:
                raise AdapterFormatError(
                    f"base: {folder / _INDEX} is damaged ({type(bad).__name__})."
                ) from None
        if not all(f.is_file() for f in files):
            files = [f for f in (folder / "pytorch_model.bin",) if f.is_file()]
        if files:
            self._take_files(files)
        if (folder / "config.json").is_file():
            self._config = folder
        elif not files:
            raise AdapterFormatError(
                f"base: folder {self.label} holds neither model.safetensors nor config.json; give "
                "a folder written by save_pretrained."
            )

    def _cached(self) -> Path | None:
        """Return the folder of a name in the cache of downloads."""
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(self.label, "config.json")
        except ValueError:  # no name for the hub
            return None
        return Path(found).parent if isinstance(found, str) else None

    def _downloaded(self) -> Any:
        from sparseft.io.hub import first_line, load_from_anywhere

        if not self.given:
            raise AdapterFormatError(
                f"its base {self.label!r} is neither a folder here nor in the cache of downloads."
            )

        def load(**where: Any) -> Any:
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(self.label, trust_remote_code=False, **where)

        try:
            return load_from_anywhere(self.label, load)
        except (OSError, ValueError) as bad:
            raise AdapterFormatError(
                f"base {self.label!r} cannot be found: {first_line(bad)}. Give the path of a "
                "folder written by save_pretrained; config.json alone is enough for the shapes."
            ) from bad

    def _take_files(self, files: Sequence[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        home: dict[str, tuple[Any, str]] = {}
        for file in files:
            if file.suffix == ".bin":
                state = load_pickle(file)
                if not isinstance(state, dict):
                    raise AdapterFormatError(f"base: {file} holds no mapping of tensors.")
                check_tensors(file, state)
                self._take_mapping(state)
                return
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
                for key in handle.keys():  # noqa: SIM118  (a handle is no mapping)
                    home[parameter_name(key)] = (handle, key)
                    shape = tuple(handle.get_slice(key).get_shape())
                    self._shapes[parameter_name(key)] = shape
            except SafetensorError as bad:
                raise AdapterFormatError(f"base: {file} is damaged: {bad}.") from None
        self._read = lambda name: home[name][0].get_tensor(home[name][1])

    @cached_property
    def _skeleton(self) -> nn.Module | None:
        """The model without memory, for the shapes of what a checkpoint leaves out (tied heads)."""
        if self._modules is not None or self._config is None:
            return self._modules
        import transformers

        config = self._config
        try:
            if isinstance(config, Path):
                # Not asked, and code beside the configuration is not run.
                config = transformers.AutoConfig.from_pretrained(
                    config, local_files_only=True, trust_remote_code=False
                )
            name = next(iter(getattr(config, "architectures", None) or ()), "")
            kind = getattr(transformers, str(name), None)
            with torch.device("meta"):
                if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                    return kind(config)
                return transformers.AutoModel.from_config(config, trust_remote_code=False)
        except Exception as bad:  # a class of transformers may raise anything here
            if self._shapes:
                return None
            raise AdapterFormatError(
                f"base {self.label}: no model can be laid out from its configuration ({bad})."
            ) from None

    @cached_property
    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        model = self._skeleton
        more = dict(model.named_parameters(remove_duplicate=False)) if model is not None else {}
        return {parameter_name(n): tuple(p.shape) for n, p in more.items()} | self._shapes

    def _find(self, name: str, known: Mapping[str, Any]) -> str | None:
        """Return the base's own form of ``name``: an encoder has its head's prefix, or has not."""
        if name in known:
            return name
        inner = name.partition(".")[2]
        near = [n for n in known if n == inner or n.partition(".")[2] == name]
        return near[0] if len(near) == 1 else None

    def shape(self, name: str, what: str) -> tuple[int, ...]:
        """Return the shape of a parameter.

        Raises:
            BaseMismatchError: the base does not have it.
        """
        shapes = self._shapes if name in self._shapes else self._all_shapes
        found = self._find(name, shapes)
        if found is None:
            raise BaseMismatchError(
                f"{what}: base {self.label} has no parameter {name!r}."
                f"{did_you_mean(name, shapes)} Is it the base of this adapter?"
            )
        return shapes[found]

    def tensor(self, name: str) -> Tensor | None:
        """Return the values of a parameter, None where only shapes are known."""
        found = self._find(name, self._shapes)
        return self._read(found) if self._read is not None and found is not None else None

    def kind(self, name: str) -> str:
        """Return the class of the module that has a parameter, "" where it is not known."""
        model = self._skeleton
        if model is None:
            return ""
        found = {parameter_name(n): n for n, _ in model.named_parameters(remove_duplicate=False)}
        own = self._find(name, found)
        if own is None:
            return ""
        return type(model.get_submodule(found[own].rpartition(".")[0])).__name__

    def names(self) -> list[str]:
        """Return the names of all parameters, sorted."""
        return sorted(self._all_shapes)
