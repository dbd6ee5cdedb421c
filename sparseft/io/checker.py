"""Typed getters for JSON that an enemy may have written; every refusal names the file."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from sparseft.errors import AdapterFormatError

__all__ = ["Checker", "kind", "short"]

MAX_DIMS = 64  # torch's own limit


class Checker:
    """Raises with the file's name in front; small typed getters for JSON."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, message: str) -> NoReturn:
        raise AdapterFormatError(f"{self.source}: {message}")

    def json(self, text: str, what: str) -> Any:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in pairs:
                if key in found:
                    raise ValueError(f"key {key[:60]!r} appears twice")
                found[key] = value
            return found

        def constant(token: str) -> NoReturn:
            raise ValueError(f"{token} is not JSON")

        try:
            document = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
            if "\\u" in text:  # only an escape can spell half of a surrogate pair
                json.dumps(document, ensure_ascii=False).encode("utf-8")
            return document
        except RecursionError:
            self.fail(f"{what} is nested too deeply; the file is damaged or hostile.")
        except ValueError as bad:
            self.fail(f"{what} is not valid JSON ({bad}); the file is damaged or hostile.")

    def object(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{what} is {kind(value)}, wanted an object.")
        return value

    def fields(self, value: Any, wanted: tuple[str, ...], what: str) -> dict[str, Any]:
        """An object with exactly these keys."""
        found = self.object(value, what)
        missing = [k for k in wanted if k not in found]
        if missing:
            self.fail(f"{what} lacks {missing[0]!r}; wanted {', '.join(wanted)}.")
        extra = sorted(set(found) - set(wanted))
        if extra:
            self.fail(f"{what} has an unknown field {extra[0]!r}; wanted {', '.join(wanted)}.")
        return found

    def string(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            self.fail(f"{what} is {kind(value)}, wanted a string.")
        return value

    def integer(self, value: Any, what: str, low: int = 0, high: int = 2**63 - 1) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(f"{what} is {kind(value)}, wanted an integer.")
        if not low <= value <= high:
            self.fail(f"{what} is {short(value)}, wanted {low} to {high}.")
        return value

    def number(self, value: Any, what: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"{what} is {kind(value)}, wanted a number.")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.fail(f"{what} is out of range, wanted a finite number.")
        return number

    def shape(self, value: Any, what: str) -> tuple[int, ...]:
        if not isinstance(value, list):
            self.fail(f"shape of {what} is {kind(value)}, wanted a list of integers.")
        if len(value) > MAX_DIMS:
            self.fail(f"shape of {what} has {len(value)} dimensions, wanted at most {MAX_DIMS}.")
        shape = tuple(self.integer(v, f"shape of {what}") for v in value)
        if math.prod(shape) > 2**63 - 1:
            self.fail(f"shape {list(shape)} of {what} overflows: more than 2**63 - 1 entries.")
        return shape

    def digest(self, value: Any, what: str) -> str:
        text = self.string(value, f"digest of {what}")
        if len(text) != 32 or set(text) - set("0123456789abcdef"):
            self.fail(f"digest of {what} is {short(text)!r}, wanted 32 lower-case hex digits.")
        return text


def kind(value: Any) -> str:
    """Return what ``value`` is, in JSON's words; of a number also which."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    known = names.get(type(value))
    return known if known is not None else f"{type(value).__name__} {short(value)}"


def short(value: Any) -> str:
    """Return ``value`` as text that fits into a message."""
    text = str(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."
