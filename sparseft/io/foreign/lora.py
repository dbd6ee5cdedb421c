"""PEFT LoRA (``peft_type: "LORA"``) to its largest entries: lossy, with the error that is made.

Source: ``peft/tuners/lora/{layer,config}.py`` (PEFT 0.21). Per module ``lora_A.weight`` (r, n) and
``lora_B.weight`` (m, r); the weight changes by ``s * B @ A``, transposed under ``fan_in_fan_out``
(Conv1D); for embeddings by ``s * (lora_embedding_B @ lora_embedding_A).T``. ``s = alpha / r``, or
``alpha / sqrt(r)`` with ``use_rslora``; ``alpha_pattern`` may give single modules another alpha,
and r is what the matrices say; a configuration that says otherwise is refused. Trained biases
(``bias: all``) come along whole, ``lora_bias`` exactly.

A product of thin matrices has no zeros, so this keeps the ``nnz`` largest entries over all modules
(ties by name, then position) and says what that costs: the relative Frobenius error
``|change - kept| / |change|`` per parameter and in total.

What is not a low-rank change of one weight, or needs another base, is refused by name: DoRA,
QA-LoRA, activated LoRA, PiSSA, OLoRA, LoftQ and the like, convolutions, single parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseft.diff import SparseDiff
from sparseft.errors import OptionError
from sparseft.io.foreign.entries import check_dense, diff_from
from sparseft.io.foreign.found import Conversion, Found
from sparseft.io.foreign.peft import adapter_from, config_number, split_tensors
from sparseft.ops.topk import topk_patterns

__all__ = ["read"]

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_REFUSED_PARTS = {
    "lora_magnitude_vector": "DoRA rescales whole columns of the weight",
    "lora_magnitude_vector.weight": "DoRA rescales whole columns of the weight",
}
# Fields that make a file mean something else than s * B @ A added to the weights of the base.
_REFUSED_FIELDS = {
    "use_dora": "DoRA rescales whole columns of the weight",
    "use_qalora": "QA-LoRA pools the inputs",
    "use_bdlora": "block-diagonal LoRA stores blocks",
    "alora_invocation_tokens": "activated LoRA changes the weights for some tokens only",
    "arrow_config": "Arrow chooses among adapters for each token",
    "kasa_config": "KaSA changes the base's weights",
    "velora_config": "VeLoRA is not known to this reader",
    "monteclora_config": "MonteCLoRA draws its weights at random",
    "layer_replication": "layers of the base are repeated",
    "target_parameters": "single parameters (of experts) are changed, not modules",
    "trainable_token_indices": "rows of the embedding were trained beside it",
    "loftq_config": "LoftQ changes the base's weights",
}
# Those that this reader uses or that do not bear on what the tensors mean.
_KNOWN_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Ways to start from another base than the one that is named.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")


@dataclass(frozen=True)
class _Product:
    """One low-rank change: ``scale * (b @ a)``, transposed or not."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    def dense(self) -> Tensor:
        """Multiply out, in fp32 whatever the factors are."""
        product = (self.b.float() @ self.a.float()).mul_(self.scale)
        return product.t().contiguous() if self.transposed else product


def read(found: Found, *, density: float | None = None, nnz: int | None = None) -> Conversion:
    """Keep the largest entries of the low-rank changes.

    Args:
        found: the files.
        density: entries to keep, as a fraction of all entries of the changed parameters.
        nnz: entries to keep, as a number; one of the two is needed.

    Raises:
        OptionError: neither or both, or out of range.
        AdapterFormatError: damaged, hostile, or a kind of LoRA that is something else.
    """
    _check_config(found)
    parts = (*_LINEAR, "lora_B.bias", *_EMBEDDING, *_REFUSED_PARTS)
    modules, dense, lost = split_tensors(found, parts)
    products: dict[str, _Product] = {}
    diffs: dict[str, SparseDiff] = {}
    for module in sorted(modules):
        product = _product(found, module, modules[module])
        products[f"{module}.weight"] = product
        bias = modules[module].get("lora_B.bias")
        if bias is not None:
            values = found.tensors[bias].float() * product.scale
            everywhere = torch.arange(values.numel())
            shape = (values.numel(),)
            diffs[f"{module}.bias"] = diff_from(everywhere, values, shape, found.what(bias))
    if not products:
        found.fail("holds no lora_A and lora_B.")
    numel = sum(math.prod(p.shape) for p in products.values())
    count = _count(found, density, nnz, numel)

    total: dict[str, float] = {}

    def changes() -> Iterator[tuple[str, Tensor]]:
        for name, product in products.items():
            change = product.dense()
            check_dense(change, f"{found.file}: the change of {name!r}")
            total[name] = float(change.double().square().sum())
            yield name, change

    patterns = topk_patterns(changes(), count, abs=True)
    kept: dict[str, float] = {}
    for name, product in products.items():  # multiplied out again: one at a time in memory
        diff = SparseDiff.from_dense(product.dense(), patterns[name])
        kept[name] = float(diff.values.double().square().sum())
        diffs[name] = diff
    errors = {name: _error(total[name], kept[name]) for name in products}
    error = _error(sum(total.values()), sum(kept.values()))
    lost.append(f"{numel - count:,} of {numel:,} entries of the low-rank changes")
    adapter = adapter_from(
        found, diffs, dense, method="lora-topk", density=density, error=error, nnz=count
    )
    return Conversion(adapter, found.format, found.nbytes, tuple(lost), errors, error)


