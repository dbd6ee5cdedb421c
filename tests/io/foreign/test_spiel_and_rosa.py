"""SpIEL and RoSA: folders written by their documented layouts, read back; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.errors import AdapterFormatError, BaseMismatchError, OptionError
from sparseft.io import foreign

QUERY = "roberta.encoder.layer.0.attention.self.query"
OUTPUT = "roberta.encoder.layer.0.output.dense"
Folder = Callable[..., Path]


def spiel(adapter: Adapter, **config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Lay out as SpIEL does after a reselection: positions in no order."""
    tensors: dict[str, Tensor] = {}
    counts = {}
    for name, diff in adapter.items():
        module = name.removesuffix(".weight")
        order = torch.randperm(diff.nnz, generator=torch.Generator().manual_seed(0))
        tensors[f"{module}.sft_delta.values"] = diff.values[order]
        tensors[f"{module}.sft_delta.indices"] = diff.indices[order]
        counts[module] = diff.nnz
    return {"peft_type": "SFT", "num_deltas": counts} | config, tensors


def rosa(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Lay out as RoSA does: CSR with 16-bit columns, and what its kernels keep beside it."""
    tensors: dict[str, Tensor] = {}
    for name, diff in adapter.items():
        module = name.removesuffix(".weight")
        rows, columns = diff.shape
        flat = diff.indices.long()
        offsets = torch.zeros(rows + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(flat // columns, minlength=rows).cumsum(0)
        tensors |= {
            f"{module}.rosa_spa.values": diff.values,
            f"{module}.rosa_spa.row_offs": offsets.to(torch.int32),
            f"{module}.rosa_spa.row_idx": offsets.diff().argsort(descending=True).to(torch.int16),
            f"{module}.rosa_spa.col_idx": (flat % columns).to(torch.int16),
            f"{module}.rosa_spa.tr_perm": torch.zeros(diff.nnz, dtype=torch.int32),
        }
    return {"peft_type": "ROSA", "r": 0, "d": 0.1}, tensors


@pytest.mark.parametrize("pickle", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("layout", [spiel, rosa], ids=["spiel", "rosa"])
def test_both_are_read_exactly(
    linear_adapter: Adapter, base: Path, peft_folder: Folder, layout: Any, pickle: bool
):
    config, tensors = layout(linear_adapter)
    head = torch.randn(3, 16)
    tensors["classifier.out_proj.weight"] = head
    folder = peft_folder(config, tensors, pickle=pickle)
    adapter = foreign.read(folder, base=base).adapter
    for name, diff in linear_adapter.items():
        assert adapter[name].equals(diff)
    assert torch.equal(adapter.dense["classifier.out_proj.weight"], head)
    assert set(adapter.metadata.fingerprint.tensors) == set(linear_adapter)
    assert adapter.metadata.base_name == base.name


def test_the_base_is_found_by_the_configuration(
    linear_adapter: Adapter, base: Path, peft_folder: Folder
):
    config, tensors = spiel(linear_adapter, base_model_name_or_path=str(base))
    folder = peft_folder(config, tensors)
    adapter = Adapter.load(folder)
    assert adapter.names == linear_adapter.names
    assert Adapter.load(folder / "adapter_config.json").equals(adapter)
    assert Adapter.load(folder / "adapter_model.safetensors").equals(adapter)


def test_a_base_in_the_cache_of_downloads_is_found_by_name(
    linear_adapter: Adapter,
    base: Path,
    peft_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_bytes((base / "config.json").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config, tensors = spiel(linear_adapter, base_model_name_or_path="org/tiny")
    folder = peft_folder(config, tensors)
    assert Adapter.load(folder).names == linear_adapter.names
    assert Adapter.load(folder).metadata.base_name == "org/tiny"
    assert Adapter.from_pretrained(folder).equals(Adapter.load(folder))


@pytest.mark.parametrize(
    ("named", "why"),
    [
        (None, "names no base"),
        ("org/not-here", "'org/not-here' is neither a folder here nor in the cache"),
        ("/no/such/folder", "no folder /no/such/folder"),
    ],
)
def test_without_a_base_the_error_says_what_to_give(
    linear_adapter: Adapter, peft_folder: Folder, named: str | None, why: str
):
    config, tensors = spiel(linear_adapter, base_model_name_or_path=named)
    with pytest.raises(OptionError, match=r"without the shapes.*--base FOLDER") as caught:
        Adapter.load(peft_folder(config, tensors))
    assert why in str(caught.value)


def test_spiel_is_written_sorted_and_read_back(linear_adapter: Adapter, base: Path, tmp_path: Path):
    from safetensors.torch import load_file

    foreign.write(linear_adapter, tmp_path, "spiel", base=base)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = f"base_model.model.{QUERY}.sft_delta"
    assert torch.equal(tensors[f"{key}.indices"], linear_adapter[f"{QUERY}.weight"].indices)
    assert torch.equal(tensors[f"{key}.values"], linear_adapter[f"{QUERY}.weight"].values)
    assert Adapter.load(tmp_path).equals(linear_adapter)


def _spiel_edit(**edit: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def apply(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for part, change in edit.items():
            if part == "config":
                config |= change
            else:
                key = f"{QUERY}.sft_delta.{part}"
                tensors[key] = change(tensors[key])

    return apply


def _set(at: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[at] = value
        return tensor

    return change


BAD_SPIEL = {
    "repeated": (_spiel_edit(indices=lambda t: t.index_fill(0, torch.tensor([0, 1]), 5)),
                 "a duplicate"),
    "outside": (_spiel_edit(indices=_set(0, 256)), r"out of range.*256 entries"),
    "negative": (_spiel_edit(indices=_set(0, -1)), "negative"),
    "float": (_spiel_edit(indices=lambda t: t.float() + 0.5), "not all whole numbers"),
    "fewer": (_spiel_edit(indices=lambda t: t[1:]), "values for"),
    "NaN": (_spiel_edit(values=_set(1, float("nan"))), "must be finite"),
    "counts": (_spiel_edit(config={"num_deltas": {QUERY: 3}}), "num_deltas says 3"),
    "counts of others": (_spiel_edit(config={"num_deltas": {"x": 3}}), "names module 'x'"),
    "counts a list": (_spiel_edit(config={"num_deltas": [1]}), "num_deltas .* no mapping"),
    "integers": (_spiel_edit(values=lambda t: t.long()), "values are torch.int64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SPIEL, ids=str)
def test_damaged_spiel_is_refused(
    linear_adapter: Adapter, base: Path, peft_folder: Folder, case: str
):
    edit, message = BAD_SPIEL[case]
    config, tensors = spiel(linear_adapter)
    edit(config, tensors)
    folder = peft_folder(config, tensors)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        foreign.read(folder, base=base)
    assert str(folder / "adapter_model.safetensors") in str(caught.value)


def test_half_a_module_and_another_methods_tensors_are_refused(
    linear_adapter: Adapter, base: Path, peft_folder: Folder
):
    config, tensors = spiel(linear_adapter)
    del tensors[f"{QUERY}.sft_delta.values"]
    with pytest.raises(AdapterFormatError, match=r"query' lacks sft_delta\.values"):
        foreign.read(peft_folder(config, tensors), base=base)
    config, tensors = spiel(linear_adapter)
    tensors[f"{QUERY}.lora_A.weight"] = torch.ones(2, 16)
    with pytest.raises(AdapterFormatError, match="'lora_A' does to a weight is not known"):
        foreign.read(peft_folder(config, tensors), base=base)


def test_another_base_is_refused_with_both_shapes(
    linear_adapter: Adapter, peft_folder: Folder, tmp_path: Path
):
    config, tensors = rosa(linear_adapter)
    shapes = {n: tuple(d.shape) for n, d in linear_adapter.items()}
    with pytest.raises(AdapterFormatError, match=r"has 16 rows, but .* of the base has 8"):
        foreign.read(peft_folder(config, tensors), base=shapes | {f"{QUERY}.weight": (8, 16)})
    with pytest.raises(BaseMismatchError, match=rf"no parameter '{QUERY}.weight'.*Is it the base"):
        foreign.read(peft_folder(config, tensors), base={"other.weight": (8, 16)})


def test_rosas_columns_past_int16_are_recovered(peft_folder: Folder):
    """Columns above 32,767 have wrapped to negative numbers in the file."""
    columns = torch.tensor([3, 40000, 65535])
    tensors = {
        "wide.rosa_spa.values": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
        "wide.rosa_spa.row_offs": torch.tensor([0, 2, 3], dtype=torch.int32),
        "wide.rosa_spa.col_idx": columns.to(torch.int16),
    }
    assert tensors["wide.rosa_spa.col_idx"].min() < 0
    folder = peft_folder({"peft_type": "ROSA"}, tensors)
    diff = foreign.read(folder, base={"wide.weight": (2, 65536)}).adapter["wide.weight"]
    assert diff.indices.tolist() == [3, 40000, 65536 + 65535]
    assert diff.dtype == torch.bfloat16
    with pytest.raises(AdapterFormatError, match=r"65,537 columns.*cannot be recovered"):
        foreign.read(folder, base={"wide.weight": (2, 65537)})
    with pytest.raises(AdapterFormatError, match=r"column 65535 \(entry 2\) is outside"):
        foreign.read(folder, base={"wide.weight": (2, 50000)})


def test_rosas_low_rank_part_is_refused_or_dropped_with_a_word(
    linear_adapter: Adapter, peft_folder: Folder
):
    config, tensors = rosa(linear_adapter)
    for name, diff in linear_adapter.items():
        module = name.removesuffix(".weight")
        tensors[f"{module}.rosa_A.weight"] = torch.randn(4, diff.shape[1])
        tensors[f"{module}.rosa_B.weight"] = torch.randn(diff.shape[0], 4)
    folder = peft_folder(config, tensors)
    with pytest.raises(AdapterFormatError, match=r"rosa_A\.weight' is the low-rank part"):
        Adapter.load(folder)
    conversion = foreign.read(folder, drop_low_rank=True)  # the columns are those of rosa_A
    assert conversion.lost == ("the low-rank part of 3 modules",)
    assert all(conversion.adapter[n].equals(d) for n, d in linear_adapter.items())


def _rosa_edit(part: str, change: Callable[[Tensor], Tensor]) -> Any:
    return lambda tensors: tensors.update(
        {f"{OUTPUT}.rosa_spa.{part}": change(tensors[f"{OUTPUT}.rosa_spa.{part}"])}
    )


BAD_ROSA = {
    "falling offsets": (_rosa_edit("row_offs", _set(3, 10_000)), "wanted rising offsets"),
    "offsets from 1": (_rosa_edit("row_offs", _set(0, 1)), "runs from 1"),
    "offsets past the values": (_rosa_edit("row_offs", _set(-1, 10_000)), "wanted rising offsets"),
    "offsets too short": (_rosa_edit("row_offs", lambda t: t[:1]), r"\(1,\), wanted \(rows"),
    "a column outside": (_rosa_edit("col_idx", _set(0, 24)), "column 24"),
    "a wrapped column": (_rosa_edit("col_idx", _set(0, -1)), "column 65535"),
    "fewer columns": (_rosa_edit("col_idx", lambda t: t[1:]), "has shape"),
    "infinite": (_rosa_edit("values", _set(0, float("inf"))), "must be finite"),
}


@pytest.mark.parametrize("case", BAD_ROSA, ids=str)
def test_damaged_rosa_is_refused(
    linear_adapter: Adapter, base: Path, peft_folder: Folder, case: str
):
    edit, message = BAD_ROSA[case]
    config, tensors = rosa(linear_adapter)
    edit(tensors)
    with pytest.raises(AdapterFormatError, match=message):
        foreign.read(peft_folder(config, tensors), base=base)


def test_rosa_before_its_masks_were_made(linear_adapter: Adapter, base: Path, peft_folder: Folder):
    config, tensors = rosa(linear_adapter)
    tensors[f"{OUTPUT}.rosa_spa.row_offs"].zero_()
    conversion = foreign.read(peft_folder(config, tensors), base=base)
    assert conversion.lost == ("1 modules whose mask was never made",)
    assert f"{OUTPUT}.weight" not in conversion.adapter
    for key in tensors:
        if key.endswith("row_offs"):
            tensors[key].zero_()
    with pytest.raises(AdapterFormatError, match="no tensor that could be converted"):
        foreign.read(peft_folder(config, tensors), base=base)
