"""Compose onto a transformers model and write the result as an ordinary checkpoint."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sparseft.adapter import Adapter
from sparseft.composition.coefficients import Coeffs, as_coeffs
from sparseft.composition.composer import Composer
from sparseft.composition.fit import Dense, Missing
from sparseft.composition.merge import AdapterLike, load_named
from sparseft.errors import CompositionError
from sparseft.io import atomic_write_json
from sparseft.io.hub import first_line, load_from_anywhere

__all__ = ["RECIPE_FILE", "merge_into_checkpoint"]

logger = logging.getLogger(__name__)

RECIPE_FILE = "sparseft_composition.json"
# Output layers of transformers' sequence classifiers: one row per label.
_CLASSIFIER_OUTPUTS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.spm", "*.bpe.*",
)  # fmt: skip


def merge_into_checkpoint(
    model: nn.Module | str | os.PathLike[str],
    adapters: Sequence[AdapterLike] | Mapping[str, AdapterLike],
    coeffs: Coeffs = None,
    out_dir: str | os.PathLike[str] = "merged",
    *,
    method: str = "linear",
    architecture: str | None = None,
    overwrite: bool = False,
    check_base: bool = True,
    dense: Dense = "auto",
    missing: Missing = "auto",
    **options: Any,
) -> Path:
    """Write base + adapters as a stock checkpoint, by ``save_pretrained``.

    The folder appears whole or not at all. A live model is as before afterwards. Beside the weights
    lie the tokenizer (of a base given by name or folder) and the recipe, `RECIPE_FILE`.

    Args:
        model: a transformers model, or the folder or hub name of one.
        adapters, coeffs, method, options: as in `compose_adapters`.
        out_dir: the folder to write.
        architecture: class of transformers to load a folder or name with; default: a sequence
            classifier if an adapter has such a head, else the class the checkpoint names.
        overwrite: whether an existing folder may be replaced.
        check_base, dense, missing: as in `Composer`.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists and ``overwrite`` is False.
        CompositionError: the base cannot be loaded, or a head would be written with random weights;
            and what `Composer.apply` raises.
    """
    target = Path(out_dir)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; pass overwrite=True or another folder.")
    named = load_named(adapters)
    given = as_coeffs(list(named), coeffs, named)
    source = None if isinstance(model, nn.Module) else str(model)
    live: Any = model if source is None else _load(source, architecture, named)
    if not hasattr(live, "save_pretrained"):
        raise CompositionError(
            f"{type(live).__name__} has no save_pretrained; only transformers models can be "
            "written as a checkpoint. Save the state_dict inside Composer.composed(...) instead."
        )
    composer = Composer(live, named, check_base=check_base, dense=dense, missing=missing)
    with composer.composed(given, method=method, **options), _new_folder(target) as folder:
        live.save_pretrained(folder)
        if source is not None:
            _copy_tokenizer(source, folder)
        recipe = [
            {"name": n, "digest": composer[n].digest, "coeff": c} for n, c in sorted(given.items())
        ]
        content = {"method": method, "options": options, "adapters": recipe}
        atomic_write_json(folder / RECIPE_FILE, content)
    return target


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder that takes the place of ``target`` when the block ends without error."""
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    tag = secrets.token_hex(6)
    temporary = target.with_name(f".{target.name}.{tag}.tmp")
    aside = target.with_name(f".{target.name}.{tag}.old")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            os.replace(target, aside)
        try:
            os.replace(temporary, target)
        except BaseException:
            if aside.exists():
                os.replace(aside, target)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _labels(adapters: Mapping[str, Adapter]) -> int | None:
    """Return the number of labels of the classifier that an adapter brings, if one does."""
    for adapter in adapters.values():
        for name in _CLASSIFIER_OUTPUTS:
            if name in adapter.dense:
                return int(adapter.dense[name].shape[0])
    return None


def _load(source: str, architecture: str | None, adapters: Mapping[str, Adapter]) -> nn.Module:
    """Load a model in its checkpoint's dtype; all parameters come from there or an adapter."""
    import transformers

    labels = _labels(adapters)

    def load(**where: Any) -> Any:
        extra: dict[str, Any] = {}
        config = transformers.AutoConfig.from_pretrained(source, **where)
        if architecture is None and labels is not None:
            loader: Any = transformers.AutoModelForSequenceClassification
            extra["num_labels"] = labels
        else:
            name = architecture or next(iter(getattr(config, "architectures", None) or ()), None)
            loader = getattr(transformers, name or "AutoModel", None)
            if loader is None:
                raise CompositionError(
                    f"transformers has no class {name!r}; pass architecture='AutoModelFor...'."
                )
            if labels is not None and "SequenceClassification" in str(name):
                extra["num_labels"] = labels
        return loader.from_pretrained(
            source,
            dtype="auto",
            output_loading_info=True,
            adapter_kwargs=where,  # where PEFT is installed it looks for adapters by itself
            **extra,
            **where,
        )

    if source.startswith((".", "/", "~")) and not (Path(source).expanduser()).is_dir():
        raise CompositionError(
            f"base model: no folder {source}. Give a folder written by save_pretrained, or a name."
        )
    try:
        model, info = load_from_anywhere(source, load)
    except CompositionError:
        raise
    except (OSError, ValueError) as bad:
        raise CompositionError(
            f"base model {source!r} cannot be loaded: {first_line(bad)}. Without a network, give "
            "the path of a folder written by save_pretrained, or one downloaded elsewhere "
            "(hf download NAME --local-dir FOLDER)."
        ) from bad
    brought = {name for adapter in adapters.values() for name in adapter.dense}
    random = sorted(set(info["missing_keys"]) - brought)
    if random:
        raise CompositionError(
            f"{type(model).__name__} has parameters that neither {source!r} nor an adapter holds "
            f"({', '.join(random[:3])}{', ...' if len(random) > 3 else ''}); they would be written "
            "with random values. Pass another architecture, or an adapter with that head."
        )
    return model


def _copy_tokenizer(source: str, folder: Path) -> None:
    origin = Path(source)
    if origin.is_dir():
        for pattern in _TOKENIZER_FILES:
            for file in sorted(origin.glob(pattern)):
                if file.is_file():
                    shutil.copy2(file, folder / file.name)
        return
    import transformers

    def load(**where: Any) -> Any:
        return transformers.AutoTokenizer.from_pretrained(source, **where)

    try:
        load_from_anywhere(source, load).save_pretrained(folder)
    except (OSError, ValueError) as bad:
        logger.warning("no tokenizer was found beside %s (%s)", source, bad)
