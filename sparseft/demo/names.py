"""CLDR display names through Babel: a labelled, parallel, multilingual set that installs with pip.

A *name* says what one CLDR key is called in one language: territory ``FI`` is "Suomi" in Finnish,
language ``fi`` is "suomi", currency ``EUR`` is "euro". The task is to tell which of the three kinds
a name means. Keys are the same in all languages, so the set is parallel, and the split is by key: a
tested entity is seen in no language by anything.

Only names that a locale states itself are used, never those it inherits, so no language is padded
with English.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

from sparseft.errors import DataError

Split = Literal["train", "dev", "test"]
CATEGORIES: tuple[str, ...] = ("territory", "language", "currency")
SOURCE = "en"

# Held out of pre-training and of every choice made about the recipe; the first four are shown by
# `sparseft demo`, all ten by `sparseft demo --full`.
SHOWN: tuple[str, ...] = ("fi", "tr", "sw", "qu", "is", "lt", "vi", "so", "yo", "br")
# Held out of pre-training; the recipe was tuned on these and on nothing else.
DEV: tuple[str, ...] = ("cy", "hu", "eu", "jv", "sq", "ha", "zu", "uz", "sl", "mi", "ku")
HELD_OUT: frozenset[str] = frozenset(SHOWN + DEV)

# An 8,000-piece vocabulary spread over CLDR's 35 scripts would leave most languages spelled letter
# by letter; three related alphabets hold 170 of its 232 well covered locales and all the held-out
# ones.
SCRIPTS: tuple[str, ...] = ("LATIN", "CYRILLIC", "GREEK")
MIN_NAMES = 250
# Several locales repeat another one's names: `jmc`, `dav` and a dozen more are 30-70 % Swahili,
# `ceb` is 94 % English. A copy of a held-out language would break the hold-out, a copy of English
# teaches nothing.
MAX_COPIED_HELD_OUT = 0.30
MAX_COPIED_SOURCE = 0.60
# Large languages that a held-out one borrows from (Quechua from Spanish 36 %, Javanese from
# Indonesian 41 %): they are languages of their own, and real multilingual encoders have seen them
# too.
LENDERS: frozenset[str] = frozenset({"es", "id"})

_SECTIONS = {"territory": "territories", "language": "languages", "currency": "currency_names"}
_SPLIT_PERCENT: tuple[tuple[Split, int], ...] = (("train", 65), ("dev", 75), ("test", 100))


class NameKey(NamedTuple):
    """What a name names: its category and its CLDR key."""

    category: str
    key: str


def split_of(name_key: NameKey) -> Split:
    """Return the fixed split of a CLDR key.

    A territory and the currencies of the same country share a draw (``BR``, ``BRL``, ``BRZ``),
    because currency names spell the country out: "Brazilian real" in training would show the tested
    "Brazil".
    """
    if name_key.category == "language":
        group = f"language/{name_key.key}"
    else:
        group = f"country/{name_key.key[:2] if name_key.category == 'currency' else name_key.key}"
    draw = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") % 100
    return next(split for split, bound in _SPLIT_PERCENT if draw < bound)


@cache
def locale_data(locale: str) -> Mapping[str, Any]:
    """Return what CLDR states for one locale itself, without anything inherited.

    Raises:
        DataError: Babel has no such locale.
    """
    from babel import localedata

    if not localedata.exists(locale):
        raise DataError(f"Babel has no locale {locale!r}; `fi` or `sr_Latn` are of the form wanted")
    return localedata.load(locale, merge_inherited=False)


@cache
def _names(locale: str) -> dict[NameKey, str]:
    data = locale_data(locale)
    found: dict[NameKey, str] = {}
    for category, section in _SECTIONS.items():
        for key, text in sorted((data.get(section) or {}).items()):
            # "en_GB" is a variety of a language, not an entity of its own; aliases are not strings
            if isinstance(text, str) and text.strip() and "_" not in key:
                found[NameKey(category, key)] = normalise(text)
    return found


def names(locale: str, split: Split | None = None) -> dict[NameKey, str]:
    """Return the names that a locale states, by key, of one split or of all.

    Training names that read like a held-out name of the same language ("Samoa" the territory,
    "Samoa" the language) are left out, so that no tested string is trained on under another key.
    """
    everything = _names(locale)
    if split is None:
        return dict(everything)
    chosen = {key: text for key, text in everything.items() if split_of(key) == split}
    if split == "train":
        hidden = held_out_texts(locale)
        chosen = {key: text for key, text in chosen.items() if text.casefold() not in hidden}
    return chosen


@cache
def held_out_texts(locale: str) -> frozenset[str]:
    """Return a locale's dev and test names, case-folded."""
    return frozenset(t.casefold() for k, t in _names(locale).items() if split_of(k) != "train")


def normalise(text: str) -> str:
    """Return the text in NFC with single spaces, the form in which names are compared."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def script_of(texts: Iterable[str]) -> str:
    """Return the Unicode script word most letters of the texts begin with, e.g. ``"LATIN"``."""
    counts = Counter(
        unicodedata.name(char, "?").split()[0] for text in texts for char in text if char.isalpha()
    )
    return counts.most_common(1)[0][0] if counts else "?"


def copied_fraction(locale: str, other: str) -> float:
    """Return which part of ``other``'s own names (not the English ones) ``locale`` repeats."""
    mine, theirs, english = _names(locale), _names(other), _names(SOURCE)
    shared = [k for k in mine if k in theirs and (other == SOURCE or theirs[k] != english.get(k))]
    if len(shared) < 50:  # too few to say
        return 0.0
    return sum(mine[k].casefold() == theirs[k].casefold() for k in shared) / len(shared)


@lru_cache(maxsize=1)
def pretraining_locales() -> tuple[str, ...]:
    """Return the locales to pre-train on: well covered, in `SCRIPTS`, no copy of a held-out one."""
    from babel import localedata

    kept = []
    for locale in sorted(localedata.locale_identifiers()):
        language, *rest = locale.split("_")
        if language in HELD_OUT or len(rest) > 1 or (rest and len(rest[0]) != 4):
            continue  # held out, or a regional variety of a language that stands for itself
        if len(_names(locale)) < MIN_NAMES or script_of(_names(locale).values()) not in SCRIPTS:
            continue
        if locale != SOURCE and copied_fraction(locale, SOURCE) >= MAX_COPIED_SOURCE:
            continue
        if locale not in LENDERS and any(
            copied_fraction(locale, held_out) >= MAX_COPIED_HELD_OUT
            for held_out in sorted(HELD_OUT)
        ):
            continue
        kept.append(locale)
    return tuple(kept)


def names_digest(locales: Iterable[str]) -> str:
    """Return a digest of all names of the locales; Babel releases that agree share it."""
    table = {
        locale: {f"{k.category}/{k.key}": text for k, text in _names(locale).items()}
        for locale in sorted(locales)
    }
    blob = json.dumps(table, sort_keys=True, ensure_ascii=True).encode()
    return hashlib.blake2b(blob, digest_size=16).hexdigest()


def babel_version() -> str:
    """Return the version of the installed Babel; its data is part of the experiment."""
    from importlib.metadata import version

    return version("babel")
