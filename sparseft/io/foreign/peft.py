"""What all adapters of PEFT (and of its forks) share: a folder with a configuration and tensors.

Source: ``peft/utils/save_and_load.py`` (PEFT 0.21). A folder holds ``adapter_config.json``
(``peft_type``, ``base_model_name_or_path``, ``target_modules``, ``modules_to_save``, ...) and
``adapter_model.safetensors`` (older: ``adapter_model.bin``, a pickle). Keys are
``base_model.model.{module}.{part}`` without the adapter's name, ``part`` being the method's own
tensors; modules trained whole (``modules_to_save``) lie there under their plain names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError
from sparseft.io.atomic import atomic_write
from sparseft.io.foreign.base import Base
from sparseft.io.foreign.entries import check_dense
from sparseft.io.foreign.found import Found, Written
from sparseft.io.foreign.names import module_of

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILES",
    "adapter_from",
    "check_writable",
    "matrix_shape",
    "split_tensors",
    "write_folder",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# Parts of tuners: where one is left over, a tensor belongs to another method than the file says.
_TUNER_PART = re.compile(
    r"^(lora_|shira_|sparseft_|supertuning_|rosa_|sft_delta|ia3_|hada_|lokr_|oft_|boft_|vera_|"
    r"vblora_|trainable_tokens|token_adapter|prompt_|adaption_|road_|bone_|miss_|hra_|c3a_|randlora_)"
)


def split_tensors(
    found: Found, parts: Sequence[str]
) -> tuple[dict[str, dict[str, str]], dict[str, Tensor], list[str]]:
    """Sort a file's tensors: the method's own by module, and those trained whole.

    Args:
        found: the file.
        parts: the method's, e.g. ``lora_A.weight``.

    Returns:
        module -> part -> key in the file; parameter -> checked tensor; what was left out.

    Raises:
        AdapterFormatError: tensors of another method, two of one parameter, a dense tensor that is
            not finite.
    """
    forms = []
    for part in parts:
        head, dot, tail = part.partition(".")
        # Some savers leave the adapter's name in.
        own = rf"{re.escape(head)}(?:\.default)?{re.escape(dot + tail)}"
        forms.append((part, re.compile(rf"^(.+)\.{own}$", re.DOTALL)))
    modules: dict[str, dict[str, str]] = {}
    dense: dict[str, Tensor] = {}
    lost: list[str] = []
    for key in found.tensors:
        hit = next(((p, m) for p, form in forms if (m := form.match(key))), None)
        if hit is not None:
            module = found.parameter(hit[1].group(1))
            if modules.setdefault(module, {}).setdefault(hit[0], key) != key:
                found.fail(f"{key[:200]!r} is there twice, under two names of one module.")
            continue
        odd = next((p for p in key.split(".") if _TUNER_PART.match(p)), None)
        if odd is not None:
            found.fail(
                f"{key[:200]!r} is no tensor of {found.format} ({', '.join(parts)}); what its "
                f"part {odd[:60]!r} does to a weight is not known to this reader."
            )
        name = found.parameter(key)
        tensor = found.tensors[key]
        if not tensor.is_floating_point():
            lost.append(f"{name}: a whole tensor of {tensor.dtype}; only floating ones are kept")
            continue
        if name in dense:
            found.fail(f"two tensors for parameter {name!r}.")
        dense[name] = check_dense(tensor, found.what(key))
    return modules, dense, lost


def matrix_shape(found: Found, name: str, key: str) -> tuple[int, int]:
    """Return the base's (rows, columns) of parameter ``name``.

    Raises:
        OptionError: no base is known.
        BaseMismatchError: the base does not have it, or it is no matrix.
    """
    shape = found.base.shape(name, found.what(key))
    if len(shape) != 2:
        found.fail(f"{key[:200]!r}: parameter {name!r} of the base is {shape}, wanted a matrix.")
    return shape[0], shape[1]


def adapter_from(
    found: Found,
    diffs: Mapping[str, SparseDiff],
    dense: Mapping[str, Tensor],
    *,
    method: str = "",
    density: float | None = None,
    **facts: Any,
) -> Adapter:
    """Build the adapter of a foreign file.

    Args:
        found: the file.
        diffs, dense: as in `Adapter`; already checked.
        method, density: for the metadata.
        facts: what else should be kept of where it comes from.

    Raises:
        AdapterFormatError: nothing in it, or a parameter both changed sparsely and stored whole.
    """
    both = sorted(set(diffs) & set(dense))
    if both:
        found.fail(
            f"{both[0]!r} has a sparse change and is stored whole, too; which one counts depends "
            "on the base. Save it again without the whole tensor (save_embedding_layers=False)."
        )
    if not diffs and not dense:
        found.fail("holds no tensor that could be converted.")
    metadata = AdapterMetadata(
        base_name=found.base_name,
        method=method,
        density=density,
        extra={"converted": {"from": found.format, **facts}},
    )
    return Adapter(diffs, name=found.name or "adapter", dense=dense, metadata=metadata)


def check_writable(
    adapter: Adapter, title: str, base: Base | None, *, matrices: bool = True
) -> None:
    """Refuse what a format cannot hold.

    Args:
        adapter: to be written.
        title: of the format, for the message.
        base: where it is known, only weights of ``nn.Linear`` pass for ``matrices``.
        matrices: the format changes weights of ``nn.Linear`` only.

    Raises:
        AdapterFormatError: "set" diffs; without ``matrices`` nothing else, with it also biases,
            embeddings and anything that is no matrix.
    """
    exclude = "Leave it out: --exclude (exclude=[...])."
    for name in adapter.names:
        head = adapter.header(name)
        if head.mode != "add":
            raise AdapterFormatError(
                f"{name!r} has mode 'set' (it replaces weights), but {title} only adds. The "
                "difference would depend on the base and not rebuild the weights bit for bit; "
                f"extract the adapter in mode 'add' instead. {exclude}"
            )
        if not matrices:
            continue
        if len(head.shape) != 2 or not name.endswith(".weight"):
            raise AdapterFormatError(
                f"{name!r} has shape {tuple(head.shape)}, but {title} changes only the weights of "
                f"nn.Linear, which are matrices. {exclude}"
            )
        kind = base.kind(name) if base is not None else ""
        if kind not in ("", "Linear") or (not kind and "embed" in module_of(name).split(".")[-1]):
            raise AdapterFormatError(
                f"{name!r} belongs to {kind or 'an embedding'}, but {title} changes only the "
                f"weights of nn.Linear. {exclude}"
            )
    heads = not matrices and adapter.dense
    if not heads and not any(adapter.header(name).nnz for name in adapter.names):
        raise AdapterFormatError(f"adapter {adapter.name!r} has no entries to write.")


def fillers(diff: SparseDiff, count: int) -> tuple[Tensor, Tensor]:
    """Return positions and values of ``diff`` with zeros added until there are ``count``.

    The zeros lie at the first positions without an entry, so none is repeated.

    Returns:
        (count,) int64 positions, ascending; (count,) values.
    """
    taken, missing = diff.indices.long(), count - diff.nnz
    free = torch.ones(diff.nnz + missing, dtype=torch.bool)
    free[taken[taken < free.numel()]] = False
    positions = torch.cat([taken, free.nonzero().view(-1)[:missing]])
    values = torch.cat([diff.values, diff.values.new_zeros(missing)])
    order = torch.argsort(positions)
    return positions[order], values[order]


def storable(values: Tensor, what: str) -> Tensor:
    """Return values in a dtype that PEFT's fp32 parameters take without rounding.

    Raises:
        AdapterFormatError: float64 values that fp32 does not hold.
    """
    if values.dtype != torch.float64:
        return values
    if not torch.equal(values.float().double(), values):
        raise AdapterFormatError(
            f"{what} has float64 values that float32, which PEFT trains in, does not hold. Round "
            "them knowingly: adapter.to(dtype=torch.float32)."
        )
    return values.float()


def _modules_to_save(adapter: Adapter, base: Base | None) -> list[str]:
    """Return the modules of the dense tensors; PEFT stores and loads those whole.

    Raises:
        AdapterFormatError: a tensor of no module, or of one with tensors that are not there.
    """
    modules = sorted({module_of(name) for name in adapter.dense})
    if "" in modules:
        name = next(n for n in adapter.dense if not module_of(n))
        raise AdapterFormatError(
            f"dense tensor {name!r} belongs to no module; PEFT stores whole modules. Leave it out: "
            "--exclude (exclude=[...])."
        )
    others = {*adapter.names, *(base.names() if base is not None else ())} - set(adapter.dense)
    for module in modules:
        missing = next((n for n in sorted(others) if n.startswith(f"{module}.")), None)
        if missing is not None:
            raise AdapterFormatError(
                f"the adapter replaces tensors of module {module!r}, but not {missing!r}; PEFT "
                "stores whole modules. Leave them out: --exclude (exclude=[...])."
            )
    # A module inside another one of the list is stored with it.
    return [m for m in modules if not any(m.startswith(f"{other}.") for other in modules)]


def write_folder(
    adapter: Adapter,
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    base: Base | None,
    overwrite: bool,
    added: Sequence[str] = (),
) -> Written:
    """Write the tensors of a method, the dense ones and the configuration.

    The configuration is what makes an adapter of a folder: it comes last, and an old one goes
    before its tensors do. Killed in between, the folder holds no adapter, not one of two halves.

    Args:
        adapter: whose dense tensors and base name go in, too.
        folder: made if missing.
        tensors: ``{module}.{part}`` -> tensor.
        config: the method's fields; ``target_modules`` is a pattern for exactly the modules of
            ``tensors``, as lists of names match by their ends.
        base: whose name the configuration gives.
        overwrite: whether files already there may be replaced.
        added: passed on.

    Raises:
        FileExistsError: a file is there, and ``overwrite`` is False.
    """
    from safetensors.torch import save

    targets = sorted({key.partition("\0")[0] for key in tensors})
    everything = {f"{_PREFIX}{key.replace(chr(0), '.')}": t for key, t in tensors.items()}
    everything |= {f"{_PREFIX}{name}": t for name, t in adapter.dense.items()}
    named = base.name if base is not None else None
    whole = {
        "base_model_name_or_path": named or adapter.metadata.base_name,
        "inference_mode": True,
        "modules_to_save": _modules_to_save(adapter, base) or None,
        "target_modules": "|".join(map(re.escape, targets)),
        "task_type": None,
    } | dict(config)
    files = (folder / WEIGHTS_FILES[0], folder / CONFIG_FILE)
    for file in files:
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists already; pass overwrite=True or another folder.")
    stale = folder / WEIGHTS_FILES[1]
    if stale.exists():
        raise FileExistsError(f"{stale} is another adapter's; choose another folder.")
    payload = save(
        {n: t.detach().cpu().contiguous().clone() for n, t in sorted(everything.items())},
        metadata={"format": "pt"},
    )
    text = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    # Put in place in the reverse order, after all has been written that could fail.
    with (
        atomic_write(files[1], overwrite=overwrite) as config_out,
        atomic_write(files[0], overwrite=overwrite) as out,
    ):
        for stream, content in ((config_out, text.encode("utf-8")), (out, payload)):
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        files[1].unlink(missing_ok=True)
    nbytes = sum(os.path.getsize(file) for file in files)
    entries = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    return Written(files, nbytes, entries, added=tuple(added))


def config_number(found: Found, key: str, default: float) -> float:
    """Return a number of the configuration.

    Raises:
        AdapterFormatError: no number.
    """
    value = found.config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterFormatError(
            f"{found.file}: {key} in {CONFIG_FILE} is {json.dumps(value)[:60]}, wanted a number."
        )
    return float(value)
