"""The model and the batch of a `Workload`: found, checked, built on a device or on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.errors import DataError, OptionError
from sparseft.io.hub import first_line, load_from_anywhere
from sparseft.profiling.sizes import SIZES, shape_of
from sparseft.profiling.workload import Workload

__all__ = ["TORCH_DTYPES", "build_inputs", "build_model", "faked", "load_config", "resolve_task"]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LABELS = 3
LABELLED = 0.15  # of a masked language model's positions
# Where a config does not say, the first that its kind of model has.
_FACTORIES = {
    "mlm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
}
_ENDINGS = {
    "ForMaskedLM": "mlm",
    "ForSequenceClassification": "classification",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForConditionalGeneration": "seq2seq",
}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def faked() -> bool:
    """Whether a FakeTensorMode is active: tensors then have shapes and no memory."""
    from torch._guards import active_fake_mode

    return active_fake_mode() is not None


def load_config(model: str) -> Any:
    """Return the transformers config of a folder, a named size, a shape or a name on the hub.

    Raises:
        DataError: none of them; the message has the nearest sizes and says how to give a path.
        OptionError: as `shape_of`.
    """
    from transformers import AutoConfig

    if (folder := _folder(model)) is not None:
        try:
            return AutoConfig.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"model {model!r} cannot be read: {first_line(error)}.") from error
    if (fields := shape_of(model)) is not None:
        return AutoConfig.for_model(**fields)
    try:
        return load_from_anywhere(model, lambda **where: AutoConfig.from_pretrained(model, **where))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"model {model!r} is no folder, no size ({', '.join(SIZES)}), and cannot be fetched: "
            f"{first_line(error)}.{did_you_mean(model, SIZES)} Without a network, give the path of "
            "a folder with its config.json (hf download NAME --local-dir FOLDER)."
        ) from error


def _folder(model: str) -> Path | None:
    """Return the folder that ``model`` names, or None if it reads like no path."""
    path = Path(model).expanduser()
    if model in SIZES or not (path.exists() or model.startswith((".", "/", "~"))):
        return None
    if not path.is_dir():
        raise DataError(f"model {model!r}: no such folder. Give one written by save_pretrained.")
    if not (path / "config.json").is_file():
        raise DataError(
            f"model {model!r}: the folder has no config.json; give one written by save_pretrained."
        )
    return path


def resolve_task(workload: Workload, config: Any) -> str:
    """Return the task, by the config where it is ``"auto"``.

    Raises:
        OptionError: transformers has no model of that kind for the task; says for which it has.
    """
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    fits = [t for t, (_, table) in _FACTORIES.items() if kind in getattr(modeling_auto, table)]
    task = workload.task
    if task == "auto":
        named = [
            t for a in config.architectures or () for e, t in _ENDINGS.items() if a.endswith(e)
        ]
        wide = getattr(config, "is_encoder_decoder", False)
        first = ["seq2seq"] if wide else []
        task = next((t for t in [*named, *first, *fits] if t in fits), "")
    if task not in fits:
        raise OptionError(
            f"model {workload.model!r} is of kind {kind!r}, which has no {task or 'known'} task; "
            f"it has {', '.join(fits) or 'none'}."
        )
    return task


def _check_length(workload: Workload, config: Any) -> None:
    if config.model_type in ("t5", "mt5", "umt5"):
        return  # relative positions: no last one
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return
    if "roberta" in config.model_type or config.model_type == "camembert":
        most -= config.pad_token_id + 1  # positions start after the padding's
    if workload.length > most:
        raise OptionError(
            f"length={workload.length} is over the {most} positions of model {workload.model!r}."
        )


def build_model(workload: Workload, device: torch.device) -> tuple[nn.Module, str]:
    """Return the model in training mode and its task.

    Weights are those of the folder, or of the hub's cache, if there are any and tensors are real;
    else they are drawn: nothing is downloaded to count bytes.
    """
    import transformers

    config = load_config(workload.model)
    task = resolve_task(workload, config)
    _check_length(workload, config)
    _prepare(config, task, workload)
    factory = getattr(transformers, _FACTORIES[task][0])
    dtype = TORCH_DTYPES[workload.dtype]
    source = None if faked() else _source_of_weights(workload.model)
    with _seeded(workload.seed, device):
        if source is not None:
            with _quiet():
                model = factory.from_pretrained(
                    source, config=config, dtype=dtype, local_files_only=True
                ).to(device)
        else:
            with device:
                model = factory.from_config(config, dtype=dtype)
    model.train()
    if workload.checkpointing:
        _checkpoint(model)
    return model, task


def _checkpoint(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _prepare(config: Any, task: str, workload: Workload) -> None:
    config.use_cache = False
    if getattr(config, "is_encoder_decoder", False):
        # A model that has one for generating alone need not say it in its config: T5's is padding.
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = getattr(config, "bos_token_id", None) or 0
    if task == "classification":
        config.num_labels = LABELS
        if config.pad_token_id is None:
            config.pad_token_id = 0  # below every drawn token: decoders read the last that is not
    if not workload.dropout:
        for key, value in list(config.to_dict().items()):
            drops = key.endswith(("dropout", "dropout_prob", "dropout_rate", "_pdrop", "layerdrop"))
            if drops and isinstance(value, float):
                setattr(config, key, 0.0)


def _source_of_weights(model: str) -> str | None:
    folder = _folder(model)
    if folder is not None:
        there = any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
        return str(folder) if there else None
    if shape_of(model) is not None:
        return None
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    cached = any(isinstance(try_to_load_from_cache(model, file), str) for file in files)
    return model if cached else None


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed and leave torch's own generators as they were."""
    if faked():
        yield  # nothing is drawn, and a generator's state is no fake tensor
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting the new head's missing weights."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def build_inputs(
    workload: Workload, model: nn.Module, task: str, device: torch.device
) -> dict[str, Tensor]:
    """Return ids and labels: random tokens, no padding, and so no attention mask.

    Of ``"mlm"`` 15 % of the positions have a label, at least one.
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = None if faked() else torch.Generator().manual_seed(workload.seed + 1)
    shape = (workload.batch, workload.length)

    def tokens() -> Tensor:
        # From 5: special tokens come first in the vocabularies of encoders.
        return torch.randint(5, config.vocab_size, shape, generator=generator)

    ids = tokens()
    if task == "classification":
        labels = torch.randint(0, LABELS, (workload.batch,), generator=generator)
    elif task == "mlm":
        hidden = torch.rand(shape, generator=generator) < LABELLED
        hidden[0, 0] = True
        labels = torch.where(hidden, ids, torch.full_like(ids, -100))
    else:
        labels = tokens() if task == "seq2seq" else ids.clone()
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
