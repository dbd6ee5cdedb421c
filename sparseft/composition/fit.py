"""Does an adapter belong on this model? Names, shapes, the base's fingerprint; only read."""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import nn

from sparseft._text import did_you_mean
from sparseft.adapter import Adapter
from sparseft.diff import VALUE_DTYPES
from sparseft.errors import BaseMismatchError, CompositionError, UnknownNameError
from sparseft.fingerprint import TensorFingerprint, compare
from sparseft.modules import ParameterIndex
from sparseft.modules.dequantise import scheme_of
from sparseft.modules.fingerprint import fingerprint_base, warn_of_quantised
from sparseft.modules.prefixes import find_name, names_around

__all__ = ["Dense", "Fit", "Fitter", "Loaded", "Missing"]

logger = logging.getLogger(__name__)

Missing = Literal["auto", "error", "skip"]
Dense = Literal["auto", "require", "skip"]


class Loaded:
    """An adapter under the name it has in a composer; its digest is computed once."""

    def __init__(self, name: str, adapter: Adapter) -> None:
        self.name = name
        self.adapter = adapter

    @classmethod
    def opened(
        cls, name: str, adapter: Adapter | str | os.PathLike[str], known: Container[str]
    ) -> Loaded:
        """Return an adapter, its path's or its hub name's, under a new name.

        Raises:
            CompositionError: no name, a name that is among ``known``, or no kind of adapter.
            FileNotFoundError, AdapterFormatError: as in `Adapter.load`.
        """
        if not isinstance(name, str) or not name:
            raise CompositionError(f"{name!r} cannot name an adapter; wanted a non-empty string.")
        if name in known:
            raise CompositionError(
                f"an adapter called {name!r} is here already; remove({name!r}) first, or choose "
                "another name."
            )
        if not isinstance(adapter, Adapter | str | os.PathLike):
            raise CompositionError(
                f"adapter {name!r} is {type(adapter).__name__}, wanted an Adapter, a path or a "
                "name on the hub."
            )
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter, check="lazy")
        return cls(name, adapter)

    @cached_property
    def digest(self) -> str:
        return self.adapter.digest

    @property
    def order(self) -> tuple[str, str, str]:
        """Place in the canonical order; what a composer calls it only separates equal contents."""
        return self.adapter.name, self.digest, self.name


@dataclass(frozen=True)
class Fit:
    """Where the tensors of one adapter go in one model.

    Args:
        diffs: canonical parameter name -> the adapter's name of the diff.
        dense: the same for dense tensors.
        skipped: the adapter's tensors that have no place in the model.
    """

    diffs: dict[str, str]
    dense: dict[str, str]
    skipped: tuple[str, ...]


def check_choice(what: str, value: str, kind: object) -> None:
    """Raise unless ``value`` is one of the literals of ``kind``."""
    choices = get_args(kind)
    if value not in choices:
        raise CompositionError(
            f"{what}={value!r} is not one of {', '.join(map(repr, choices))}."
            f"{did_you_mean(str(value), choices)}"
        )


