"""Files: everything that is written or read from disk goes through here.

`save_adapter` / `load_adapter` for adapters (format in `safetensors_v1`), `push_adapter` /
`download_adapter` for those on the hub, `atomic_write` and its text and JSON forms for anything
else. Converters of other projects' formats get one module each.
"""

from __future__ import annotations

from sparseft.io.atomic import atomic_write, atomic_write_json, atomic_write_text
from sparseft.io.card import model_card
from sparseft.io.hub import download_adapter
from sparseft.io.load import load_adapter
from sparseft.io.push import push_adapter
from sparseft.io.safetensors_v1 import adapter_file, save_adapter

__all__ = [
    "adapter_file",
    "atomic_write",
    "atomic_write_json",
    "atomic_write_text",
    "download_adapter",
    "load_adapter",
    "model_card",
    "push_adapter",
    "save_adapter",
]
