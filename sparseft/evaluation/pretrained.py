"""A base model and its tokenizer from a folder or a hub name, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseft.errors import DataError
from sparseft.io.hub import first_line, load_from_anywhere

__all__ = ["load_model", "load_tokenizer"]

_KINDS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "encoder": "AutoModel",
}


def _load(loader: Any, base: str | Path, what: str, **options: Any) -> Any:
    name = str(base)
    if name.startswith((".", "/", "~")) or Path(name).exists():
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"{what}: no folder {folder}. Give a folder written by save_pretrained."
            )
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{what}: {folder} has no config.json; give a folder written by save_pretrained."
            )
        name = str(folder)

    def load(**where: Any) -> Any:
        if "output_loading_info" in options:  # a model: where PEFT is installed it looks by itself
            return loader.from_pretrained(name, **options, **where, adapter_kwargs=where)
        return loader.from_pretrained(name, **options, **where)

    try:
        return load_from_anywhere(name, load)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{what} {str(base)!r} cannot be loaded: {first_line(error)}. Without a network, "
            "download the model elsewhere (hf download NAME --local-dir FOLDER) and give the path "
            "of that folder in place of the name."
        ) from error


def load_model(
    base: str | Path,
    kind: str = "sequence-classification",
    *,
    missing: list[str] | None = None,
    **options: Any,
) -> Any:
    """Return a model in fp32 (unless ``dtype`` is given) from a folder or a name on the hub.

    Parameters that the base does not have (a new head) are drawn from torch's global generator.

    Args:
        base: folder written by ``save_pretrained``, or a name such as ``xlm-roberta-base``.
        kind: ``"sequence-classification"``, ``"masked-lm"`` or ``"encoder"``.
        missing: a list that receives the names of those new parameters.
        options: passed to ``from_pretrained``, e.g. ``num_labels=3``.

    Raises:
        DataError: it is not there or cannot be fetched; the message says how to give a path.
    """
    import torch
    import transformers

    if kind not in _KINDS:
        raise DataError(f"kind={kind!r} is not one of {', '.join(_KINDS)}.")
    options.setdefault("dtype", torch.float32)
    loader = getattr(transformers, _KINDS[kind])
    model, info = _load(loader, base, "base model", output_loading_info=True, **options)
    if missing is not None:
        missing += sorted(info["missing_keys"])
    return model


def load_tokenizer(base: str | Path, **options: Any) -> Any:
    """Return the tokenizer beside a model, from a folder or a name on the hub.

    Raises:
        DataError: it is not there or cannot be fetched; the message says how to give a path.
    """
    import transformers

    return _load(transformers.AutoTokenizer, base, "tokenizer of", **options)
