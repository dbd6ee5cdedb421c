"""Language codes, their names, and groups of them, as data: ``languages.yaml``, or your own.

A language may be written by its code (``ban``), its name (``Balinese``) or any other spelling in
the file (a folder name, an ISO twin such as ``en`` for ``eng``); a group (``nusax``) stands for its
members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparseft._text import did_you_mean
from sparseft.errors import DataError, UnknownNameError

__all__ = ["Languages", "builtin_languages", "load_languages"]

_BUILTIN = Path(__file__).with_name("languages.yaml")


def _key(text: str) -> str:
    return text.strip().casefold().replace(" ", "_").replace("-", "_")


@dataclass(frozen=True)
class Languages:
    """Codes with their names and spellings, and groups of codes.

    Args:
        names: code -> (name, other spellings...).
        groups: group -> codes or other groups, in the order they are reported.
    """

    names: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spellings: dict[str, str] = {}
        for code, others in self.names.items():
            if not others:
                raise DataError(f"language {code!r} has no name; write e.g. {code}: [Name].")
            for text in (code, *others):
                owner = spellings.setdefault(_key(text), code)
                if owner != code:
                    raise DataError(
                        f"{text!r} is a spelling of both language {owner!r} and {code!r}; keep one."
                    )
        object.__setattr__(self, "_spellings", spellings)
        for group in self.groups:
            if _key(group) in spellings:
                raise DataError(f"{group!r} is both a group and a language; rename the group.")
            self.expand([group])

    def code(self, text: str) -> str:
        """Return the code of a language written in any known spelling.

        Raises:
            UnknownNameError: no such language; the message lists the nearest.
        """
        spellings: dict[str, str] = self._spellings  # type: ignore[attr-defined]
        try:
            return spellings[_key(text)]
        except KeyError:
            raise UnknownNameError(
                f"unknown language {text!r}.{did_you_mean(_key(text), spellings)} "
                "Add it to a YAML file of languages if it is new."
            ) from None

    def name(self, code: str) -> str:
        """Return the English name of a language; an unknown spelling stands for itself."""
        spellings: dict[str, str] = self._spellings  # type: ignore[attr-defined]
        known = spellings.get(_key(code))
        return code if known is None else self.names[known][0]

    def spellings(self, code: str) -> tuple[str, ...]:
        """Return every spelling of a language, its code first (an unknown code: itself)."""
        return (code, *self.names.get(code, ()))

    def same(self, a: str, b: str) -> bool:
        """Return whether two spellings mean one language (unknown ones compare as text)."""
        spellings: dict[str, str] = self._spellings  # type: ignore[attr-defined]
        return spellings.get(_key(a), _key(a)) == spellings.get(_key(b), _key(b))

    def expand(self, items: Iterable[str]) -> list[str]:
        """Return the codes that languages and groups stand for, in order, each once.

        Raises:
            UnknownNameError: neither a language nor a group.
            DataError: a group that contains itself.
        """
        out: dict[str, None] = {}
        for item in items:
            for code in self._members(item, ()):
                out[code] = None
        return list(out)

    def _members(self, item: str, above: tuple[str, ...]) -> list[str]:
        if item in above:
            raise DataError(f"group {item!r} contains itself ({' -> '.join((*above, item))}).")
        if item in self.groups:
            return [c for m in self.groups[item] for c in self._members(m, (*above, item))]
        if _key(item) not in self._spellings:  # type: ignore[attr-defined]
            known = [*self.groups, *self._spellings]  # type: ignore[attr-defined]
            inside = f" (in group {above[-1]!r})" if above else ""
            raise UnknownNameError(
                f"{item!r}{inside} is neither a language nor a group.{did_you_mean(item, known)} "
                f"Groups: {', '.join(self.groups)}."
            )
        return [self.code(item)]


def _parse(path: Path, content: Any) -> tuple[dict[str, tuple[str, ...]], dict[str, Any]]:
    if content is None:
        content = {}
    if not isinstance(content, dict) or (unknown := set(content) - {"languages", "groups"}):
        got = sorted(unknown) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path}: only the keys 'languages' and 'groups' are read, got {got}. "
            "Write e.g. groups: {mine: [ban, min]}."
        )
    parts = []
    for section in ("languages", "groups"):
        entries = content.get(section) or {}
        if not isinstance(entries, dict):
            raise DataError(f"{path}: {section} must map names to lists, got {entries!r}.")
        for name, members in entries.items():
            words = members if isinstance(members, list) else [members]
            # YAML reads a bare `no` (Norwegian) as false.
            if bad := [w for w in [name, *words] if not isinstance(w, str)]:
                raise DataError(
                    f"{path}: {section}.{name} holds {bad[0]!r}, which YAML does not read as text; "
                    "quote it."
                )
        parts.append({n: tuple(m if isinstance(m, list) else [m]) for n, m in entries.items()})
    return parts[0], parts[1]


def load_languages(path: str | Path) -> Languages:
    """Return the built-in languages and groups with those of a YAML file added or replaced.

    Raises:
        DataError: a file that is missing, not YAML, or of another shape.
    """
    path = Path(path)
    names, groups = dict(builtin_languages().names), dict(builtin_languages().groups)
    more_names, more_groups = _read(path)
    return Languages({**names, **more_names}, {**groups, **more_groups})


def _read(path: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, Any]]:
    import yaml

    try:
        return _parse(path, yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of languages.") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({error}).") from None


@lru_cache(maxsize=1)
def builtin_languages() -> Languages:
    """Return the languages and groups that ship with sparseft."""
    return Languages(*_read(_BUILTIN))
