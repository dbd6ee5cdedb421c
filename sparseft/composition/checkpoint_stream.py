"""Compose onto a checkpoint's files without building the model: one tensor in memory at a time.

What is written for a tensor is what a `Composer` writes into a live model: the same union, the same
sum, one rounding. All that can be checked without writing is checked before.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft._integrity import bits_equal, find_value_fault, raw_pieces
from sparseft._text import human_bytes
from sparseft.composition.checkpoint_target import Target, find_places
from sparseft.composition.fit import Dense, Fitter, Loaded, Missing
from sparseft.composition.plan import TensorPlan, plan_tensor, prepared
from sparseft.composition.registry import Combine, Rule, recipe_of
from sparseft.errors import BaseMismatchError, CompositionError
from sparseft.fingerprint import TensorFingerprint, compare, fingerprint_tensor
from sparseft.io import atomic_write_json
from sparseft.io.checkpoint_files import CheckpointFiles
from sparseft.io.checkpoint_shards import Shard, TensorInfo, dtype_name
from sparseft.io.checkpoint_writer import aligned, write_safetensors
from sparseft.modules.fingerprint import warn_of_quantised
from sparseft.ops import gather_entries, write_entries_

__all__ = ["StoredOtherwiseError", "StreamedMerge"]

logger = logging.getLogger(__name__)


class StoredOtherwiseError(CompositionError):
    """The files hold a tensor that a diff touches in another form than the model does."""


class StreamedMerge:
    """One composition onto one base on disk; checked when made, written by `write`.

    Args:
        files: the base's.
        target: the class to write for.
        chosen: the adapters, in canonical order.
        coeffs: by the adapters' names.
        method, options: composition method.
        check_base, dense, missing: as in `Composer`.

    Raises:
        StoredOtherwiseError: only the whole model, loaded by transformers, can be composed.
        BaseMismatchError, CompositionError, UnknownNameError: as in `Composer.apply`; also a head
            that nobody brings, and tied tensors whose copies in the files differ.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        target: Target,
        chosen: Sequence[Loaded],
        coeffs: Mapping[str, float],
        *,
        method: str,
        options: Mapping[str, Any],
        check_base: bool,
        dense: Dense,
        missing: Missing,
    ) -> None:
        self.recipe = recipe_of(method, dict(options))
        self.files, self.target, self.chosen = files, target, chosen
        self.coeffs = [coeffs[loaded.name] for loaded in chosen]
        fitter = Fitter(target.model, missing=missing, dense=dense, check_base=False)
        self.index = fitter.index
        self.fits = [fitter.fit(loaded) for loaded in chosen]
        self.places = find_places(target.model, self.index, files.names)
        # Canonical name -> the files' names of it: several where a tied tensor is stored twice.
        self.homes: dict[str, list[str]] = {}
        for name, place in self.places.parameters.items():
            self.homes.setdefault(self.index.resolve(place), []).append(name)
        self.dense = self._dense()
        self.touched = self._touched()
        self._check_there()
        self._check_shapes()
        self._check_sets()
        self._check_contents(check_base)
        self._plan_files()

    # What goes where.

    def _dense(self) -> dict[str, tuple[str, Tensor]]:
        """Return canonical name -> (adapter, tensor that replaces the parameter whole)."""
        found: dict[str, tuple[str, Tensor]] = {}
        for loaded, fit, coeff in zip(self.chosen, self.fits, self.coeffs, strict=True):
            for name, own in fit.dense.items() if coeff else ():
                tensor = loaded.adapter.dense[own]
                if name in found and not bits_equal(tensor, found[name][1]):
                    raise CompositionError(
                        f"adapters {found[name][0]!r} and {loaded.name!r} both hold all of "
                        f"{name!r}, with different values; give one of them coefficient 0, or, "
                        "in Python, pass dense='skip'."
                    )
                found.setdefault(name, (loaded.name, tensor))
        return found

    def _touched(self) -> dict[str, list[tuple[int, str]]]:
        """Return canonical name -> (ordinal, the adapter's own name) of its diffs."""
        touched: dict[str, list[tuple[int, str]]] = {}
        for ordinal, fit in enumerate(self.fits):
            for name, own in fit.diffs.items():
                if name in self.dense:
                    raise CompositionError(
                        f"adapter {self.dense[name][0]!r} holds all of {name!r} while "
                        f"{self.chosen[ordinal].name!r} has a diff of it; the two cannot be active "
                        "together. In Python, dense='skip' leaves the head out."
                    )
                touched.setdefault(name, []).append((ordinal, own))
        return touched

    def _plan(self, name: str, dtype: torch.dtype) -> TensorPlan:
        diffs = []
        for i, own in self.touched[name]:
            digest = self.chosen[i].digest
            diff = prepared(self.chosen[i].adapter[own], self.recipe, name=own, digest=digest)
            diffs.append((i, diff))
        return plan_tensor(name, diffs, dtype=dtype, device=torch.device("cpu"))

    # Checks.

    def _check_there(self) -> None:
        absent = [n for n in self.touched if n not in self.homes]
        lost = self.places.missing(self.target.model, self.index)
        lost = [n for n in lost if n not in self.dense]
        converted = {self.index.resolve(n) for n in self.places.converted.values()}
        if not converted.isdisjoint(absent) or (lost and self.places.converted):
            raise StoredOtherwiseError(
                f"{(absent or lost)[0]!r} is stored in other pieces than the model has."
            )
        lost = sorted({*lost, *absent})
        if lost:
            raise CompositionError(
                f"{type(self.target.model).__name__} has parameters that neither "
                f"{str(self.files.path)!r} nor an adapter holds ({', '.join(lost[:3])}"
                f"{', ...' if len(lost) > 3 else ''}); they would be written with random values. "
                "Pass another --architecture (architecture=...), or an adapter with that head."
            )

    def _check_shapes(self) -> None:
        for name, homes in self.homes.items():
            wanted = tuple(self.index.get(name).shape)
            for home in homes:
                info = self.files.info(home)
                if info.shape != wanted and name not in self.dense:
                    raise BaseMismatchError(
                        f"{home!r} has shape {info.shape} in {self.files.path} but "
                        f"{type(self.target.model).__name__} with its config.json has {wanted}; "
                        "the two do not belong together."
                    )
                if (name in self.touched or name in self.dense) and not info.is_floating:
                    raise CompositionError(
                        f"{home!r} is {info.dtype} in {self.files.path}; adapters are written into "
                        "floating weights only. Take the checkpoint it was quantised from."
                    )

    def _check_sets(self) -> None:
        """Check coefficients and contradictions of diffs that replace entries."""
        for name, parts in self.touched.items():
            if any(self.chosen[i].adapter.header(own).mode == "set" for i, own in parts):
                plan = self._plan(
                    name, self.target.live_dtype(self.files.info(self.homes[name][0]))
                )
                plan.check(self.coeffs, [loaded.name for loaded in self.chosen])

    def _check_contents(self, check_base: bool) -> None:
        """Compare fingerprints, and the copies of tied tensors; reads what the diffs touch."""
        casts: dict[str, list[str]] = {}
        quantised: dict[str, list[str]] = {}
        for name, parts in self.touched.items():
            first, *others = self.homes[name]
            for other in others:
                if not self.files.same_bytes(first, self.files, other):
                    raise CompositionError(
                        f"{first!r} and {other!r} are one tied parameter of "
                        f"{type(self.target.model).__name__}, but {self.files.path} holds them "
                        "with different values. Correct tie_word_embeddings in its config.json."
                    )
            wanted = [
                (self.chosen[i], own, print_)
                for i, own in parts
                if check_base
                and (whole := self.chosen[i].adapter.metadata.fingerprint) is not None
                and (print_ := whole.tensors.get(own)) is not None
            ]
            prints = self._fingerprints(first, {own for _, own, _ in wanted})
            for loaded, own, print_ in wanted:
                verdict = compare(print_, prints[own])
                if verdict == "different":
                    base = loaded.adapter.metadata.base_name
                    raise BaseMismatchError(
                        f"adapter {loaded.name!r} was made on another base"
                        f"{f' ({base})' if base else ''}: {own!r} was {print_}, the checkpoint has "
                        f"{prints[own]}. Take that base, or pass --no-check-base "
                        "(check_base=False) if you know that the two belong together."
                    )
                if verdict == "cast":
                    casts.setdefault(loaded.name, []).append(own)
                if verdict == "quantised":
                    quantised.setdefault(loaded.name, []).append(own)
        for adapter, names in quantised.items():
            warn_of_quantised(f"adapter {adapter!r}", names)
        for adapter, names in casts.items():
            logger.info(
                "adapter %r: %d base tensors are a cast of those it was made on (%s): accepted",
                adapter, len(names), names[0],
            )  # fmt: skip

    def _fingerprints(self, home: str, names: Collection[str]) -> dict[str, TensorFingerprint]:
        """Return one tensor's fingerprints under the names that adapters have for it: they seed the
        samples. The tensor is let go of on return, before the next is read.
        """
        tensor = self.files.read(home) if names else None
        return {} if tensor is None else {own: fingerprint_tensor(own, tensor) for own in names}

    # What the files will hold.

    def _new_dtype(self) -> torch.dtype:
        """Dtype of tensors that the base does not have: that which from_pretrained would choose."""
        if self.target.dtype is not None:
            return self.target.dtype
        floating = (i for n in self.files.names if (i := self.files.info(n)).is_floating)
        first = next(floating, None)
        return first.torch_dtype or torch.float32 if first is not None else torch.float32

    def _replacement(self, name: str, dtype: torch.dtype) -> Tensor:
        adapter, tensor = self.dense[name]
        cast = tensor.detach().cpu().to(dtype)
        fault = find_value_fault(cast)
        if fault is not None:
            raise CompositionError(
                f"adapter {adapter!r}: {name!r} does not fit {dtype}, the base's dtype; {fault}."
            )
        return cast

    def _plan_files(self) -> None:
        """Decide what each file holds, under which names; check that a dense tensor fits there."""
        added = [n for n in self.dense if n not in self.homes]
        # Under its own class and with nothing new, every tensor keeps its name in the files. Else
        # all get the model's: loaders of a headed model's files want one prefix throughout.
        renamed = added or not self.target.own
        names = {**self.places.parameters, **self.places.buffers} if renamed else {}
        gone = set() if self.target.own else set(self.places.nowhere)
        self.origin: dict[str, str] = {}  # name to be written -> name in the files
        self.layout: list[tuple[Shard, list[TensorInfo]]] = []
        for shard in self.files.shards:
            kept = []
            for info in shard.tensors.values():
                if info.name not in gone:
                    new = names.get(info.name, info.name)
                    if new in self.origin:
                        raise CompositionError(
                            f"{self.origin[new]!r} and {info.name!r} of {self.files.path} are both "
                            f"{new!r} in the model; one of them is left over from another save."
                        )
                    self.origin[new] = info.name
                    kept.append(self._as_live(info)._replace(name=new))
            self.layout.append((shard, kept))
        dtype = self._new_dtype()
        for name in added:
            shape = tuple(self.dense[name][1].shape)
            nbytes = self.dense[name][1].numel() * dtype.itemsize
            self.layout[-1][1].append(TensorInfo(name, dtype_name(dtype), shape, nbytes))
        self._reshape_replaced()
        for _, infos in self.layout:
            for info in infos:
                name = self._canonical(info.name)
                if name in self.dense and info.torch_dtype is not None:
                    self._replacement(name, info.torch_dtype)

    def _as_live(self, info: TensorInfo) -> TensorInfo:
        """Describe a stored tensor in the dtype in which the model has it."""
        if info.name not in self.places.parameters or not info.is_floating:
            return info
        dtype = self.target.live_dtype(info)
        return info._replace(dtype=dtype_name(dtype), nbytes=info.numel * dtype.itemsize)

    def _reshape_replaced(self) -> None:
        """A head of another size takes the place of the base's."""
        for _, infos in self.layout:
            for i, info in enumerate(infos):
                name = self._canonical(info.name)
                if name in self.dense and info.torch_dtype is not None:
                    tensor = self.dense[name][1]
                    nbytes = tensor.numel() * info.torch_dtype.itemsize
                    infos[i] = info._replace(shape=tuple(tensor.shape), nbytes=nbytes)

    def _canonical(self, written: str) -> str:
        """Return the canonical parameter behind a name to be written, "" if it is none."""
        if written not in self.origin:
            return written
        place = self.places.parameters.get(self.origin[written])
        return self.index.resolve(place) if place is not None else ""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(info.nbytes for _, infos in self.layout for info in infos)

    # Writing.

    def write(self, folder: Path) -> None:
        """Write the weights, and their index if there are several files, into an empty folder.

        Raises:
            CompositionError: no room on the disk; a sum overflows the base's dtype.
            OSError: writing failed.
        """
        free = shutil.disk_usage(folder).free
        if free < self.nbytes:
            raise CompositionError(
                f"{folder.parent} has {human_bytes(free)} free and the checkpoint takes "
                f"{human_bytes(self.nbytes)}; make room, or write elsewhere."
            )
        table: dict[str, str] = {}
        for shard, infos in self.layout:
            file = shard.file.name
            # Shards keep their names; a single file gets that which from_pretrained looks for.
            if self.files.index is None:
                file = "model.safetensors"
            elif not file.endswith(".safetensors"):
                file = f"{file.removesuffix('.bin').replace('pytorch_model', 'model')}.safetensors"
            ordered = aligned(infos)
            if ordered:
                write_safetensors(folder / file, ordered, shard.metadata, self._contents)
            table |= {info.name: file for info in ordered}
        if self.files.index is not None:
            atomic_write_json(folder / "model.safetensors.index.json", self._index_json(table))

    def _index_json(self, table: dict[str, str]) -> dict[str, Any]:
        old = (self.files.index or {}).get("metadata")
        metadata = dict(old) if isinstance(old, dict) else {}
        metadata["total_size"] = self.nbytes
        if isinstance(metadata.get("total_parameters"), int):
            before = sum(self.files.info(n).numel for n in self.files.names)
            after = sum(info.numel for _, infos in self.layout for info in infos)
            metadata["total_parameters"] += after - before
        return {"metadata": metadata, "weight_map": table}

    def _contents(self, info: TensorInfo) -> Iterator[memoryview]:
        name = self._canonical(info.name)
        if name in self.dense and info.torch_dtype is not None:
            return raw_pieces(self._replacement(name, info.torch_dtype))
        stored = self.files.info(self.origin[info.name])
        if name in self.touched:
            return raw_pieces(self._composed(name, stored, info.torch_dtype))
        if stored.dtype != info.dtype and info.torch_dtype is not None:
            return raw_pieces(self.files.read(stored.name).to(info.torch_dtype))
        return self.files.pieces(stored.name)

    def _composed(self, name: str, stored: TensorInfo, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor of the base with the adapters' entries written into it."""
        tensor = self.files.read(stored.name).to(dtype)
        plan = self._plan(name, tensor.dtype)
        rule = self.recipe.among(sum(1 for c in self.coeffs if c))
        compose_into_(tensor, plan, self.coeffs, rule)
        return tensor

    @property
    def skipped(self) -> dict[str, tuple[str, ...]]:
        """Adapter -> its tensors that have no place in the model."""
        pairs = zip(self.chosen, self.fits, strict=True)
        return {loaded.name: fit.skipped for loaded, fit in pairs if fit.skipped}


@torch.no_grad()
def compose_into_(
    tensor: Tensor,
    plan: TensorPlan,
    coeffs: Sequence[float],
    rule: Rule | Combine,
) -> None:
    """Write what a `Composer` writes: ``tensor[indices] = rn(base + sum)``, in place.

    Raises:
        CompositionError: the sum overflows.
    """
    made = plan.composed(gather_entries(tensor, plan.indices), coeffs, rule)
    write_entries_(tensor, plan.indices, made)
