"""A word tokenizer and an encoder small enough to build in a test, as Hugging Face folders."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = [a + b for a in string.ascii_lowercase for b in "aeiou"] + list(string.ascii_lowercase)


def tiny_tokenizer() -> Any:
    """Return a fast tokenizer: words of WORDS, ``<s> a </s>`` and ``<s> a </s> </s> b </s>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_config(**options: Any) -> Any:
    """Return the configuration of a one-layer encoder for that tokenizer."""
    from transformers import XLMRobertaConfig

    return XLMRobertaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=132,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        **options,
    )


def save_tiny(
    folder: Path, *, num_labels: int | None = None, seed: int = 0, **options: Any
) -> Path:
    """Save tokenizer and encoder (with a classifier if ``num_labels``, else a masked-LM head)."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    if num_labels is None:
        model = AutoModelForMaskedLM.from_config(tiny_config(**options))
    else:
        model = AutoModelForSequenceClassification.from_config(
            tiny_config(num_labels=num_labels, **options)
        )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
