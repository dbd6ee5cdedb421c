"""The pre-training stream: which sequences a step sees, as a function of (seed, step) alone.

Four kinds of sequence are mixed: bare names and other CLDR strings, phrases, enumerations, and
*pairs*: the same key named in two pre-training languages, side by side (translation language
modelling), which aligns the languages. Steps are drawn in blocks of `BLOCK` batches; a block is
sorted by length, so that batches hardly pad, and dealt out in random order. A resumed run draws the
block of its step again and goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparseft.demo.encoder import MAX_TOKENS
from sparseft.demo.names import SOURCE, NameKey, names
from sparseft.demo.text import enumerations, other_strings, phrases
from sparseft.demo.tokenizer import BOS_ID, EOS_ID, MASK_ID, PAD_ID, SPECIAL_TOKENS

BLOCK = 16
# Share of each kind of sequence.
MIXTURE: dict[str, float] = {
    "name": 0.25,
    "string": 0.12,
    "phrase": 0.20,
    "list": 0.13,
    "pair": 0.30,
}
SOURCE_BOOST = 6.0  # English is the language all others are reached from
SIZE_EXPONENT = 0.7  # a language with a tenth of the names is drawn a fifth as often
PAIR_WITH_SOURCE = 0.4


@dataclass
class Corpus:
    """Token sequences of the pre-training languages.

    ``lines[kind][locale]`` holds sequences without special tokens; ``by_key[key]`` the languages
    that name a key.
    """

    locales: tuple[str, ...]
    weights: np.ndarray
    lines: dict[str, list[list[list[int]]]]
    by_key: dict[NameKey, dict[int, list[int]]]
    keys: list[NameKey] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        locales: Sequence[str],
        tokenizer: Any,
        *,
        phrase_count: int = 500,
        list_count: int = 300,
    ) -> Corpus:
        """Tokenize the training text of the locales.

        Args:
            locales: pre-training locales.
            tokenizer: `tokenizers.Tokenizer`.
            phrase_count, list_count: phrases and enumerations drawn for each locale.
        """

        def encode(texts: Sequence[str]) -> list[list[int]]:
            encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [e.ids[: MAX_TOKENS - 2] for e in encodings]

        lines: dict[str, list[list[list[int]]]] = {
            k: [] for k in ("name", "string", "phrase", "list")
        }
        by_key: dict[NameKey, dict[int, list[int]]] = {}
        for number, locale in enumerate(locales):
            own = names(locale, "train")
            ids = encode(list(own.values()))
            for key, tokens in zip(own, ids, strict=True):
                by_key.setdefault(key, {})[number] = tokens
            lines["name"].append(ids)
            lines["string"].append(encode(other_strings(locale)) or ids)
            lines["phrase"].append(encode(phrases(locale, phrase_count)) or ids)
            lines["list"].append(encode(enumerations(locale, list_count)) or ids)
        sizes = np.array([len(own) for own in lines["name"]], dtype=np.float64) ** SIZE_EXPONENT
        sizes[[locale == SOURCE for locale in locales]] *= SOURCE_BOOST
        keys = sorted(key for key, named in by_key.items() if len(named) >= 2)
        return cls(tuple(locales), sizes / sizes.sum(), lines, by_key, keys)

    def block(self, seed: int, number: int, batch_size: int) -> list[list[list[int]]]:
        """Return block ``number``: `BLOCK` batches of sequences, special tokens included."""
        rng = np.random.default_rng((seed, number))
        count = BLOCK * batch_size
        kinds = rng.choice(len(MIXTURE), size=count, p=list(MIXTURE.values()))
        languages = rng.choice(len(self.locales), size=count, p=self.weights)
        draws = rng.random((count, 3))
        source = self.locales.index(SOURCE) if SOURCE in self.locales else 0
        kind_names = list(MIXTURE)
        sequences = []
        for kind, language, draw in zip(kinds, languages, draws, strict=True):
            name = kind_names[kind]
            if name == "pair":
                sequences.append(self._pair(int(language), source, draw))
            else:
                pool = self.lines[name][language]
                sequences.append([BOS_ID, *pool[int(draw[0] * len(pool))], EOS_ID])
        # ties keep their random order: sorted() is stable
        sequences.sort(key=len)
        order = rng.permutation(BLOCK)
        return [sequences[i * batch_size : (i + 1) * batch_size] for i in order]

    def _pair(self, language: int, source: int, draw: np.ndarray) -> list[int]:
        own = self.lines["name"][language]
        named = self._keys_of(language)
        key = named[int(draw[0] * len(named))]
        others = self.by_key[key]
        if source in others and language != source and draw[1] < PAIR_WITH_SOURCE:
            other = source
        else:
            numbers = [n for n in others if n != language] or [language]
            other = numbers[int(draw[1] * 7919) % len(numbers)]
        first, second = others.get(language, own[0]), others[other]
        if draw[2] < 0.5:
            first, second = second, first
        half = (MAX_TOKENS - 3) // 2
        return [BOS_ID, *first[:half], EOS_ID, *second[:half], EOS_ID]

    def _keys_of(self, language: int) -> list[NameKey]:
        cached = self.__dict__.setdefault("_keys_cache", {})
        if language not in cached:
            cached[language] = [key for key in self.keys if language in self.by_key[key]]
        return cached[language]


@dataclass
class MaskedBatch:
    """Masked sequences and, for the masked positions alone, where they are and what was there.

    Shapes: ``input_ids`` and ``attention_mask`` (batch, length) int64; ``positions`` and
        ``targets`` (masked,) int64,
    positions into the flattened batch.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


def mask_batch(
    sequences: Sequence[Sequence[int]], *, rate: float, vocab_size: int, rng: np.random.Generator
) -> MaskedBatch:
    """Pad sequences and mask some tokens: 80 % by the mask, 10 % by a random piece, 10 % stay.

    Every sequence has at least one masked token; special tokens are never masked.
    """
    length = max(map(len, sequences))
    ids = np.full((len(sequences), length), PAD_ID, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
    maskable = ids >= len(SPECIAL_TOKENS)
    draw = np.where(maskable, rng.random(ids.shape), np.inf)
    chosen = (draw < rate) | (draw == draw.min(axis=1, keepdims=True)) & maskable
    fate = rng.random(ids.shape)
    noise = rng.integers(len(SPECIAL_TOKENS), vocab_size, size=ids.shape)
    masked = np.where(chosen & (fate < 0.8), MASK_ID, ids)
    masked = np.where(chosen & (fate >= 0.8) & (fate < 0.9), noise, masked)
    positions = np.flatnonzero(chosen)
    return MaskedBatch(
        torch.from_numpy(masked),
        torch.from_numpy((ids != PAD_ID).astype(np.int64)),
        torch.from_numpy(positions),
        torch.from_numpy(ids.reshape(-1)[positions]),
    )
