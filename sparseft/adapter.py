"""`Adapter`: the saved, composable unit. Named sparse diffs, fully trained tensors, and provenance.

Pure data. Files are `sparseft.io`, putting an adapter on a model is `attach` and `composition`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sparseft._integrity import bits_equal, find_value_fault, hash_tensor
from sparseft._text import did_you_mean
from sparseft._version import __version__
from sparseft.diff import VALUE_DTYPES, Mode, SparseDiff
from sparseft.errors import AdapterFormatError, DiffError, UnknownNameError
from sparseft.fingerprint import Fingerprint

if TYPE_CHECKING:
    from sparseft.summary import AdapterSummary

__all__ = [
    "FORMAT_VERSION",
    "Adapter",
    "AdapterMetadata",
    "DiffHeader",
    "DiffSource",
    "Encoding",
    "library_versions",
]

FORMAT_VERSION = 1

# How a file holds indices: as positions, or as the gaps between them (`sparseft.io.gaps`).
Encoding: TypeAlias = Literal["plain", "gaps"]

# A local folder given as the base's name: absolute, home, relative by dots, or a drive letter.
_LOCAL_PATH = re.compile(r"^(/|\\|~|\.{1,2}([/\\]|$)|[A-Za-z]:[/\\])")


def library_versions() -> dict[str, str]:
    """Return the versions that shape an adapter's numbers: sparseft's and torch's."""
    return {"sparseft": __version__, "torch": str(torch.__version__)}


class DiffHeader(NamedTuple):
    """What a file says of a diff before its contents are read."""

    shape: torch.Size
    nnz: int
    mode: Mode
    dtype: torch.dtype
    encoding: Encoding = "plain"
    index_nbytes: int | None = None  # in the file; None where there is none

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values in memory."""
        index_size = 4 if self.numel < 2**31 else 8
        return self.nnz * (index_size + self.dtype.itemsize)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of indices and values in the file; in memory where there is no file."""
        if self.index_nbytes is None:
            return self.nbytes
        return self.index_nbytes + self.nnz * self.dtype.itemsize


class DiffSource(Mapping[str, SparseDiff]):
    """Diffs that are read, and checked, when first asked for; their headers are known at once."""

    @abstractmethod
    def header(self, name: str) -> DiffHeader:
        """Return shape, nnz, mode and dtype without reading the contents."""


