"""Loading by name: from a folder, from the cache of downloads, or else from the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseft._version import __version__
from sparseft.errors import SparseFtError

__all__ = ["download_adapter", "first_line", "hub_api", "is_hub_name", "load_from_anywhere"]

# What an adapter consists of, in the order in which one is looked for: ours, composable-sft's,
# and the folders of PEFT (SHiRA, Super-Tuning, LoRA), SpIEL and RoSA.
_LAYOUTS = (
    ("adapter.safetensors",),
    ("pytorch_diff.bin",),
    ("adapter_config.json", "adapter_model.safetensors"),
    ("adapter_config.json", "adapter_model.bin"),
)

# As the hub has it: letters, digits, "-", "_", "."; no "--" and no ".."; "-" and "." neither first
# nor last.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|[-.](?![-.]))*(?<![-.])"
_NAME = re.compile(rf"(?=.{{1,96}}$){_PART}/{_PART}")
_FILE_ENDS = (".safetensors", ".bin", ".pt", ".pth", ".json", ".git")

_TIMEOUT = 10  # seconds for one question


def is_hub_name(text: str) -> bool:
    """Whether ``text`` reads ``owner/name``, as repositories on the hub are called."""
    return _NAME.fullmatch(text) is not None and not text.endswith(_FILE_ENDS)


def download_adapter(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the folder with the adapter ``name``: from the cache of downloads, else from the hub.

    What is in the cache is used without a question to the hub, so a name that has been loaded once
    works without a network, and goes on meaning the same bits; ``force_download`` asks for what the
    hub has now. Of a repository only the adapter's own files are fetched (`adapter.safetensors`, or
    those of a format that `sparseft.io.foreign` reads).

    Args:
        name: ``owner/name``.
        revision: branch, tag or commit; default: the main branch.
        cache_dir: default: the hub client's (``HF_HUB_CACHE``).
        token: for private repositories; default: the one saved by ``hf auth login``, if any.
        local_files_only: never ask the hub.
        force_download: download also what is in the cache.

    Raises:
        ValueError: ``name`` is no name of a repository.
        FileNotFoundError: no such repository, revision or adapter.
        PermissionError: the repository is gated.
        ConnectionError: not in the cache, and the hub does not answer.
    """
    if not is_hub_name(name):
        raise ValueError(f"{name!r} is not a name on the hub; wanted 'owner/name'.")
    at = "" if revision is None else f" at revision {revision!r}"
    if not force_download:
        folder = _cached(name, revision, cache_dir)
        if folder is not None:
            return folder
    if local_files_only:
        raise FileNotFoundError(
            f"no adapter {name!r}{at} in the cache of downloads, and local_files_only=True forbids "
            "asking the hub. Load it once with local_files_only=False."
        )
    api = hub_api(token)
    files = _needed(name, at, _files_on_hub(api, name, revision, at))
    try:
        folder = api.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(files),
            force_download=force_download,
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the network's
            raise
        raise ConnectionError(
            f"the download of adapter {name!r} did not finish ({first_line(error)}). Run it again; "
            "what has arrived is kept."
        ) from error
    return Path(folder)


def hub_api(token: str | bool | None) -> Any:
    """Return the hub's client, with our name in its requests."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="sparseft", library_version=__version__)


def _cached(
    name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> Path | None:
    """Return the folder in the cache that holds a whole adapter, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    where = None if cache_dir is None else Path(cache_dir)
    for files in _LAYOUTS:
        found = [try_to_load_from_cache(name, f, cache_dir=where, revision=revision) for f in files]
        paths = [Path(path) for path in found if isinstance(path, str)]
        if len(paths) == len(files):
            return paths[0].parent
    return None


def _needed(name: str, at: str, there: list[str]) -> tuple[str, ...]:
    """Return the files of the first layout that a repository holds whole."""
    for files in _LAYOUTS:
        if set(files) <= set(there):
            return files
    some = ", ".join(sorted(f for f in there if not f.startswith("."))[:6]) or "nothing"
    wanted = ", ".join(" with ".join(files) for files in _LAYOUTS)
    raise FileNotFoundError(
        f"{name!r}{at} on the hub holds no adapter: it has {some}; wanted one of {wanted}."
    )


def _files_on_hub(api: Any, name: str, revision: str | None, at: str) -> list[str]:
    """Return the names of a repository's files, or say why there is no answer."""
    from huggingface_hub import errors

    try:
        info = api.model_info(name, revision=revision, timeout=_TIMEOUT)
    except errors.GatedRepoError as error:  # before its parent class, "not found"
        raise PermissionError(
            f"adapter {name!r} is gated: ask for access on its page on the hub, then log in "
            "(hf auth login) or pass token=."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no adapter {name!r}: there is no such path here and no such repository on the hub "
            "(or a private one: log in with hf auth login, or pass token=)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"no adapter {name!r}{at}: the hub has no such revision."
        ) from error
    except errors.LocalTokenNotFoundError:
        raise
    # Connection errors come from the HTTP library, which differs between versions of the client.
    except Exception as error:
        if getattr(error, "response", None) is not None:
            raise OSError(
                f"adapter {name!r}: the hub answered with an error ({first_line(error)})."
            ) from error
        raise ConnectionError(
            f"no adapter {name!r}{at}: it is neither a path here nor in the cache of downloads, "
            f"and the hub does not answer ({first_line(error)})."
        ) from error
    return [file.rfilename for file in info.siblings or ()]


def load_from_anywhere(source: str, load: Callable[..., Any]) -> Any:
    """Return ``load(**where)`` of a folder, of the cache of downloads, or else of the hub.

    The hub is asked one question first: without an answer its client would try each file six times,
    half a minute in all, with two lines for each on standard error.

    Args:
        source: a folder or a name on the hub.
        load: a ``from_pretrained`` of ``source``; takes ``local_files_only``.

    Raises:
        ConnectionError: neither here nor in the cache, and the hub does not answer.
        OSError, ValueError: whatever ``load`` raises.
    """
    if Path(source).expanduser().is_dir():
        return load()
    try:
        return load(local_files_only=True)
    except SparseFtError:  # it is there, and wrong
        raise
    except (OSError, ValueError):  # not there, or not whole
        _require_hub(source)
    return load()


def _require_hub(source: str) -> None:
    """Check that the hub answers, whatever it says of ``source``."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(source, timeout=10)
    # Connection errors come from the HTTP library, which differs between versions of the client.
    except Exception as error:
        if getattr(error, "response", None) is not None or isinstance(error, ValueError):
            return  # an answer, or no name for the hub: the loader says more
        raise ConnectionError(
            "it is neither a folder here nor in the cache of downloads, and the hub does not "
            f"answer ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without its full stop; its class if it has none."""
    while error.args and isinstance(inner := getattr(error.args[0], "reason", None), Exception):
        error = inner  # of a connection error in requests, which older clients of the hub use
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
