"""Random masking for masked language modelling whose random numbers come from the batch itself.

The usual choices break exact resumption (P8). With the global generator, data loaders fetch one
batch ahead, so the state saved in a checkpoint has already moved past the next batch; a generator
seeded once restarts at its beginning, because skipped batches are never collated; and a counter set
per epoch is not forwarded to the data set on the resumed epoch (accelerate 1.15,
``DataLoaderShard.set_epoch`` with a skipping batch sampler). So the seed of a batch is a digest of
(seed, its token ids): no state, the same with any number of workers, and the same at every
evaluation of a validation batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparseft.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["MaskedLMCollator"]

_MAX_DRAWS = 1000


class MaskedLMCollator:
    """Pad examples into a batch and mask tokens at random (80 % mask token, 10 % random).

    Masking is transformers' ``DataCollatorForLanguageModeling``; this class only gives it a
    generator seeded by blake2b(seed, token ids of the batch) and draws again when no token was
    chosen, since the mean loss over no token is NaN (at rate 0.15 every eleventh batch of 15
    tokens).

    Args:
        tokenizer: a Hugging Face tokenizer with a mask token.
        seed: any int; another seed gives other masks.
        mask_rate: fraction of the ordinary tokens that are predicted, in (0, 1].
        pad_to_multiple_of: round the padded length up, e.g. to 8.

    Raises:
        DataError: a rate outside (0, 1], a tokenizer without a mask or padding token.

    Numerics: the masks of a batch are a function of its token ids, in order, and of the seed.
        Shuffled batches differ from epoch to epoch and so do their masks; a batch of a single
        example gets the same mask each time.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        seed: int = 0,
        mask_rate: float = 0.15,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        from transformers import DataCollatorForLanguageModeling

        if not 0.0 < mask_rate <= 1.0:
            raise DataError(f"mask_rate must be in (0, 1], got {mask_rate!r}.")
        for kind in ("mask", "pad"):
            if getattr(tokenizer, f"{kind}_token_id", None) is None:
                raise DataError(
                    f"the tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'this model'} "
                    f"has no {kind} token, so it cannot do masked language modelling. Use an "
                    "encoder such as xlm-roberta-base."
                )
        self.seed = int(seed)
        self.mask_rate = float(mask_rate)
        self._inner = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=mask_rate, pad_to_multiple_of=pad_to_multiple_of, seed=0
        )
        # The unknown token is an ordinary token here: it stands for text.
        self._special = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the model inputs and ``labels``, -100 where nothing is predicted."""
        import torch

        # Always recomputed: Trainer(remove_unused_columns=True) strips extra keys, and the result
        # must not depend on that setting.
        rows = []
        for example in examples:
            ids = [int(i) for i in example["input_ids"]]
            special = [int(i in self._special) for i in ids]
            kept = {k: v for k, v in example.items() if k not in ("labels", "special_tokens_mask")}
            rows.append({**kept, "input_ids": ids, "special_tokens_mask": special})
        if all(all(row["special_tokens_mask"]) for row in rows):
            raise DataError(
                f"a batch of {len(rows)} examples holds special tokens only, so nothing can be "
                "masked; check the text files and the tokenizer."
            )
        generator = torch.Generator()
        for draw in range(_MAX_DRAWS):
            generator.manual_seed(self._batch_seed(rows, draw))
            self._inner.generator = generator
            try:
                batch = self._inner([dict(row) for row in rows])
            finally:
                self._inner.generator = None  # stay picklable for worker processes
            if bool((batch["labels"] != -100).any()):
                return dict(batch)
        raise DataError(
            f"mask_rate={self.mask_rate} chose no token in {_MAX_DRAWS} draws of one batch; raise "
            "the rate or the batch size."
        )

    def _batch_seed(self, rows: Sequence[Mapping[str, Any]], draw: int) -> int:
        digest = hashlib.blake2b(f"{self.seed}:{draw}".encode(), digest_size=8)
        for row in rows:
            digest.update(repr(row["input_ids"]).encode())
        return int.from_bytes(digest.digest(), "little") >> 1  # torch takes a signed 64-bit seed
