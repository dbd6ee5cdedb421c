"""The model card of an adapter on the hub: README.md, made of what the adapter itself says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from sparseft._text import human_bytes
from sparseft.io.hub import is_hub_name

if TYPE_CHECKING:
    from sparseft.adapter import Adapter

__all__ = ["CARD_MARK", "model_card"]

# Tells a card written here, which the next upload replaces, from one that somebody wrote.
CARD_MARK = "<!-- written by sparseft; without this line it is kept as it is -->"


def model_card(adapter: Adapter, name: str | None = None) -> str:
    """Return the card of ``adapter``: YAML front matter, then Markdown.

    The same adapter gives the same card. It holds no time and no path, and no number that was not
    computed from the adapter.

    Args:
        adapter: what the card is of; only headers and the digest are read.
        name: its name on the hub (``owner/name``), for the lines that load it.
    """
    meta = adapter.metadata
    numel = sum(adapter.header(n).numel for n in adapter.names)
    modes = sorted({adapter.header(n).mode for n in adapter.names})
    dtypes = sorted({_dtype(adapter.header(n).dtype) for n in adapter.names})
    heads = [f"{_code(n)} {_shape(t.shape)}" for n, t in adapter.dense.items()]
    density = f"{adapter.nnz / numel:.4%}" if numel else "0"
    asked = "" if meta.density is None else f" ({meta.density:g} was asked for)"
    facts = {
        "base": _code(meta.base_name) if meta.base_name else "not recorded",
        "base fingerprint": f"of {len(meta.fingerprint.tensors)} tensors; checked before use"
        if meta.fingerprint
        else "none",
        "changed entries": f"{adapter.nnz:,} of {numel:,} in {len(adapter)} tensors",
        "density": density + asked,
        "values": f"{', '.join(dtypes) or 'none'}; mode {', '.join(modes) or 'none'}",
        "fully trained tensors": ", ".join(heads) or "none",
        "method": _code(meta.method) if meta.method else "not recorded",
        "seed": "not recorded" if meta.seed is None else str(meta.seed),
        "trained on top of": ", ".join(map(_code, meta.parents)) or "the base alone",
        "versions": ", ".join(f"{_plain(n)} {_plain(v)}" for n, v in sorted(meta.versions.items())),
        "size in memory": human_bytes(adapter.nbytes),
        "digest": _code(adapter.digest),
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    key, where = _literal(adapter.name), _literal(name if name is not None else "owner/name")
    return f"""\
---
{yaml.safe_dump(_front_matter(adapter), sort_keys=False, allow_unicode=True)}---
{CARD_MARK}

# {_plain(adapter.name)}

A sparse diff: the few entries of the base model that were trained, their positions and their
values. It is put on the base exactly, composed with other adapters of the same base, and taken off
again bit for bit, by the Python package sparseft.

| | |
|---|---|
{table}

## Use

```python
import sparseft

composer = sparseft.Composer(model, {{{key}: {where}}})  # model: the base
composer.switch([{key}])
...
composer.revert()  # the base again, bit for bit

adapter = sparseft.Adapter.from_pretrained({where})  # the tensors themselves
```
"""


def _front_matter(adapter: Adapter) -> dict[str, Any]:
    found: dict[str, Any] = {"library_name": "sparseft"}
    base = adapter.metadata.base_name
    # The hub refuses a card whose base is not one of its names; the table names it all the same.
    if base and is_hub_name(base):
        found |= {"base_model": base, "base_model_relation": "adapter"}
    tags = ["sparseft", "sparse-fine-tuning", "adapter"]
    if adapter.metadata.method:
        tags.append(_plain(adapter.metadata.method))
    return found | {"tags": tags}


def _plain(text: str) -> str:
    """Return ``text`` on one line, without what Markdown or HTML would take for its own."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", flat) or "unnamed"


def _code(text: str) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return "`" + flat.replace("`", "'").replace("|", "\\|") + "`"


def _literal(text: str) -> str:
    """Return ``text`` as a Python string in double quotes, on one line, ending no code block."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\x60")
    return '"' + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in escaped) + '"'


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
