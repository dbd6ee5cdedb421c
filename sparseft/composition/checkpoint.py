"""Compose onto a transformers model and write the result as an ordinary checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sparseft.adapter import Adapter
from sparseft.composition.checkpoint_card import RECIPE_FILE, make_recipe, write_recipe
from sparseft.composition.checkpoint_folder import check_outside, check_replaceable, new_folder
from sparseft.composition.checkpoint_stream import StoredOtherwiseError, StreamedMerge
from sparseft.composition.checkpoint_target import Heads, build_target, class_for, heads_of
from sparseft.composition.coefficients import Coeffs, as_coeffs
from sparseft.composition.composer import Composer
from sparseft.composition.fit import Dense, Loaded, Missing
from sparseft.composition.merge import AdapterLike, load_named
from sparseft.composition.registry import recipe_of
from sparseft.errors import CompositionError
from sparseft.io import atomic_write_json
from sparseft.io.checkpoint_files import CheckpointFiles
from sparseft.io.hub import first_line, load_from_anywhere
from sparseft.io.model_folder import copy_companions, find_model, has_tokenizer, shown_name

__all__ = ["RECIPE_FILE", "merge_into_checkpoint"]

logger = logging.getLogger(__name__)


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
    """Write base + adapters as a stock checkpoint that holds what a `Composer` would put on it.

    A base given by folder or name is streamed: one tensor is in memory at a time, beside the
    adapters. Files and names stay as the base has them (shards, index, metadata, where tied weights
    lie; pytorch_model.bin becomes safetensors), so do dtypes, except that what is stored narrower
    than config.json says is written in that dtype, in which it is loaded. Everything else in the
    folder (configurations, tokenizer, processors) is copied. A live model is written by its
    ``save_pretrained`` and is as before afterwards. The folder appears whole or not at all, with
    the recipe, `RECIPE_FILE`, and a model card.

    Args:
        model: the folder or hub name of a transformers model, or the model itself.
        adapters, coeffs, method, options: as in `compose_adapters`.
        out_dir: the folder to write.
        architecture: class of transformers the checkpoint is for; default: a sequence classifier
            if an adapter has such a head, the class an extracted head was taken from, else the
            class the base names.
        overwrite: whether an existing folder of a model may be replaced. One that holds anything
            else never is, nor one that appears meanwhile unless this is True.
        check_base, dense, missing: as in `Composer`.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists and ``overwrite`` is False. If it has appeared while the
            checkpoint was being made, both are kept; the message says where.
        CompositionError: the folder is no model's, or lies in the base's; the base cannot be found
            or read, or a head would be written with random weights; and what `Composer.apply`
            raises. Nothing has been written then.
        OSError: writing failed; what was there before is there still.
    """
    target = Path(out_dir)
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} exists already; pass overwrite=True (--overwrite) or another folder."
        )
    named = load_named(adapters)
    parts = adapters.values() if isinstance(adapters, Mapping) else adapters
    check_replaceable(target, [x for x in (model, *parts) if isinstance(x, str | os.PathLike)])
    given = as_coeffs(list(named), coeffs, named)
    recipe_of(method, options)  # unknown methods and options are told before anything is read
    if isinstance(model, nn.Module):
        composer = _composer(model, named, check_base, dense, missing)
        _write_whole(composer, None, given, target, overwrite, method, options)
        return target
    folder = find_model(model)
    check_outside(target, folder)
    loaded = sorted((Loaded(n, a) for n, a in named.items()), key=lambda x: x.order)
    # A head with coefficient 0 is not there.
    heads = heads_of(x.adapter for x in loaded if given[x.name] and dense != "skip")
    recipe = make_recipe(shown_name(model), loaded, given, method, options)
    try:
        meta = build_target(folder, architecture, heads)
        merge = StreamedMerge(
            CheckpointFiles(folder), meta, loaded, given, method=method, options=options,
            check_base=check_base, dense=dense, missing=missing,
        )  # fmt: skip
    except StoredOtherwiseError as reason:
        logger.warning("%s The model is loaded whole instead of streamed.", reason)
        live = _load_whole(folder, architecture, heads, named)
        composer = _composer(live, named, check_base, dense, missing)
        _write_whole(composer, (str(model), folder), given, target, overwrite, method, options)
        return target
    except FileNotFoundError as bad:
        raise CompositionError(str(bad)) from bad
    with new_folder(target, overwrite) as new:
        merge.write(new)
        _copy_rest(str(model), folder, new)
        if meta.config is not None:
            atomic_write_json(new / "config.json", meta.config)
        write_recipe(new, recipe, type(meta.model).__name__, merge.skipped)
    return target


def _copy_rest(source: str, folder: Path, new: Path) -> None:
    """Copy what belongs to the base beside its weights."""
    copy_companions(folder, new)
    if has_tokenizer(new) or Path(source).expanduser().is_dir():
        return
    # A download may have been of the weights alone.
    import transformers

    def load(**where: Any) -> Any:
        return transformers.AutoTokenizer.from_pretrained(source, **where)

    try:
        load_from_anywhere(source, load).save_pretrained(new)
    except (OSError, ValueError) as bad:
        logger.warning("no tokenizer was found beside %s (%s)", source, first_line(bad))


# Models that are in memory as a whole.


def _composer(
    live: nn.Module, named: Mapping[str, Adapter], check_base: bool, dense: Dense, missing: Missing
) -> Composer:
    if not hasattr(live, "save_pretrained"):
        raise CompositionError(
            f"{type(live).__name__} has no save_pretrained; only transformers models can be "
            "written as a checkpoint. Save the state_dict inside Composer.composed(...) instead."
        )
    return Composer(live, named, check_base=check_base, dense=dense, missing=missing)


def _write_whole(
    composer: Composer,
    source: tuple[str, Path] | None,
    given: Mapping[str, float],
    target: Path,
    overwrite: bool,
    method: str,
    options: Mapping[str, Any],
) -> None:
    """Write a live model by its ``save_pretrained``; ``source`` is where it was loaded from."""
    live: Any = composer.model
    base = source[0] if source else getattr(getattr(live, "config", None), "_name_or_path", "")
    name = shown_name(base) if base else None
    loaded = [Loaded(n, composer[n]) for n in given]
    recipe = make_recipe(name, loaded, given, method, options)
    with (
        composer.composed(given, method=method, **options),
        new_folder(target, overwrite) as folder,
    ):
        if source is not None:
            _copy_rest(*source, folder)
        live.save_pretrained(folder)
        write_recipe(folder, recipe, type(live).__name__, composer.skipped)


def _load_whole(
    folder: Path, architecture: str | None, heads: Heads, adapters: Mapping[str, Adapter]
) -> nn.Module:
    """Load a model in its checkpoint's dtype; all parameters come from there or an adapter."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = class_for(config, architecture, heads)
    labels = {"num_labels": heads.labels} if heads.labels and "Classification" in name else {}
    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype="auto", output_loading_info=True, **labels
    )
    brought = {tensor for adapter in adapters.values() for tensor in adapter.dense}
    random = sorted(set(info["missing_keys"]) - brought)
    if random:
        raise CompositionError(
            f"{type(model).__name__} has parameters that neither {str(folder)!r} nor an adapter "
            f"holds ({', '.join(random[:3])}{', ...' if len(random) > 3 else ''}); they would be "
            "written with random values. Pass another --architecture (architecture=...), or an "
            "adapter with that head."
        )
    return model
