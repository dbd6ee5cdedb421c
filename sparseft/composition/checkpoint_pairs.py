"""Two checkpoints of one model, tensor beside tensor, by the names the model gives them."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft.composition.checkpoint_target import Target, build_target, find_places
from sparseft.errors import BaseMismatchError, CompositionError
from sparseft.io.checkpoint_files import CheckpointFiles
from sparseft.io.checkpoint_shards import TensorInfo
from sparseft.io.configs import read_config
from sparseft.io.model_folder import find_model
from sparseft.modules import ParameterIndex
from sparseft.modules.prefixes import names_around

__all__ = ["Pair", "Side", "find_gaps", "open_side", "pair_up"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One parameter in both checkpoints.

    Args:
        name: canonical name in the tuned model.
        base, tuned: names in the files.
        base_dtype, tuned_dtype: of the parameter when each is loaded.
        numel: entries.
    """

    name: str
    base: str
    tuned: str
    base_dtype: torch.dtype
    tuned_dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints.

    Args:
        what: "base" or "tuned".
        files: its files.
        index: the model's parameters.
        parameters: canonical name -> names in the files, sorted by the first.
        others: tensors that are no floating parameters.
        target: what its configuration says of the class and the dtype; None where not known.
        architecture, id2label: what else it says.
    """

    what: str
    files: CheckpointFiles
    target: Target | None
    index: ParameterIndex
    parameters: dict[str, list[str]]
    others: list[str]
    architecture: str | None
    id2label: dict[str, str] | None

    def forms(self, name: str) -> Iterator[str]:
        """Yield the names that another checkpoint of this model may have for a parameter."""
        yield name
        for known in (name, *(self.index.aliases(name) if name in self.index else ())):
            if self.target is not None:
                yield from names_around(self.target.model, known)

    def dtype(self, info: TensorInfo) -> torch.dtype:
        """Return the dtype in which the model has a stored parameter."""
        if self.target is not None:
            return self.target.live_dtype(info)
        return info.torch_dtype or torch.float32

    def new_dtype(self) -> torch.dtype:
        """Return the dtype of what is put beside the stored parameters, as a merge chooses it."""
        if self.target is not None and self.target.dtype is not None:
            return self.target.dtype
        floating = (i for n in self.files.names if (i := self.files.info(n)).is_floating)
        return next((info.torch_dtype for info in floating if info.torch_dtype), torch.float32)

    def find(self, name: str) -> str | None:
        """Return the canonical name of the parameter called ``name`` elsewhere, None if the files
        have none.
        """
        for form in self.forms(name):
            found = self.index.resolve(form) if form in self.index else form
            if found in self.parameters:
                return found
        return None


def open_side(source: str | os.PathLike[str], what: str) -> Side:
    """Open a checkpoint: a folder, a name on the hub, or a file.

    Raises:
        CompositionError: not there, or not to be read.
    """
    path = Path(source).expanduser()
    path = path if path.is_file() else find_model(source, what)
    try:
        files = CheckpointFiles(path, what)
    except FileNotFoundError as bad:
        raise CompositionError(str(bad)) from bad
    target: Target | None = None
    config: dict[str, Any] = {}
    if (path / "config.json").is_file():
        config = read_config(path)
        try:
            target = build_target(path)
        except CompositionError as bad:
            logger.warning("%s: tied weights are not known, names are the files' (%s)", what, bad)
    model = target.model if target is not None else None
    index = ParameterIndex(model if model is not None else nn.Module())
    parameters: dict[str, list[str]] = {}
    if model is None:
        floating = [n for n in files.names if files.info(n).is_floating]
        parameters = {n: [n] for n in floating}
    else:
        for name, place in find_places(model, index, files.names).parameters.items():
            if files.info(name).is_floating:
                parameters.setdefault(index.resolve(place), []).append(name)
    named = {n for names in parameters.values() for n in names}
    labels = config.get("id2label")
    side = Side(
        what=what,
        files=files,
        target=target,
        index=index,
        parameters=dict(sorted(parameters.items())),
        others=[n for n in files.names if n not in named],
        architecture=next(iter(config.get("architectures") or ()), None),
        id2label={str(k): str(v) for k, v in labels.items()} if isinstance(labels, dict) else None,
    )
    _check_copies(side)
    return side


def _check_copies(side: Side) -> None:
    """Check that a tied parameter which is stored twice has one value."""
    for first, *rest in side.parameters.values():
        for other in rest:
            if not side.files.same_bytes(first, side.files, other):
                raise CompositionError(
                    f"{side.what}: {first!r} and {other!r} are one tied parameter, but the files "
                    "hold them with different values. Correct tie_word_embeddings in its "
                    "config.json."
                )


def pair_up(base: Side, tuned: Side, left_out: Collection[str]) -> tuple[list[Pair], list[str]]:
    """Return the parameters that both have, by canonical name, and those that only ``tuned`` has.

    Args:
        base, tuned: the checkpoints.
        left_out: names in ``tuned`` that are not looked at.

    Raises:
        BaseMismatchError: shapes that differ.
        CompositionError: weights tied in one of the two only; other tensors that differ.
    """
    pairs: list[Pair] = []
    only_tuned: list[str] = []
    seen: dict[str, str] = {}
    for name, homes in tuned.parameters.items():
        if name in left_out:
            continue
        found = next((f for form in tuned.forms(name) if (f := base.find(form))), None)
        if found is None:
            only_tuned.append(name)
            continue
        if found in seen:
            _refuse_tie(seen[found], name, "base", "tuned")
        seen[found] = name
        for alias in tuned.index.aliases(name) if name in tuned.index else ():
            other = base.find(alias)
            if other is not None and other != found:
                _refuse_tie(found, other, "tuned", "base")
        there, here = base.parameters[found][0], homes[0]
        old, new = base.files.info(there), tuned.files.info(here)
        if old.shape != new.shape:
            raise BaseMismatchError(_other_shape(name, old, new))
        pairs.append(Pair(name, there, here, base.dtype(old), tuned.dtype(new), new.numel))
    _check_others(base, tuned, left_out)
    if not pairs:
        raise CompositionError(
            f"{base.files.path} and {tuned.files.path} have no parameter in common; the first of "
            f"the tuned is {next(iter(tuned.parameters), None)!r}, of the base "
            f"{next(iter(base.parameters), None)!r}. Are they checkpoints of one model?"
        )
    return pairs, only_tuned


def find_gaps(
    base: Side,
    tuned: Side,
    pairs: Sequence[Pair],
    heads: Collection[str],
    left_out: Collection[str],
) -> dict[str, list[str]]:
    """Return why base + all differences, composed, would not be ``tuned``; empty if it would.

    Args:
        base, tuned: the checkpoints.
        pairs: from `pair_up`.
        heads: tensors that only ``tuned`` has and the diff holds whole.
        left_out: names in ``tuned`` that are not looked at; no gaps, as somebody wants it so.

    Returns:
        ``stay``: tensors of the base that ``tuned`` lacks and that the result has nonetheless;
        ``lost``: tensors of ``tuned`` that the result lacks; ``other_dtype``: those which the
        result holds in the base's dtype, not in their own. Only what is not empty, by these names.
    """
    met = {pair.base for pair in pairs}
    for name in left_out:
        found = next((f for form in tuned.forms(name) if (f := base.find(form))), None)
        met |= set(base.parameters[found]) if found is not None else {name}
    stay = [name for name, homes in base.parameters.items() if met.isdisjoint(homes)]
    stay += _without_namesakes(base.others, {*tuned.files.names, *left_out})
    # A head of another class leaves only what has a place in that class.
    other_class = heads and base.architecture and tuned.architecture != base.architecture
    if other_class and tuned.target is not None:
        nowhere = find_places(tuned.target.model, tuned.index, base.files.names).nowhere
        stay = [n for n in stay if not {n, *base.parameters.get(n, ())} & set(nowhere)]
    lost = _without_namesakes([n for n in tuned.others if n not in left_out], base.files.names)
    recast = [p.name for p in pairs if tuned.files.info(p.tuned).torch_dtype != p.base_dtype]
    new = base.new_dtype()
    recast += [n for n in heads if tuned.files.info(tuned.parameters[n][0]).torch_dtype != new]
    gaps = {"stay": stay, "lost": lost, "other_dtype": recast}
    return {what: sorted(names) for what, names in gaps.items() if names}


def _without_namesakes(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Return the names that are none of the others, with or without a prefix."""
    whole = set(others)
    tails = {tail for other in whole for tail in _tails(other)}
    return [n for n in names if n not in tails and whole.isdisjoint(_tails(n))]


