"""The demo's tokenizer: a Unigram vocabulary learned from pre-training languages only.

Text is decomposed (NFKD) first: a letter that only held-out languages write, such as Yoruba "ẹ",
then is a known base letter and a combining mark known from other languages, instead of an unknown
piece.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft.demo.names import names
from sparseft.demo.text import other_strings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# XLM-R's order, so that the stock XLM-R classes need no other ids.
BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
BOS_ID, PAD_ID, EOS_ID, UNK_ID, MASK_ID = range(5)
SPECIAL_TOKENS: tuple[str, ...] = (BOS, PAD, EOS, UNK, MASK)


def latin_alphabet() -> list[str]:
    """Return every character of decomposed Latin text, whether or not a language here uses it.

    A rare letter must be a piece of its own: `<unk>` hides it from a language diff that could learn
    it.
    """
    blocks = (range(0x21, 0x7F), range(0xA1, 0x250), range(0x250, 0x2B0), range(0x2B9, 0x2C0))
    letters = {
        c for block in blocks for code in block for c in unicodedata.normalize("NFKD", chr(code))
    }
    letters.update(chr(code) for code in range(0x300, 0x332))  # combining marks
    letters.update("‘’“”–—")
    return sorted(c for c in letters if not c.isspace() and c.isprintable())


def tokenizer_text(locales: Sequence[str], *, per_locale: int, seed: int) -> Iterator[str]:
    """Yield training names and other strings of every locale, equally many of each."""
    for locale in locales:
        lines = list(dict.fromkeys([*names(locale, "train").values(), *other_strings(locale)]))
        random.Random(f"tokenizer/{locale}/{seed}").shuffle(lines)
        yield from lines[:per_locale]


def train_tokenizer(
    locales: Sequence[str], *, vocab_size: int = 8000, per_locale: int = 900, seed: int = 0
) -> Tokenizer:
    """Learn the Unigram vocabulary on the names of the given locales.

    Args:
        locales: pre-training locales; no other text is read.
        vocab_size: pieces, the five special ones included.
        per_locale: at most this many lines of each locale, so that well covered ones do not crowd
            out the rest.
        seed: which lines are taken.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import UnigramTrainer

    tokenizer: Any = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        unk_token=UNK,
        max_piece_length=12,
        initial_alphabet=latin_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        tokenizer_text(locales, per_locale=per_locale, seed=seed), trainer=trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} $B {EOS}",
        special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)],
    )
    return tokenizer


def wrap_tokenizer(path: Path) -> Any:
    """Return a tokenizer file as the object transformers' collators and Trainers expect."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=BOS,
        cls_token=BOS,
        pad_token=PAD,
        eos_token=EOS,
        sep_token=EOS,
        unk_token=UNK,
        mask_token=MASK,
        model_max_length=64,
    )