class Fitter:
    """Fits adapters to one model; remembers the fingerprints of its base tensors.

    Args:
        model: the model.
        missing: what to do with diffs of parameters that the model does not have.
        dense: what to do with dense tensors.
        check_base: compare fingerprints.
    """

    def __init__(
        self, model: nn.Module, *, missing: Missing, dense: Dense, check_base: bool
    ) -> None:
        check_choice("missing", missing, Missing)
        check_choice("dense", dense, Dense)
        self.model = model
        self.missing = missing
        self.dense = dense
        self.check_base = check_base
        self.index = ParameterIndex(model)
        prefix = getattr(model, "base_model_prefix", "")
        self._prefix = f"{prefix}." if isinstance(prefix, str) and prefix else ""
        every = [n for name in self.index.names for n in (name, *self.index.aliases(name))]
        self._parts = {self._part(name) for name in every}
        self._prints: dict[tuple[str, str], TensorFingerprint] = {}

    def _part(self, name: str) -> str:
        """Return the large part of a model a name lies in: ``lm_head``, ``roberta.encoder``."""
        inside = name.removeprefix(self._prefix) if self._prefix else name
        part = inside.partition(".")[0]
        return name if part == inside else name[: len(name) - len(inside)] + part

    def replaced(self, names: Iterable[str]) -> list[str]:
        """Return those names whose parameter is no longer part of the model.

        The whole model is asked, because modules are replaced, too (a resized embedding).
        """
        # By hand: `Module.parameters` takes ten times as long, at every switch.
        there: set[int] = set()
        modules, seen = [self.model], {id(self.model)}
        while modules:
            module = modules.pop()
            there.update(map(id, module._parameters.values()))
            for child in module._modules.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    modules.append(child)
        return [name for name in names if id(self.index.get(name)) not in there]

    def fit(self, loaded: Loaded) -> Fit:
        """Find the place of every tensor and check shapes and base.

        Raises:
            UnknownNameError: the model lacks a parameter, and ``missing`` does not allow that.
            BaseMismatchError: a parameter of another shape, or another base.
            CompositionError: two of its tensors are one tied parameter.
        """
        adapter, skipped = loaded.adapter, []
        places: dict[str, dict[str, str]] = {"diff": {}, "dense tensor": {}}
        seen: dict[str, str] = {}
        tensors = [("diff", n, tuple(adapter.header(n).shape)) for n in adapter.names]
        if self.dense != "skip":
            tensors += [("dense tensor", n, tuple(t.shape)) for n, t in adapter.dense.items()]
        for kind, own, shape in tensors:
            found = find_name(self.model, own, self.index.__contains__)
            if found is None:
                self._check_skippable(loaded, kind, own)
                skipped.append(own)
                continue
            name = self.index.resolve(found)
            if name in seen:
                raise CompositionError(
                    f"adapter {loaded.name!r} has tensors for {seen[name]!r} and {own!r}, which "
                    f"are one parameter in this model ({name!r}, tied); keep one of them."
                )
            seen[name] = own
            self._check_shape(loaded, kind, own, shape, name)
            places[kind][name] = own
        fit = Fit(places["diff"], places["dense tensor"], tuple(skipped))
        if skipped:
            if not fit.diffs and adapter.names:
                raise UnknownNameError(
                    f"none of the {len(adapter.names)} parameters of adapter {loaded.name!r} is in "
                    f"the model; the first is {skipped[0]!r}."
                    f"{did_you_mean(skipped[0], self.index.names)} Is it an adapter of this base?"
                )
            logger.warning(
                "adapter %r: %d of %d tensors have no place in the model and are left out (%s%s)",
                loaded.name, len(skipped), len(tensors), ", ".join(skipped[:3]),
                ", ..." if len(skipped) > 3 else "",
            )  # fmt: skip
        if self.check_base:
            self._check_base(loaded, fit)
        return fit

    def _check_skippable(self, loaded: Loaded, kind: str, own: str) -> None:
        if kind == "dense tensor":
            if self.dense == "auto":
                return
            fix = "dense='auto' leaves out heads that the model does not have."
        else:
            # The usual case: a language adapter, trained under a masked-LM head, on a classifier.
            forms = names_around(self.model, own)
            absent = "." in own and all(self._part(form) not in self._parts for form in forms)
            if self.missing == "skip" or (self.missing == "auto" and absent):
                return
            fix = "missing='skip' (--missing skip) leaves out every tensor without a place."
        raise UnknownNameError(
            f"adapter {loaded.name!r} has a {kind} of {own!r}, which the model does not have."
            f"{did_you_mean(own, self.index.names)} {fix}"
        )

    def _check_shape(
        self, loaded: Loaded, kind: str, own: str, shape: tuple[int, ...], name: str
    ) -> None:
        parameter = self.index.get(name)
        scheme = scheme_of(*self.index.owners(name)[0])
        if scheme is not None:
            raise CompositionError(
                f"adapter {loaded.name!r}: {own!r} is quantised ({scheme}) in this model, and "
                "nothing is merged into quantised storage. Run adapters beside it: "
                "SeparateComposer(model, adapters). For a plain model with one in: "
                "attach(model, adapter).save_merged(folder), or .merged_state_dict()."
            )
        if tuple(parameter.shape) != shape:
            fix = "Load the model it was trained on"
            if kind == "dense tensor":
                fix += ", or in Python pass dense='skip' to leave the model's own"
            raise BaseMismatchError(
                f"adapter {loaded.name!r}: the {kind} of {own!r} has shape {shape} but the model's "
                f"parameter has {tuple(parameter.shape)}. {fix}."
            )
        if parameter.dtype not in VALUE_DTYPES:
            raise CompositionError(
                f"adapter {loaded.name!r}: {own!r} is {parameter.dtype} in this model; adapters "
                f"are written into {', '.join(str(d).removeprefix('torch.') for d in VALUE_DTYPES)}"
                " weights only. Load the model unquantised, or use SeparateComposer."
            )
        if any(n > 1 and s == 0 for n, s in zip(parameter.shape, parameter.stride(), strict=True)):
            raise CompositionError(
                f"adapter {loaded.name!r}: the elements of {own!r} share memory in this model (an "
                "expanded tensor), so single entries cannot be written. Make it contiguous."
            )

    def _check_base(self, loaded: Loaded, fit: Fit) -> None:
        fingerprint = loaded.adapter.metadata.fingerprint
        if fingerprint is None:
            return
        casts: list[str] = []
        requantised: list[str] = []
        for name, own in fit.diffs.items():
            wanted = fingerprint.tensors.get(own)
            if wanted is None:
                continue
            # The positions of the samples are seeded by the name on file.
            key = (name, own)
            if key not in self._prints:
                with torch.no_grad():
                    self._prints[key] = fingerprint_base(self.index, name, own)
            verdict = compare(wanted, self._prints[key])
            if verdict == "different":
                base = loaded.adapter.metadata.base_name
                raise BaseMismatchError(
                    f"adapter {loaded.name!r} was made on another base"
                    f"{f' ({base})' if base else ''}: {own!r} was {wanted}, the model has "
                    f"{self._prints[key]}. Load that base, or pass check_base=False "
                    "(--no-check-base) if you know that the two belong together."
                )
            if verdict == "cast":
                casts.append(own)
            if verdict == "quantised":
                requantised.append(own)
        if requantised:
            warn_of_quantised(f"adapter {loaded.name!r}", requantised)
        if casts:
            logger.info(
                "adapter %r: %d base tensors are a cast of those it was made on (%s): accepted",
                loaded.name, len(casts), casts[0],
            )  # fmt: skip