def _tails(name: str) -> list[str]:
    """Return a dotted name and what is left of it as its first parts are cut off, one by one."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _refuse_tie(one: str, other: str, tied: str, untied: str) -> None:
    raise CompositionError(
        f"{one!r} and {other!r} are one tied weight in the {tied} checkpoint but two in the "
        f"{untied} one, so no adapter of the base can hold the change. Untie both (load the "
        f"{tied} with tie_word_embeddings=False, save it and diff that), or leave one of the two "
        "out: --exclude (exclude=[...])."
    )


def _other_shape(name: str, old: TensorInfo, new: TensorInfo) -> str:
    said = (
        f"{name!r} has shape {list(old.shape)} in the base but {list(new.shape)} in the tuned "
        "checkpoint; a diff needs one shape. "
    )
    if len(old.shape) == len(new.shape) == 2 and old.shape[1] == new.shape[1]:
        said += (
            f"For a vocabulary that grew, resize the base first "
            f"(model.resize_token_embeddings({new.shape[0]}), save_pretrained) and diff against "
            "that. "
        )
    return f"{said}--exclude (exclude={name!r}) leaves the tensor out."


def _check_others(base: Side, tuned: Side, left_out: Collection[str]) -> None:
    """Refuse differences in what no diff can hold: buffers, integers, tensors that are fused."""
    for name in tuned.others:
        if name in left_out or name not in base.files:
            continue
        if not tuned.files.same_bytes(name, base.files, name):
            raise CompositionError(
                f"{name!r} ({tuned.files.info(name).dtype}) differs between the checkpoints, and "
                "is no floating parameter of the model as transformers builds it (a buffer, a "
                f"quantised weight, a tensor that is fused with others): no diff can hold it. "
                f"--exclude (exclude={name!r}) leaves it out."
            )
