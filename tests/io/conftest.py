"""Adapters to write, and a forger of hostile files whose seals (digests, checksum) are right."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparseft.adapter import Adapter, AdapterMetadata, dense_digest
from sparseft.diff import SparseDiff, index_dtype_for
from sparseft.fingerprint import Fingerprint, fingerprint_tensor
from sparseft.io.gaps import GapsError, decode_gaps
from sparseft.io.safetensors_v1 import DTYPE_NAMES, checksum


def make_adapter(name: str = "sw", seed: int = 0) -> Adapter:
    """Three diffs and a head, small enough to flip every bit of the file."""
    rng = torch.Generator().manual_seed(seed)
    base = torch.randn(3, 5, generator=rng)
    keep = torch.rand(3, 5, generator=rng) < 0.5
    return Adapter(
        {
            "layer.0.weight": SparseDiff.from_dense(torch.randn(3, 5, generator=rng), keep),
            "layer.0.bias": SparseDiff.from_dense(torch.tensor([0.0, -1.5, 2.0]).bfloat16()),
            "scale": SparseDiff.from_dense(torch.tensor(0.25), mode="set"),
        },
        name=name,
        dense={"head.weight": torch.randn(2, 2, generator=rng).half()},
        metadata=AdapterMetadata(
            base_name="org/tiny",
            fingerprint=Fingerprint({"layer.0.weight": fingerprint_tensor("layer.0.weight", base)}),
            method="magnitude",
            density=0.5,
            seed=3,
            versions={"sparseft": "0.1.0", "torch": "2.13.0"},
            parents=("0" * 32,),
            extra={"languages": ["sw", "en"], "steps": 12, "note": "Kiswahili \u00e9\u4e2d"},
        ),
    )


def read_header(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length])


Edit = Callable[[dict[str, Tensor], dict[str, Any], dict[str, str]], None]


def _forge(file: Path, edit: Edit, *, seal: bool = True) -> Path:
    """Rewrite ``file`` after ``edit(tensors, listing, metadata)``, with safetensors' own writer.

    ``tensors``: by their names in the file; ``listing``: the parsed 'tensors' document;
    ``metadata``: the raw strings. With ``seal``, digests and checksum are made right again, so that
    only the checks of the contents themselves can object.
    """
    metadata = read_header(file)["__metadata__"]
    tensors = load_file(file)
    listing = json.loads(metadata["tensors"])
    before = metadata["tensors"]
    edit(tensors, listing, metadata)
    if seal:
        for name, entry in listing["diffs"].items():
            parts = [tensors.get(f"diffs/{name}/{part}") for part in ("indices", "values")]
            if all(p is not None for p in parts) and isinstance(entry, dict):
                shape = [s for s in entry.get("shape", []) if isinstance(s, int)]
                with contextlib.suppress(GapsError):  # such gaps have no digest to give
                    if parts[0].dtype == torch.uint8 and parts[0].dim() == 1:
                        numel = math.prod(shape)
                        dtype = index_dtype_for(numel)
                        parts[0] = decode_gaps(parts[0], entry["nnz"], numel, dtype)
                    diff = SparseDiff._trusted(*parts, shape, entry.get("mode"))
                    entry["digest"] = diff.digest()
        for name, entry in listing["dense"].items():
            if f"dense/{name}" in tensors:
                entry["digest"] = dense_digest(tensors[f"dense/{name}"])
    if listing != json.loads(before):
        metadata["tensors"] = json.dumps(listing)
    if seal and "checksum" in metadata:
        table = {n: (DTYPE_NAMES.get(t.dtype, "U8"), tuple(t.shape)) for n, t in tensors.items()}
        metadata["checksum"] = checksum(metadata, table)
    save_file(tensors, file, metadata)
    return file


@pytest.fixture
def adapter() -> Adapter:
    return make_adapter()


@pytest.fixture
def saved(adapter: Adapter, tmp_path: Path) -> Path:
    return adapter.save(tmp_path / "sw")


@pytest.fixture
def forge() -> Callable[..., Path]:
    return _forge


@pytest.fixture
def header_of() -> Callable[[Path], dict[str, Any]]:
    return read_header


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub on this machine (``_hub_server.Hub``) that huggingface_hub takes for the real one."""
    from huggingface_hub import constants, file_download

    where = Path(__file__).with_name("_hub_server.py")
    spec = importlib.util.spec_from_file_location("_hub_server", where)
    if spec is None or spec.loader is None:
        raise pytest.UsageError(f"{where} cannot be loaded")
    stand_in = importlib.util.module_from_spec(spec)
    sys.modules["_hub_server"] = stand_in  # dataclasses look their module up
    spec.loader.exec_module(stand_in)
    server = stand_in.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # version 0.34 copies it when it is imported
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # Its service is not of HTTP alone; without it files go by git-lfs, as from older clients.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield server
    server.stop()
