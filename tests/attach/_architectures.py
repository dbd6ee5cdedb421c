"""Models of every family, small, with the tier in which each of their weights is to train.

Each is built at a width: 16 trains in milliseconds, a few hundred makes weights larger than the
activations. Outputs are logits over words or classes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STACKED = int(version("transformers").split(".")[0]) >= 5

LABELS = 48  # words that occur, and classes
EXPERTS = 4


def vocabulary(width: int) -> int:
    """Return how many words embeddings have: wide ones are as large as other weights."""
    return max(LABELS, 4 * width)


# How the gradient of a weight reaches its mask. Everything that is no matrix is "generic".
LINEAR, CONV1D, EMBEDDING, EXPERT, GENERIC = "linear", "conv1d", "embedding", "expert", "generic"
TIED = "embedding+linear"


@dataclass(frozen=True)
class Architecture:
    """One family.

    Args:
        build: width -> model, drawn from torch's generator.
        inputs: generator -> keyword arguments of the model.
        tiers: glob over names of matrices and larger tensors -> tier; vectors are generic.
        wide: the width for the check of memory; 0: next to nothing of it is fused.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[torch.Generator], dict[str, Tensor]]
    tiers: dict[str, str] = field(default_factory=dict)
    wide: int = 256

    def tier(self, name: str, weight: Tensor) -> str | None:
        """Return the tier that a weight has to take; None if the table does not have it."""
        if weight.ndim < 2:
            return GENERIC
        found = {t for glob, t in self.tiers.items() if fnmatch.fnmatchcase(name, glob)}
        return found.pop() if len(found) == 1 else None


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return (..., words or classes)."""
    output = model(**inputs)
    return getattr(output, "logits", output)


def loss_of(model: nn.Module, inputs: dict[str, Tensor], seed: int) -> Tensor:
    """Return a cross-entropy loss against labels drawn from ``seed``, of the first LABELS."""
    logits = logits_of(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, LABELS, logits.shape[:-1], generator=generator)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


# Inputs.


def _words(generator: torch.Generator, rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, LABELS, (rows, length), generator=generator)


def words(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _words(generator)}


def padded(generator: torch.Generator) -> dict[str, Tensor]:
    attention = torch.ones(2, 7, dtype=torch.long)
    attention[1, 5:] = 0
    return {"input_ids": _words(generator), "attention_mask": attention}


def pairs(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _words(generator)
    return {"input_ids": ids, "decoder_input_ids": _words(generator, 2, 5)}


def pixels(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)}


# Encoders.


def _encoder(width: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary(width),
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def bert(width: int) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_encoder(width)))


def xlm_roberta(width: int) -> nn.Module:
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    config = XLMRobertaConfig(
        **_encoder(width), num_labels=LABELS, type_vocab_size=1, pad_token_id=1
    )
    return XLMRobertaForSequenceClassification(config)


def deberta_v3(width: int) -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForTokenClassification

    # The options in which the published v3 differs from v2.
    config = DebertaV2Config(
        **_encoder(width),
        num_labels=LABELS,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=4,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    )
    return DebertaV2ForTokenClassification(config)


# Encoders with decoders.


def _t5(width: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary(width),
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 2 * width,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }


def t5(width: int) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(**_t5(width), tie_word_embeddings=True))


def mt5(width: int) -> nn.Module:
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(**_t5(width), feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = MT5ForConditionalGeneration(config)
    # Transformers 5 unties the head where a checkpoint has another one, as published ones do.
    model.lm_head.weight = nn.Parameter(torch.randn(vocabulary(width), width) * width**-0.5)
    return model


# Decoders.


def gpt2(width: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary(width), n_positions=16, n_embd=width, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _decoder(width: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary(width),
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # shared by two heads each
        "head_dim": width // 4,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }


def llama(width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder(width), tie_word_embeddings=False))


def qwen2(width: int) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_decoder(width), tie_word_embeddings=True))


def qwen3(width: int) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_decoder(width), tie_word_embeddings=True))


# Mixtures of experts.


def _with_experts(config: Any, how: str | None) -> Any:
    if how is not None:
        config._experts_implementation = how  # of transformers 5
    return config


def qwen3_moe(width: int, how: str | None = None) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **_decoder(width),
        moe_intermediate_size=width,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
    )
    return Qwen3MoeForCausalLM(_with_experts(config, how))


def mixtral(width: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_decoder(width), num_local_experts=EXPERTS, num_experts_per_tok=2)
    return MixtralForCausalLM(config)


def granite_moe(width: int) -> nn.Module:
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    sizes = {name: value for name, value in _decoder(width).items() if name != "head_dim"}
    config = GraniteMoeConfig(
        **sizes, num_local_experts=EXPERTS, num_experts_per_tok=2, tie_word_embeddings=True
    )
    return GraniteMoeForCausalLM(config)


def gpt_oss(width: int) -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_decoder(width),
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        layer_types=["full_attention"],
        tie_word_embeddings=False,
    )
    return GptOssForCausalLM(config)


# Images, and models of torch alone.


def vit(width: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = _encoder(width)
    for name in ("vocab_size", "max_position_embeddings"):
        del sizes[name]
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=LABELS)
    )


class Translator(nn.Module):
    """`nn.Transformer` between an embedding and a head."""

    def __init__(self, width: int, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(vocabulary(width), width)
        self.transformer = nn.Transformer(
            width, 2, 1, 1, 2 * width, dropout=0.0, batch_first=batch_first
        )
        self.head = nn.Linear(width, LABELS)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        source, target = self.embed(input_ids), self.embed(decoder_input_ids)
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        if not self.batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        y = self.transformer(source, target, tgt_mask=causal)
        return self.head(y if self.batch_first else y.transpose(0, 1))


class Convolutions(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions with batch norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=4)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.head = nn.Linear(width, LABELS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(pixel_values)))
        h = F.relu(self.norm2(self.depthwise(self.grouped(h))))
        return self.head(self.up(h).mean((2, 3)))


# Which tier.

_DECODER = {
    "*_proj.weight": LINEAR,
    "model.embed_tokens.weight": EMBEDDING,
    "lm_head.weight": LINEAR,
}
_TIED_DECODER = {"*_proj.weight": LINEAR, "model.embed_tokens.weight": TIED}
_T5 = {
    "*.[qkvo].weight": LINEAR,
    "*.w[io].weight": LINEAR,
    "*.wi_?.weight": LINEAR,
    "*.relative_attention_bias.weight": EMBEDDING,
}
# transformers 4 has modules for the experts and the router of most mixtures.
_EXPERTS = (
    {"*.gate_up_proj": EXPERT, "*.down_proj": EXPERT, "*.mlp.gate.weight": GENERIC}
    if STACKED
    else {"*.experts.*.w?.weight": LINEAR, "*.gate.weight": LINEAR}
)
_TRANSLATOR = {
    "embed.weight": EMBEDDING,
    "head.weight": LINEAR,
    "*.linear?.weight": LINEAR,
    # Packed, and read around its Linear.
    "*.in_proj_weight": GENERIC,
    "*.out_proj.weight": GENERIC,
}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        bert,
        padded,
        {
            "*.word_embeddings.weight": TIED,
            "*_type_embeddings.weight": EMBEDDING,
            "*.position_embeddings.weight": EMBEDDING,
            "*.layer.*.weight": LINEAR,
            "*.transform.dense.weight": LINEAR,
        },
    ),
    "xlm_roberta": Architecture(
        xlm_roberta,
        padded,
        {
            "*_embeddings.weight": EMBEDDING,
            "*.layer.*.weight": LINEAR,
            "classifier.*.weight": LINEAR,
        },
    ),
    "deberta_v3": Architecture(
        deberta_v3,
        padded,
        {
            "*.word_embeddings.weight": EMBEDDING,
            "*.layer.*.weight": LINEAR,
            "*.rel_embeddings.weight": GENERIC,  # read as a matrix
            "classifier.weight": LINEAR,
        },
    ),
    "t5_tied": Architecture(t5, pairs, {**_T5, "shared.weight": TIED}),
    "mt5_untied": Architecture(
        mt5, pairs, {**_T5, "shared.weight": EMBEDDING, "lm_head.weight": LINEAR}
    ),
    "gpt2": Architecture(
        gpt2,
        words,
        {"*.wte.weight": TIED, "*.wpe.weight": EMBEDDING, "*.c_*.weight": CONV1D},
    ),
    "llama": Architecture(llama, padded, _DECODER),
    "qwen2": Architecture(qwen2, words, _TIED_DECODER),
    "qwen3": Architecture(qwen3, words, _TIED_DECODER),
    "qwen3_moe": Architecture(qwen3_moe, words, {**_DECODER, **_EXPERTS}),
    "mixtral": Architecture(mixtral, words, {**_DECODER, **_EXPERTS}),
    "vit": Architecture(
        vit,
        pixels,
        {
            "*.layer*.weight": LINEAR,
            "classifier.weight": LINEAR,
            "*.cls_token": GENERIC,
            "*.position_embeddings": GENERIC,
            "*.projection.weight": GENERIC,
        },
    ),
    "transformer": Architecture(lambda w: Translator(w, batch_first=False), pairs, _TRANSLATOR),
    "transformer_batch_first": Architecture(
        lambda w: Translator(w, batch_first=True), pairs, _TRANSLATOR
    ),
    "cnn": Architecture(
        Convolutions,
        pixels,
        {
            "head.weight": LINEAR,
            "stem.weight": GENERIC,
            "grouped.weight": GENERIC,
            "depthwise.weight": GENERIC,
            "up.weight": GENERIC,
        },
        wide=0,
    ),
}

# More of the same kinds, for the slow lane.
MORE: dict[str, Architecture] = {
    "qwen3_moe_eager": Architecture(
        lambda w: qwen3_moe(w, "eager"),
        words,
        {
            **_DECODER,
            **_EXPERTS,
            **(dict.fromkeys(("*.gate_up_proj", "*.down_proj"), LINEAR) if STACKED else {}),
        },
    ),
    # Gathers a matrix for each row: more than any gradient.
    "qwen3_moe_batched": Architecture(
        lambda w: qwen3_moe(w, "batched_mm"), words, {**_DECODER, **_EXPERTS}, wide=0
    ),
    "granite_moe": Architecture(
        granite_moe,
        words,
        {
            **_TIED_DECODER,
            "*.gate_up_proj": EXPERT,
            "*.down_proj": EXPERT,
            "*_linear.weight": LINEAR,  # of transformers 4: a stack, expert by expert
            "*.router.*.weight": LINEAR,
            "*.router.weight": GENERIC,
        },
    ),
    "gpt_oss": Architecture(
        gpt_oss,
        words,
        {
            "model.embed_tokens.weight": EMBEDDING,
            "lm_head.weight": LINEAR,
            "*.[qkvo]_proj.weight": LINEAR,
            "*.gate_up_proj": EXPERT if STACKED else CONV1D,
            "*.down_proj": EXPERT if STACKED else CONV1D,
            "*_bias": GENERIC,
            "*.router.weight": GENERIC,
        },
    ),
}
