"""Raw, unlabelled text in the languages of CLDR: names, and what CLDR's own patterns make of them.

A line of text is a bare name ("Suomi"), another CLDR string ("tammikuuta", "sanaa minuutissa",
"Etelä-Afrikan aika") or a phrase as software displays it: a locale ("ruotsi (Suomi)"), a clock
("aikavyöhyke: Suomi"), an amount ("12 euroa"). Nothing but the training keys of `names` appears,
and a line that spells out a held-out name is dropped. Kinds are mixed and shuffled: nothing tells
which lines are territories.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from sparseft.demo.names import (
    SOURCE,
    NameKey,
    held_out_texts,
    locale_data,
    names,
    normalise,
    split_of,
)

# Sections of CLDR that hold plain strings, with the path prefix to keep inside each ("" = all of
# it).
_STRING_SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("scripts", ()),
    ("variants", ()),
    ("months", ("wide",)),
    ("days", ("wide",)),
    ("quarters", ("wide",)),
    ("eras", ("wide",)),
    ("day_periods", ("wide",)),
    ("date_fields", ()),
    ("unit_display_names", ("long",)),
    ("unit_patterns", ("long",)),
    ("time_zones", ("city", "long")),
    ("meta_zones", ("long",)),
    ("measurement_systems", ()),
)
_SHORTEST_HIDDEN = 4  # shorter held-out names occur inside ordinary words


def _strings(node: Any, keep: tuple[str, ...], inside: bool) -> Iterator[str]:
    """Yield the strings below a node, those under one of the keys in ``keep`` if it names any."""
    if isinstance(node, str):
        if inside:
            yield node
    elif isinstance(node, Mapping):
        for key in sorted(node, key=str):
            yield from _strings(node[key], keep, inside or key in keep)


def _fill(pattern: str, *parts: str) -> str | None:
    """Return a CLDR pattern ("{0} ja {1}" or "aika: %s") filled in, None if other gaps remain."""
    filled = pattern.replace("%s", "{0}")
    for position, part in enumerate(parts):
        gap = f"{{{position}}}"
        if gap not in filled:
            return None
        filled = filled.replace(gap, part, 1)
    return None if "{" in filled or "}" in filled else normalise(filled)


@cache
def _hidden_parts(locale: str) -> frozenset[str]:
    hidden = held_out_texts(locale) | held_out_texts(SOURCE)
    return frozenset(text for text in hidden if len(text) >= _SHORTEST_HIDDEN)


def spells_held_out(text: str, locale: str) -> bool:
    """Return whether a line contains a dev or test name of its language or of English."""
    folded = text.casefold()
    if folded in held_out_texts(locale):
        return True
    return any(hidden in folded for hidden in _hidden_parts(locale))


def other_strings(locale: str, *, seed: int = 0) -> list[str]:
    """Return the locale's other CLDR strings (units, months, time zones, ...), without repeats."""
    rng = random.Random(f"strings/{locale}/{seed}")
    data = locale_data(locale)
    found: dict[str, None] = {}
    for section, keep in _STRING_SECTIONS:
        for raw in _strings(data.get(section) or {}, keep, not keep):
            text = _fill(raw, str(rng.randint(2, 99))) if "{" in raw else normalise(raw)
            if text and len(text) > 1 and any(char.isalpha() for char in text):
                found.setdefault(text)
    return [text for text in found if not spells_held_out(text, locale)]


def phrases(locale: str, count: int, *, seed: int = 0) -> list[str]:
    """Return up to ``count`` phrases that CLDR's patterns make of training names, in random order.

    Args:
        locale: CLDR locale, e.g. ``"fi"``.
        count: how many are drawn; repeats and lines that spell a held-out name are then dropped.
        seed: fixes the draw.
    """
    rng = random.Random(f"phrases/{locale}/{seed}")
    data = locale_data(locale)
    train = names(locale, "train")
    by_kind = {
        kind: [text for key, text in train.items() if key.category == kind]
        for kind in ("territory", "language", "currency")
    }
    scripts = [s for s in (data.get("scripts") or {}).values() if isinstance(s, str)]
    region = (data.get("zone_formats") or {}).get("region")
    amounts = {key.key: text for key, text in train.items() if key.category == "currency"}
    for key, forms in sorted((data.get("currency_names_plural") or {}).items()):
        plural = forms.get("other") if isinstance(forms, Mapping) else None
        if isinstance(plural, str) and split_of(NameKey("currency", key)) == "train":
            amounts[key] = plural
    kinds = [
        kind
        for kind, present in (
            ("locale", by_kind["language"] and by_kind["territory"]),
            ("script", by_kind["language"] and scripts),
            ("clock", by_kind["territory"] and isinstance(region, str)),
            ("amount", amounts),
        )
        if present
    ]
    made: dict[str, None] = {}
    for _ in range(count if kinds else 0):
        kind = rng.choice(kinds)
        text: str | None
        if kind == "locale":
            text = f"{rng.choice(by_kind['language'])} ({rng.choice(by_kind['territory'])})"
        elif kind == "script":
            text = f"{rng.choice(by_kind['language'])} ({rng.choice(scripts)})"
        elif kind == "clock":
            text = _fill(str(region), rng.choice(by_kind["territory"]))
        else:
            text = f"{rng.randint(2, 999)} {rng.choice(sorted(amounts.values()))}"
        if text:
            made.setdefault(normalise(text))
    return [text for text in made if not spells_held_out(text, locale)]


def enumerations(locale: str, count: int, *, seed: int = 0) -> list[str]:
    """Return up to ``count`` lines such as "Ruotsi, Islanti ja Tanska", by the list pattern."""
    rng = random.Random(f"enumerations/{locale}/{seed}")
    standard = (locale_data(locale).get("list_patterns") or {}).get("standard")
    patterns = standard if isinstance(standard, Mapping) else {}
    pair = patterns.get("2") if isinstance(patterns.get("2"), str) else "{0}, {1}"
    end = patterns.get("end") if isinstance(patterns.get("end"), str) else pair
    train = names(locale, "train")
    pools = [
        pool
        for kind in ("territory", "language", "currency")
        if len(pool := [text for key, text in train.items() if key.category == kind]) >= 4
    ]
    made: dict[str, None] = {}
    for _ in range(count if pools else 0):
        members = rng.sample(rng.choice(pools), rng.randint(2, 4))
        pattern = str(pair if len(members) == 2 else end)
        line = _fill(pattern, ", ".join(members[:-1]), members[-1])
        if line:
            made.setdefault(line)
    return list(made)


def raw_text(locale: str, *, phrase_count: int = 600, seed: int = 0) -> list[str]:
    """Return a language's raw text: all training names, other strings and phrases, shuffled."""
    lines = dict.fromkeys(names(locale, "train").values())
    lines.update(dict.fromkeys(other_strings(locale, seed=seed)))
    lines.update(dict.fromkeys(phrases(locale, phrase_count, seed=seed)))
    shuffled = list(lines)
    random.Random(f"raw/{locale}/{seed}").shuffle(shuffled)
    return shuffled