def _without_folders(base_name: str) -> str:
    """Keep the last part of a local path (adapter bytes hold no path); hub names as they are."""
    if _LOCAL_PATH.match(base_name) or len(re.findall(r"[/\\]", base_name)) > 1:
        return re.split(r"[/\\]", base_name.rstrip("/\\"))[-1]
    return base_name


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """Where an adapter comes from. Holds no time and no path, so that equal work gives equal bytes.

    Args:
        format_version: version of what a file says (see `sparseft.io.safetensors_v1`); compact
            indices are another way of writing the same and leave it as it is.
        base_name: name of the base model; of a local path only the last part is kept.
        fingerprint: of the base tensors at the diffs, always of the bottom base.
        method: how the mask was chosen, e.g. ``"magnitude"``.
        density: kept fraction that was asked for, if one was.
        seed: seed of the run.
        versions: library versions, by name.
        parents: content digests of the adapters that lay beneath while this one was trained.
        extra: anything JSON can hold.
    """

    format_version: int = FORMAT_VERSION
    base_name: str | None = None
    fingerprint: Fingerprint | None = None
    method: str = ""
    density: float | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=library_versions)
    parents: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.base_name is not None:
            object.__setattr__(self, "base_name", _without_folders(self.base_name))
        object.__setattr__(self, "parents", tuple(self.parents))
        try:
            extra = json.loads(json.dumps(dict(self.extra), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as bad:
            raise AdapterFormatError(
                f"metadata extra has no JSON form: {bad}. Use numbers, strings, lists, dicts."
            ) from None
        # A copy through JSON: what is held is what a file gives back (tuples become lists, ...).
        object.__setattr__(self, "extra", extra)


class Adapter(Mapping[str, SparseDiff]):
    """Named sparse diffs and fully trained tensors of one model, with where they come from.

    A mapping from parameter name to `SparseDiff`, in order of names.

    Args:
        diffs: canonical parameter name -> `SparseDiff`.
        name: short name, e.g. ``"swahili"``; the first key of the canonical composition order.
        dense: parameters that were trained fully (heads), by name; they replace the base's.
        metadata: provenance.

    Raises:
        DiffError: a value of another type, a name that is empty or in both mappings, a dense tensor
            that is not floating or not finite.

    Example:
        >>> import torch
        >>> from sparseft import Adapter, SparseDiff
        >>> delta = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
        >>> adapter = Adapter({"proj.weight": SparseDiff.from_dense(delta)}, name="sw")
        >>> adapter.nnz, list(adapter)
        (1, ['proj.weight'])
    """

    def __init__(
        self,
        diffs: Mapping[str, SparseDiff],
        *,
        name: str = "adapter",
        dense: Mapping[str, Tensor] | None = None,
        metadata: AdapterMetadata | None = None,
    ) -> None:
        self.name = name
        self.metadata = metadata if metadata is not None else AdapterMetadata()
        self.diffs: Mapping[str, SparseDiff]
        self.dense: Mapping[str, Tensor]
        if isinstance(diffs, DiffSource):  # checked where it is read, not here
            self.diffs = diffs
            self.dense = dense if dense is not None else {}
        else:
            self.diffs = _checked_diffs(diffs)
            self.dense = _checked_dense(dense or {})
        both = [n for n in self.diffs if n in self.dense]
        if both:
            raise DiffError(f"{both[0]!r} is both a diff and a dense tensor; keep one of the two.")

    def __getitem__(self, name: str) -> SparseDiff:
        if name not in self.diffs:
            raise UnknownNameError(
                f"adapter {self.name!r} has no diff of {name!r}.{did_you_mean(name, self.diffs)}"
            )
        return self.diffs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.diffs)

    def __len__(self) -> int:
        return len(self.diffs)

    def __contains__(self, name: object) -> bool:
        return name in self.diffs

    def __bool__(self) -> bool:
        return True  # an adapter with nothing but a head is still an adapter

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickles and deep copies hold the tensors themselves, also where those are mapped.
        return _rebuild, (dict(self.diffs.items()), self.name, dict(self.dense), self.metadata)

    # A mapping, but compared as the object it is; `equals` compares contents.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def names(self) -> list[str]:
        """Names of the parameters with a diff, sorted."""
        return list(self.diffs)

    def header(self, name: str) -> DiffHeader:
        """Return shape, nnz, mode and dtype of one diff; reads nothing of a mapped file."""
        if isinstance(self.diffs, DiffSource):
            return self.diffs.header(name)
        diff = self[name]
        return DiffHeader(diff.shape, diff.nnz, diff.mode, diff.dtype)

    @property
    def nnz(self) -> int:
        """Number of stored entries over all diffs (dense tensors aside)."""
        return sum(self.header(n).nnz for n in self.diffs)

    @property
    def nbytes(self) -> int:
        """Bytes of all indices, values and dense tensors."""
        sparse = sum(self.header(n).nbytes for n in self.diffs)
        return sparse + sum(t.numel() * t.element_size() for t in self.dense.values())

    @property
    def digest(self) -> str:
        """32 hex digits over names, diffs and dense tensors; metadata and own name do not enter.

        Equal contents have equal digests wherever they are. Computed at each call: contents are
        tensors, which their owner may change.
        """
        total = hashlib.blake2b(digest_size=16)
        for name, diff in sorted(self.diffs.items()):
            total.update(f"diff:{len(name)}:{name}:{diff.digest()}:".encode())
        for name, tensor in sorted(self.dense.items()):
            total.update(f"dense:{len(name)}:{name}:{dense_digest(tensor)}:".encode())
        return total.hexdigest()

    def equals(self, other: Adapter) -> bool:
        """Same names and the same diffs and dense tensors bit for bit; name and metadata aside."""
        return (
            set(self.diffs) == set(other.diffs)
            and set(self.dense) == set(other.dense)
            and all(d.equals(other[n]) for n, d in self.diffs.items())
            and all(bits_equal(t, other.dense[n]) for n, t in self.dense.items())
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Adapter:
        """Return a copy on ``device`` with diff values in ``dtype``; dense tensors keep theirs."""
        return Adapter(
            {n: d.to(device, dtype) for n, d in self.diffs.items()},
            name=self.name,
            dense={n: t.to(device) for n, t in self.dense.items()},
            metadata=self.metadata,
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = True,
        compact: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Write ``path/adapter.safetensors``, or ``path`` itself if it ends in ``.safetensors``.

        Atomic: an existing adapter survives any failure. The same adapter gives the same bytes.

        Args:
            path: folder (made if missing) or file.
            overwrite: whether an adapter already there may be replaced.
            compact: store indices as gaps, about 1.2 bytes each at 1 % density and 1.0 from 3 % on
                instead of 4. Exact (the digest is the same), but the indices are decoded when
                loaded instead of mapped, and an older sparseft refuses the file.
            dtype: cast the values of diffs first, e.g. to ``torch.bfloat16``; lossy, so the digest
                changes. Dense tensors keep theirs.

        Returns:
            The file written.

        Raises:
            FileExistsError: the file exists and ``overwrite`` is False.
            DiffError: a value overflows in ``dtype``.
            AdapterFormatError: something the format cannot hold, e.g. a value changed to NaN since.
            OSError: writing failed.
        """
        from sparseft.io import save_adapter

        adapter = self if dtype is None else self.to(dtype=dtype)
        return save_adapter(adapter, path, overwrite=overwrite, compact=compact)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        check: Literal["full", "lazy"] = "full",
    ) -> Adapter:
        """Read an adapter, memory-mapped; nothing unchecked is ever handed out.

        Args:
            path: folder with ``adapter.safetensors``, or the file; or a folder or file that another
                library wrote (see `sparseft.io.foreign`); or ``owner/name`` on the hub, where
                neither it nor ``owner`` exists here (see `from_pretrained`).
            device: where the tensors go when they are first used.
            check: "full" reads and checks every tensor now, one by one; "lazy" checks the header
                now and each tensor when it is first used.

        Raises:
            FileNotFoundError: nothing there.
            AdapterFormatError: damaged, hostile or of an unknown format; names the tensor.
            OptionError: another library's file that needs to be told more (a base, a density).
            ConnectionError: a name that is not in the cache, and the hub does not answer.
        """
        from sparseft.io import load_adapter

        return load_adapter(path, device=device, check=check)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: torch.device | str = "cpu",
        check: Literal["full", "lazy"] = "full",
    ) -> Adapter:
        """Load an adapter from the hub, or from a path where that exists.

        A name that is in the cache of downloads is loaded from there without asking the hub, as it
        was when it was downloaded; ``force_download=True`` fetches what the hub has now.

        Args:
            name_or_path: ``owner/name``, or a path as in `load`, for which the next five arguments
                mean nothing.
            revision: branch, tag or commit; default: the main branch.
            cache_dir: default: the hub client's.
            token: for private repositories; default: the one saved by ``hf auth login``.
            local_files_only: never ask the hub.
            force_download: download also what is in the cache.
            device, check: as in `load`.

        Raises:
            ValueError: neither a path that exists nor a name.
            FileNotFoundError: no such repository, revision or adapter in it.
            PermissionError: the repository is gated.
            ConnectionError: not in the cache, and the hub does not answer.
            AdapterFormatError: as in `load`.

        Example:
            >>> adapter = Adapter.from_pretrained("owner/swahili")  # doctest: +SKIP
        """
        from sparseft.io import download_adapter, load_adapter

        if Path(name_or_path).exists():
            return load_adapter(name_or_path, device=device, check=check)
        folder = download_adapter(
            os.fspath(name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return load_adapter(folder, device=device, check=check)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        compact: bool = False,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Upload ``adapter.safetensors`` and a model card to the hub.

        The card (``README.md``) is made of what the adapter says of itself; a card that somebody
        wrote by hand is kept.

        Args:
            repo_id: ``owner/name``, or ``name`` in the token's own space; made if missing.
            revision: branch to write to, made if missing; default: the main branch.
            private: whether a new repository is private; default: as the owner has set.
            token: with the right to write; default: the one saved by ``hf auth login``.
            commit_message: default: "Upload adapter NAME".
            create_pr: open a pull request instead of writing to the branch.
            compact, dtype: as in `save`.

        Returns:
            The address of the commit.

        Raises:
            PermissionError: no token, or one that may not write there.
            ConnectionError: the hub does not answer.
            OSError: the hub answered with another error.
            AdapterFormatError, DiffError: as in `save`; nothing was sent.
        """
        from sparseft.io import push_adapter

        return push_adapter(
            self,
            repo_id,
            revision=revision,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            compact=compact,
            dtype=dtype,
        )

    def summary(self) -> AdapterSummary:
        """Describe every tensor and the totals as plain data (what ``sparseft inspect`` prints)."""
        from sparseft.summary import summarise

        return summarise(self)

    def __repr__(self) -> str:
        return (
            f"Adapter({self.name!r}, diffs={len(self.diffs)}, nnz={self.nnz:,}, "
            f"dense={len(self.dense)}, base={self.metadata.base_name!r})"
        )


def _rebuild(
    diffs: dict[str, SparseDiff], name: str, dense: dict[str, Tensor], metadata: AdapterMetadata
) -> Adapter:
    return Adapter(diffs, name=name, dense=dense, metadata=metadata)


def dense_digest(tensor: Tensor) -> str:
    """Return 32 hex digits of BLAKE2b over shape, dtype and bytes of a dense tensor."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"dense:{','.join(map(str, tensor.shape))}:{tensor.dtype}:".encode())
    hash_tensor(digest, tensor)
    return digest.hexdigest()


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise DiffError(f"{name!r} cannot name a parameter; wanted a non-empty string.")


def _checked_diffs(diffs: Mapping[str, SparseDiff]) -> dict[str, SparseDiff]:
    for name, diff in diffs.items():
        _check_name(name)
        if not isinstance(diff, SparseDiff):
            raise DiffError(
                f"diffs[{name!r}] is {type(diff).__name__}, wanted a SparseDiff. "
                "SparseDiff.from_dense(delta, mask) makes one from a tensor."
            )
    return dict(sorted(diffs.items()))


def _checked_dense(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in dense.items():
        _check_name(name)
        if not isinstance(tensor, Tensor) or tensor.dtype not in VALUE_DTYPES:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = ", ".join(map(str, VALUE_DTYPES))
            raise DiffError(f"dense[{name!r}] is {got}, wanted a tensor of {wanted}.")
        fault = find_value_fault(tensor)
        if fault is not None:
            raise DiffError(f"dense[{name!r}] must be finite; {fault}.")
    return {name: tensor.detach() for name, tensor in sorted(dense.items())}
