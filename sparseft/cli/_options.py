"""``KEY=VALUE`` words for a registered function, read as the types its signature declares."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from sparseft._registry import Registered
from sparseft.errors import CompositionError

__all__ = ["list_options", "parse_options"]

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_options(words: Sequence[str], entry: Registered) -> dict[str, Any]:
    """Return the options that ``words`` give to a registered function.

    Keys that it does not have are passed on as text: its registry names them, with the nearest.

    Raises:
        CompositionError: a word without ``=``, a key twice, or a value of another type.
    """
    hints = _hints(entry.fn)
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise CompositionError(f"--option {word!r} is no KEY=VALUE, e.g. --option density=0.2.")
        if key in given:
            raise CompositionError(f"--option {key} is given twice.")
        kind = hints.get(key, str)
        try:
            given[key] = _parse(text.strip(), kind)
        except ValueError:
            raise CompositionError(
                f"--option {key}={text}: {entry.name!r} wants {_say(kind)} there."
            ) from None
    return given


def list_options(entry: Registered) -> str:
    """Return ``density: a number = 0.2, ...`` for help texts; "" for a method without options."""
    hints = _hints(entry.fn)
    return ", ".join(
        f"{name}: {_say(hints.get(name, str))}"
        + ("" if default is inspect.Parameter.empty else f" = {default}")
        for name, default in entry.options.items()
    )


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(fn)
    except (NameError, TypeError):  # annotations of names that exist for type checkers only
        return {}


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, None last, so that text is read as anything else first."""
    members = [m for m in get_args(kind) if m is not type(None)]
    return (*members, type(None)) if type(None) in get_args(kind) else tuple(members)


def _parse(text: str, kind: Any) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        # None by its name only, or an optional text could never be "none".
        if text.lower() == "none" and type(None) in get_args(kind):
            return None
        for member in _choices(kind):
            try:
                return _parse(text, member)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        found = next((c for c in get_args(kind) if str(c) == text), None)
        if found is None:
            raise ValueError
        return found
    if isinstance(origin, type) and issubclass(origin, Sequence):
        inner = get_args(kind)[0]
        return [_parse(part.strip(), inner) for part in text.split(",")]
    if kind is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError
        return text.lower() in _TRUE
    if kind in (int, float):
        return kind(text)
    if kind is type(None):
        raise ValueError
    return text


def _say(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_say(m) for m in _choices(kind))
    if origin is Literal:
        return " or ".join(map(str, get_args(kind)))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"{_say(get_args(kind)[0])}, comma-separated"
    names = {bool: "true or false", int: "an integer", float: "a number", type(None): "none"}
    return names.get(kind, "text")
