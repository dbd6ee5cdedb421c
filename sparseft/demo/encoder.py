"""The demo's encoder: a stock XLM-R architecture of about 3M parameters, and the files it ships as.

`assets/` holds `config.json`, `tokenizer.json`, `model.safetensors` (fp16) and `provenance.json`,
all written by `sparseft.demo.pretrain`. Loading goes through the stock transformers classes;
nothing here is special to the demo.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparseft.demo.names import CATEGORIES
from sparseft.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, wrap_tokenizer
from sparseft.errors import DataError

ASSETS = Path(__file__).parent / "assets"
WEIGHTS, CONFIG, TOKENIZER, PROVENANCE = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "provenance.json",
)
MAX_TOKENS = 62  # <s> and </s> included


def encoder_config(
    vocab_size: int, *, hidden: int = 192, layers: int = 4, heads: int = 4, dropout: float = 0.1
) -> Any:
    """Return the XLM-R configuration of the encoder."""
    from transformers import XLMRobertaConfig

    return XLMRobertaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=MAX_TOKENS + PAD_ID + 1,
        type_vocab_size=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        bos_token_id=BOS_ID,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
    )


def set_dropout(model: torch.nn.Module, p: float) -> None:
    """Set the dropout probability everywhere in a model."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        elif hasattr(module, "dropout_prob"):  # attention of transformers 4.57 keeps a number
            setattr(module, "dropout_prob", p)  # noqa: B010  (typed as a tensor or module)


def file_digest(path: Path) -> str:
    """Return the BLAKE2b-128 digest of a file's bytes, in hex."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def save_encoder(model: torch.nn.Module, directory: Path) -> None:
    """Write configuration and weights (fp16, the tied output projection once)."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    weights = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied and tensor.is_floating_point()
    }
    temporary = directory / (WEIGHTS + ".tmp")
    save_file(weights, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors makes it private
    temporary.replace(directory / WEIGHTS)
    config: Any = model.config
    (directory / CONFIG).write_text(config.to_json_string() + "\n")


def load_provenance(directory: Path = ASSETS) -> dict[str, Any]:
    """Return the record of how the assets were made."""
    return json.loads((directory / PROVENANCE).read_text())


def load_tokenizer(directory: Path = ASSETS) -> Any:
    """Return the demo's tokenizer."""
    return wrap_tokenizer(directory / TOKENIZER)


def _load(model: torch.nn.Module, directory: Path, may_lack: tuple[str, ...]) -> Any:
    from safetensors.torch import load_file

    weights: Mapping[str, torch.Tensor] = load_file(directory / WEIGHTS)
    have = {name: tensor.float() for name, tensor in weights.items()}
    lacking, unexpected = model.load_state_dict(have, strict=False)
    lacking = [name for name in lacking if not name.startswith(may_lack)]
    unexpected = [name for name in unexpected if not name.startswith("lm_head.")]
    if lacking or unexpected:
        raise DataError(
            f"{directory / WEIGHTS} does not fit its config: lacks {lacking}, adds {unexpected}; "
            "write the assets again with `python -m sparseft.demo.pretrain`"
        )
    return model.eval()


def load_masked_lm(directory: Path = ASSETS) -> Any:
    """Return the encoder with its masked-language-model head, in fp32."""
    from transformers import AutoConfig, XLMRobertaForMaskedLM

    model = XLMRobertaForMaskedLM(AutoConfig.from_pretrained(directory))
    model = _load(model, directory, ("lm_head.decoder.",))
    model.tie_weights()
    return model


def load_classifier(directory: Path = ASSETS, *, seed: int = 0) -> Any:
    """Return the encoder with a new head for `CATEGORIES`, initialised from ``seed`` alone."""
    from transformers import AutoConfig, XLMRobertaForSequenceClassification

    config = AutoConfig.from_pretrained(
        directory,
        num_labels=len(CATEGORIES),
        id2label=dict(enumerate(CATEGORIES)),
        label2id={name: number for number, name in enumerate(CATEGORIES)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XLMRobertaForSequenceClassification(config)
    return _load(model, directory, ("classifier.",))
