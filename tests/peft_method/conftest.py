"""Tiny models of several architectures, and a PEFT model with values as after some training."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch


class Tiny(NamedTuple):
    """An architecture in small: its model, a batch, and targets of every kind that it has."""

    model: Any
    batch: dict[str, torch.Tensor]
    targets: Any


def _ids(rows: int = 3, length: int = 6) -> torch.Tensor:
    return torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def _bert() -> Tiny:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    targets = ["query", "value", "word_embeddings", "output.dense", "output.LayerNorm"]
    return Tiny(BertForSequenceClassification(config), {"input_ids": _ids()}, targets)


def _gpt2() -> Tiny:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Tiny(GPT2LMHeadModel(config), {"input_ids": _ids()}, ["c_attn", "c_fc", "c_proj", "wpe"])


def _llama() -> Tiny:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Tiny(LlamaForCausalLM(config), {"input_ids": _ids()}, "all-linear")


def _t5() -> Tiny:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    batch = {"input_ids": _ids(), "decoder_input_ids": _ids(3, 4)}
    return Tiny(T5ForConditionalGeneration(config), batch, r".*\.(q|v|wi|wo)")


ARCHITECTURES = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "t5": _t5}
_made: dict[str, Tiny] = {}


def tiny(name: str) -> Tiny:
    """Return a fresh copy of an architecture in eval mode, always with the same weights."""
    if name not in _made:
        torch.manual_seed(0)
        made = ARCHITECTURES[name]()
        made.model.eval()
        _made[name] = made
    made = _made[name]
    return made._replace(model=copy.deepcopy(made.model))


def scramble(model: Any, seed: int = 0, scale: float = 0.05) -> None:
    """Give trainable values as training would: those of the active adapters, and heads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def logits(model: Any, batch: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **more).logits


@pytest.fixture
def tools() -> Any:
    """The functions above, for test files that cannot import a conftest."""

    class Tools:
        pass

    Tools.tiny, Tools.scramble, Tools.logits = (
        staticmethod(tiny), staticmethod(scramble), staticmethod(logits),
    )  # fmt: skip
    return Tools
