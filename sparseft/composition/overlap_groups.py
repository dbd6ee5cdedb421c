"""Which layer a parameter belongs to, read from its name; and a grid of kinds by layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from sparseft._text import did_you_mean
from sparseft.errors import UnknownNameError

__all__ = ["Groups", "group_tensors", "kind_and_layer", "layer_of", "natural_key"]

# "layer", "tensor", patterns with their names, or patterns alone.
Groups: TypeAlias = str | Mapping[str, str | Sequence[str]] | Sequence[str]


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Return a key that sorts ``layer.10`` after ``layer.2``; no two names share it."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p)) if p.isdecimal() else (1, p) for p in parts if p], name


def layer_of(name: str) -> str:
    """Return the part of a model that a parameter lies in.

    Down to the first number, if there is one: ``roberta.encoder.layer.3.output.dense.weight`` is in
    ``roberta.encoder.layer.3``. Else without the last two parts, as long as one is left:
    ``roberta.embeddings.LayerNorm.weight`` is in ``roberta.embeddings``.
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-2] or parts[:-1] or parts)


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """Return (name with ``*`` for its first number, that number); the name and None without one."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join([*parts[:i], "*", *parts[i + 1 :]]), int(part)
    return name, None


def group_tensors(names: Iterable[str], by: Groups) -> dict[str, list[str]]:
    """Return group -> its tensors, in natural order of names.

    Args:
        names: all tensors.
        by: "tensor" (each alone), "layer" (`layer_of`), a pattern with ``*``, patterns, or name of
            the group -> pattern or patterns. A tensor that several groups match is in each.

    Raises:
        UnknownNameError: a pattern that matches nothing; the message has the nearest names.
    """
    names = sorted(names, key=natural_key)
    if by == "tensor":
        return {name: [name] for name in names}
    groups: dict[str, list[str]] = {}
    if by == "layer":
        for name in names:
            groups.setdefault(layer_of(name), []).append(name)
        return groups
    if isinstance(by, str):
        by = [by]
    wanted = by if isinstance(by, Mapping) else {pattern: pattern for pattern in by}
    for group, given in wanted.items():
        patterns = [given] if isinstance(given, str) else list(given)
        for pattern in patterns:
            near = did_you_mean(pattern, ["layer", "tensor", *names])
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UnknownNameError(
                    f"no tensor's name matches {pattern!r}.{near} The first of "
                    f"{len(names)} is {names[0] if names else 'none'!r}."
                )
        groups[group] = [n for n in names if any(fnmatchcase(n, p) for p in patterns)]
    return groups
