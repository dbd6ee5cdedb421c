"""Masked-LM examples out of raw text files: one sentence or paragraph a line, UTF-8.

Files are streamed, so a text larger than memory is never held; the token ids are (4 bytes each).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.utils.data

from sparseft.data.masking import MaskedLMCollator
from sparseft.errors import DataError

__all__ = ["TextDataset", "load_mlm_texts", "read_lines", "text_files"]

_CHUNK = 1024  # lines handed to the tokenizer at once; 256 and 4096 took the same time


class TextDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Token-id sequences of several lengths, stored flat.

    Args:
        tokens: (total,) int32, the ids of all examples one after another, special tokens included.
        offsets: (examples + 1,) int64, where each example starts.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        self._tokens = tokens
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        ids = self._tokens[self._offsets[index] : self._offsets[index + 1]].tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    @property
    def n_tokens(self) -> int:
        """Number of token ids over all examples, special tokens included."""
        return int(self._offsets[-1])

    def select(self, indices: Iterable[int]) -> TextDataset:
        """Return a new data set of the given examples, in the given order."""
        chosen = [self._tokens[self._offsets[i] : self._offsets[i + 1]] for i in indices]
        offsets = np.cumsum([0, *map(len, chosen)], dtype=np.int64)
        return TextDataset(np.concatenate([*chosen, np.empty(0, np.int32)]), offsets)

    def sample(self, n: int, seed: int = 0) -> TextDataset:
        """Return ``n`` examples drawn without replacement, in text order (all if n is larger)."""
        if n >= len(self):
            return self
        return self.select(sorted(np.random.default_rng(seed).permutation(len(self))[:n].tolist()))

    def split(self, fraction: float, seed: int = 0) -> tuple[TextDataset, TextDataset]:
        """Return (training, validation) parts; validation gets ``fraction``, at least one example.

        Raises:
            DataError: a fraction outside (0, 1), or fewer than two examples.
        """
        if not 0.0 < fraction < 1.0:
            raise DataError(f"the validation fraction must be in (0, 1), got {fraction!r}.")
        if len(self) < 2:
            raise DataError(f"cannot split {len(self)} example(s) into training and validation.")
        n = min(max(1, round(fraction * len(self))), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        return self.select(sorted(order[n:])), self.select(sorted(order[:n]))


def text_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files meant: a file is itself, a folder its ``*.txt`` files sorted by name.

    Raises:
        DataError: nothing given, a path that does not exist, a folder without text files.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise DataError("no text file given for masked language modelling.")
    files: list[Path] = []
    for entry in map(Path, given):
        if entry.is_dir():
            inside = sorted(entry.glob("*.txt"))
            if not inside:
                raise DataError(f"{entry}: a folder without *.txt files; name the files.")
            files += inside
        elif entry.exists():
            files.append(entry)
        else:
            raise DataError(f"{entry}: no such text file.")
    return files


def read_lines(path: str | Path) -> Iterator[str]:
    """Yield the non-blank lines of a UTF-8 file, stripped, reading as it goes.

    Raises:
        DataError: bytes that are not UTF-8; a file without a non-blank line.
    """
    path, line, found = Path(path), 0, False
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, raw in enumerate(file, start=1):  # noqa: B007 (read in the except clause)
                if text := raw.strip():
                    found = True
                    yield text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 after line {line} (byte 0x{error.object[error.start]:02x}). "
            "Convert it, e.g. with iconv -t utf-8."
        ) from None
    if not found:
        raise DataError(f"{path}: the file is {'blank' if line else 'empty'}; text was expected.")


def _token_lines(files: Sequence[Path], tokenizer: Any) -> Iterator[list[int]]:
    def tokenise(lines: list[str]) -> list[list[int]]:
        return tokenizer(
            lines,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # long lines are cut below, so its length warning would mislead
        )["input_ids"]

    chunk: list[str] = []
    for file in files:
        for line in read_lines(file):
            chunk.append(line)
            if len(chunk) == _CHUNK:
                yield from tokenise(chunk)
                chunk = []
    if chunk:
        yield from tokenise(chunk)


def _frame(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Return the special tokens before a text, after it, and between two texts of a block."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full)) if plain and full[i : i + len(plain)] == plain]
    if not starts:
        raise DataError("the tokenizer gives no token for 'a', so its special tokens are unknown.")
    separator = [i for i in (tokenizer.sep_token_id, tokenizer.eos_token_id) if i is not None][:1]
    return full[: starts[0]], full[starts[0] + len(plain) :], separator


def load_mlm_texts(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Any,
    max_length: int = 256,
    seed: int = 0,
    *,
    mode: Literal["blocks", "lines"] = "blocks",
    mask_rate: float = 0.15,
    max_examples: int | None = None,
) -> tuple[TextDataset, MaskedLMCollator]:
    """Return the examples of raw text files and the collator that pads and masks them.

    ``blocks`` packs lines, separated by the tokenizer's separator token, into examples of exactly
    ``max_length`` tokens (the last one is shorter); ``lines`` makes an example of each line. Lines
    that are too long go on in the next example: no text is dropped.

    Args:
        paths: text files, or folders whose ``*.txt`` files are read in the order of their names.
        tokenizer: a Hugging Face tokenizer with a mask token.
        max_length: tokens of an example, special tokens included.
        seed: seed of the masks, and of the sample when ``max_examples`` cuts.
        mode: ``"blocks"`` or ``"lines"``.
        mask_rate: fraction of tokens predicted, in (0, 1].
        max_examples: keep at most this many examples, drawn at random.

    Raises:
        DataError: missing, empty or undecodable file (named), a length too small or beyond the
            tokenizer's limit.
    """
    collator = MaskedLMCollator(tokenizer, seed=seed, mask_rate=mask_rate)
    files = text_files(paths)
    before, after, separator = _frame(tokenizer)
    body = max_length - len(before) - len(after)
    limit = getattr(tokenizer, "model_max_length", None)
    if body < 1:
        raise DataError(
            f"max_length={max_length} leaves no room for text beside {len(before) + len(after)} "
            "special tokens."
        )
    if limit is not None and max_length > limit:
        raise DataError(
            f"max_length={max_length}, but the model takes at most {limit} tokens; lower it."
        )
    if mode not in ("blocks", "lines"):
        raise DataError(f"mode={mode!r} is not one of 'blocks', 'lines'.")
    if max_examples is not None and max_examples < 1:
        raise DataError(f"max_examples must be at least 1, got {max_examples}.")

    tokens, ends = array("i"), array("q", [0])

    def emit(ids: Sequence[int]) -> None:
        tokens.extend(before)
        tokens.extend(ids)
        tokens.extend(after)
        ends.append(len(tokens))

    buffer: list[int] = []
    for ids in _token_lines(files, tokenizer):
        if not ids:  # a line of characters that the tokenizer drops
            continue
        if mode == "blocks":
            buffer += [*separator, *ids] if buffer else ids
        else:
            buffer = ids
        start = 0
        while len(buffer) - start >= body or (mode == "lines" and start < len(buffer)):
            emit(buffer[start : start + body])
            start += body
        buffer = buffer[start:]
    # A remainder of separators alone holds nothing to predict.
    if mode == "blocks" and set(buffer) - set(separator):
        emit(buffer)
    if len(ends) == 1:
        raise DataError(f"{', '.join(map(str, files))}: no tokens after tokenisation.")
    # array.itemsize of "i" is 4 on every platform CPython supports with torch
    dataset = TextDataset(
        np.frombuffer(tokens, dtype=np.int32), np.frombuffer(ends, dtype=np.int64)
    )
    if max_examples is not None:
        dataset = dataset.sample(max_examples, seed)
    return dataset, collator
