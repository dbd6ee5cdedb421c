"""Models by name: the shapes of well-known ones, and encoders and decoders of any shape.

They have no weights: memory and speed do not depend on their values. ``7b``, ``13b`` and ``30b``
are the shapes of the first Llama models (hidden 4096 / 5120 / 6656, layers 32 / 40 / 60, inner
11008 / 13824 / 17920, vocabulary 32000).
"""

from __future__ import annotations

import re
from typing import Any

from sparseft.errors import OptionError

__all__ = ["SIZES", "shape_of"]

_BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
_ROBERTA = {
    **_BERT,
    "model_type": "roberta",
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_XLMR = {**_ROBERTA, "model_type": "xlm-roberta", "vocab_size": 250_002}
_T5 = {
    "model_type": "mt5",
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def _llama(hidden: int, layers: int, inner: int, heads: int, vocab: int = 32_000) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


def _encoder(layers: int, hidden: int, vocab: int) -> dict[str, Any]:
    return {
        **_XLMR,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(hidden),
        "intermediate_size": 4 * hidden,
    }


def _decoder(layers: int, hidden: int, vocab: int) -> dict[str, Any]:
    # 8/3 of the width, to the next multiple of 32: Llama's rule.
    inner = -(-8 * hidden // 3 // 32) * 32
    return _llama(hidden, layers, inner, _heads(hidden), vocab)


def _seq2seq(layers: int, hidden: int, vocab: int) -> dict[str, Any]:
    heads = _heads(hidden)
    return {
        **_T5,
        "vocab_size": vocab,
        "d_model": hidden,
        "d_kv": hidden // heads,
        "d_ff": 8 * hidden // 3,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
    }


def _heads(hidden: int) -> int:
    """As many heads of width 64 as there is room for; narrower ones below."""
    wide = next((n for n in (64, 32, 16, 8) if hidden % n == 0), hidden)
    return max(1, hidden // wide)


_FAMILIES = {"encoder": _encoder, "decoder": _decoder, "seq2seq": _seq2seq}
_SPEC = re.compile(r"(encoder|decoder|seq2seq):(\d+)x(\d+)x(\d+)")

SIZES: dict[str, dict[str, Any]] = {
    "xlmr-base": _XLMR,
    "xlmr-large": {
        **_XLMR,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "mbert": {**_BERT, "vocab_size": 119_547},
    "bert-base": {**_BERT, "vocab_size": 30_522},
    "roberta-base": {**_ROBERTA, "vocab_size": 50_265},
    "mt5-base": {
        **_T5,
        "vocab_size": 250_112,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
    },
    "gpt2": {"model_type": "gpt2"},
    "7b": _llama(4096, 32, 11_008, 32),
    "13b": _llama(5120, 40, 13_824, 40),
    "30b": _llama(6656, 60, 17_920, 52),
    "tiny-encoder": _encoder(2, 32, 120),
    "tiny-decoder": _decoder(2, 32, 120),
    "tiny-seq2seq": _seq2seq(2, 32, 120),
}


def shape_of(model: str) -> dict[str, Any] | None:
    """Return the config's fields of a named size, or of ``encoder:LAYERSxHIDDENxVOCAB``.

    Also ``decoder:`` (Llama) and ``seq2seq:`` (mT5). None: the name is neither.

    Raises:
        OptionError: a shape of that form with a zero, or a width of odd numbers.
    """
    if model in SIZES:
        return dict(SIZES[model])
    if model.partition(":")[0] not in _FAMILIES or ":" not in model:
        return None
    found = _SPEC.fullmatch(model)
    if found is None:
        raise OptionError(
            f"model {model!r} has no shape; wanted LAYERSxHIDDENxVOCAB, such as "
            f"'{model.partition(':')[0]}:12x384x25000'."
        )
    layers, hidden, vocab = (int(n) for n in found.groups()[1:])
    if layers < 1 or hidden < 8 or hidden % 8 or vocab < 16:
        raise OptionError(
            f"model {model!r}: wanted at least 1 layer, a width that is a multiple of 8, and a "
            "vocabulary of at least 16."
        )
    return _FAMILIES[found[1]](layers, hidden, vocab)
