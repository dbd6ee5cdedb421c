"""The folder a model lies in, wherever it is named, and what belongs to a model beside weights."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Any

from sparseft._text import did_you_mean
from sparseft.errors import CompositionError
from sparseft.io.hub import first_line, load_from_anywhere

__all__ = ["copy_companions", "find_model", "has_tokenizer", "shown_name"]

_PICKLES = ("*.bin", "*.bin.index.json")
# Weights in other forms, and what a training run leaves beside a model.
_LEFT_OUT = (
    "*.safetensors", "*.safetensors.index.json", *_PICKLES, "*.pt", "*.pth", "*.ckpt", "*.h5",
    "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.gguf", "*.tflite", "*.mlmodel", "*.pkl",
    "*.npz", "adapter_config.json", "trainer_state.json", "events.out.*", "README.md",
    "sparseft_composition.json",
)  # fmt: skip
_FOLDERS_LEFT_OUT = ("checkpoint-*", "runs", "onnx", "openvino", "coreml", "original")
_TOKENIZERS = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.bpe.*", "*.tiktoken",
)  # fmt: skip


def shown_name(source: str | os.PathLike[str]) -> str:
    """Return what to call a model in files: a folder's own name, or the name on the hub."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else str(source)


def find_model(source: str | os.PathLike[str], what: str = "base") -> Path:
    """Return the folder of a model: one on disk, in the cache of downloads, or downloaded now.

    Args:
        source: a folder, or a name on the hub.
        what: what it is for, in messages.

    Raises:
        CompositionError: nothing there, or it cannot be fetched.
    """
    given = Path(source).expanduser()
    if given.is_dir():
        return given
    name = str(source)
    if name.startswith((".", "/", "~")) or given.is_file():
        got = f"{name} is a file" if given.is_file() else f"no folder {name}"
        raise CompositionError(
            f"{what} model: {got}. Give a folder written by save_pretrained, or a name."
        )

    def fetch(**where: Any) -> Path:
        from huggingface_hub import snapshot_download

        # Pickles only where there is nothing else.
        out = [p for p in _LEFT_OUT if "safetensors" not in p and p not in _PICKLES]
        out = [*out, "*/*.safetensors", *(f"{f}/*" for f in _FOLDERS_LEFT_OUT)]
        for ignored in ([*out, *_PICKLES], out):
            folder = Path(snapshot_download(name, ignore_patterns=ignored, **where))
            if _is_whole(folder):
                return folder
        raise FileNotFoundError(f"{name} has no config.json, or no weights that are whole")

    if given.parent != Path(".") and given.parent.is_dir():
        # Where its first part is a folder here, "owner/name" is a path with a slip in it: what was
        # downloaded under that name is taken, but the hub is not asked.
        try:
            return fetch(local_files_only=True)
        except (OSError, ValueError):
            near = did_you_mean(given.name, [p.name for p in given.parent.iterdir() if p.is_dir()])
            raise CompositionError(
                f"{what} model: no folder {name}, and {given.parent} is a folder here, so it is "
                f"taken for no name on the hub.{near} Give a folder written by save_pretrained; to "
                f"have {name} from the hub, run `hf download {name}` first."
            ) from None
    try:
        return load_from_anywhere(name, fetch)
    except (OSError, ValueError) as bad:
        raise CompositionError(
            f"{what} model {name!r} cannot be loaded: {first_line(bad)}. Without a network, give "
            "the path of a folder written by save_pretrained, or one downloaded elsewhere "
            "(hf download NAME --local-dir FOLDER)."
        ) from bad


def _is_whole(folder: Path) -> bool:
    """Whether a download has a configuration and all shards of one form of the weights."""
    if not (folder / "config.json").is_file():
        return False
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return True
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                return True  # there, and damaged: who opens it says so
            return all((folder / str(shard)).is_file() for shard in shards)
    return False


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return name.startswith(".") or any(fnmatch.fnmatchcase(name, p) for p in patterns)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what belongs to a model beside its weights: configurations, tokenizer, processors, code.

    Left out are weights in any form, what training leaves behind, hidden files, and the model card,
    which describes another model. Subfolders (``1_Pooling``) keep small weights of their own where
    ``modules.json`` says that they are parts of the model.

    Returns:
        The names copied, relative to ``source``, sorted.
    """
    parts = (source / "modules.json").is_file()
    copied = []
    for folder, folders, files in os.walk(source):
        here = Path(folder)
        folders[:] = [f for f in folders if not _matches(f, _FOLDERS_LEFT_OUT)]
        for file in files:
            inside = here != source and parts and file != "README.md" and not file.startswith(".")
            if not inside and _matches(file, _LEFT_OUT):
                continue
            relative = (here / file).relative_to(source)
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            # Contents alone: a file of a download is a link into the cache, and read-only.
            shutil.copyfile(here / file, target / relative)
            copied.append(relative.as_posix())
    return sorted(copied)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer's files."""
    return any(file.is_file() for pattern in _TOKENIZERS for file in folder.glob(pattern))