def _error(total: float, kept: float) -> float:
    return math.sqrt(max(0.0, total - kept) / total) if total else 0.0


def _count(found: Found, density: float | None, nnz: int | None, numel: int) -> int:
    if (density is None) == (nnz is None):
        got = "neither" if nnz is None else "both"
        raise OptionError(
            f"{found.file}: a LoRA's change has no zeros, so only its largest entries can be kept, "
            f"and that is lossy. Say how many, density=0.01 or nnz=100000 (got {got}): `sparseft "
            "convert SOURCE OUT --density 0.01` reports the error."
        )
    if density is not None and not 0 < density <= 1:
        raise OptionError(f"density is {density!r}, wanted a fraction in (0, 1].")
    count = round(density * numel) if density is not None else int(nnz or 0)
    if not 0 < count <= numel:
        raise OptionError(
            f"{count:,} entries were asked for; the changed parameters have {numel:,}, wanted 1 up "
            "to that."
        )
    return count


def _check_config(found: Found) -> None:
    for field, why in _REFUSED_FIELDS.items():
        if found.config.get(field):
            found.fail(f"{field} is set: {why}; it cannot be represented as a sparse diff.")
    start = found.config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        found.fail(
            f"init_lora_weights is {start[:40]!r}: it was trained on a changed base, so the "
            "matrices do not belong to the one it names. Convert it to plain LoRA first (PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...))."
        )
    unknown = sorted(
        k for k, v in found.config.items() if v and k not in _KNOWN_FIELDS | set(_REFUSED_FIELDS)
    )
    if unknown:
        found.fail(
            f"adapter_config.json sets {unknown[0][:60]!r}, which this reader does not know; it "
            "may change what the matrices mean."
        )


def _product(found: Found, module: str, keys: dict[str, str]) -> _Product:
    for part, why in _REFUSED_PARTS.items():
        if part in keys:
            found.fail(f"{keys[part]!r}: {why}; it cannot be represented as a sparse diff.")
    embedding = any(part in keys for part in _EMBEDDING)
    missing = [p for p in (_EMBEDDING if embedding else _LINEAR) if p not in keys]
    if missing or (embedding and any(p in keys for p in _LINEAR)):
        found.fail(f"module {module!r} lacks {(missing or ['one kind of factors'])[0]}.")
    a, b = (found.tensors[keys[p]] for p in (_EMBEDDING if embedding else _LINEAR))
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        found.fail(
            f"module {module!r}: factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, wanted "
            "(r, columns) and (rows, r). Convolutions are not read."
        )
    for key, factor in ((keys[p], t) for p, t in zip(_EMBEDDING if embedding else _LINEAR, (a, b),
                                                     strict=True)):  # fmt: skip
        check_dense(factor, found.what(key))
    _check_rank(found, module, a.shape[0])
    alpha = _pattern(found, module, "alpha_pattern", config_number(found, "lora_alpha", 8))
    rank = a.shape[0]
    scale = alpha / (math.sqrt(rank) if found.config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        found.fail(f"lora_alpha of module {module!r} is {alpha}.")
    return _Product(a, b, scale, embedding or bool(found.config.get("fan_in_fan_out")))


def _check_rank(found: Found, module: str, rank: int) -> None:
    """Refuse matrices of another rank than the configuration gives: the scale depends on it."""
    if "r" not in found.config:
        return
    own = found.config.get("rank_pattern") or {}
    said = {config_number(found, "r", rank)}
    # Whichever module each is for: the keys are regular expressions of a stranger.
    said |= {v for v in own.values() if isinstance(v, int)} if isinstance(own, dict) else set()
    if rank not in said:
        found.fail(
            f"module {module!r} has matrices of rank {rank}, but adapter_config.json says r="
            f"{found.config['r']}; the two files belong to different adapters."
        )


def _pattern(found: Found, module: str, field: str, default: float) -> float:
    """Return a module's own value, by PEFT's rule: the first key that the name ends in."""
    patterns = found.config.get(field) or {}
    if not isinstance(patterns, dict):
        found.fail(f"{field} in adapter_config.json is no mapping.")
    for key, value in patterns.items():
        # PEFT takes keys as regular expressions. Those of a stranger are not run here.
        plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if re.search(r"[^\w.-]", plain):
            found.fail(
                f"{field} has the expression {key[:80]!r}; only plain module names are read. Write "
                "out the modules."
            )
        exact = key.startswith("^")
        if module == plain or (not exact and module.endswith(f".{plain}")):
            if isinstance(value, bool) or not isinstance(value, int | float):
                found.fail(f"{field}[{key[:80]!r}] is no number.")
            return float(value)
    return default
