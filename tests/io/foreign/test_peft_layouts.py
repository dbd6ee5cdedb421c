"""PEFT's layouts without PEFT: variants of its files, what it cannot hold, damaged files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError, BaseMismatchError, OptionError, UnknownNameError
from sparseft.io import foreign

QUERY = "roberta.encoder.layer.0.attention.self.query"
OUTPUT = "roberta.encoder.layer.0.output.dense"
Folder = Callable[..., Path]


def shira(diff: SparseDiff, module: str = OUTPUT) -> dict[str, Tensor]:
    flat, columns = diff.indices.long(), diff.shape[1]
    return {
        f"{module}.shira_weight": diff.values,
        f"{module}.shira_indices": torch.stack([flat // columns, flat % columns]).to(torch.int32),
    }


def supertuning(diff: SparseDiff, module: str = OUTPUT) -> dict[str, Tensor]:
    return {
        f"{module}.supertuning_values": diff.values,
        f"{module}.supertuning_indices": diff.indices,
    }


@pytest.fixture
def diff(linear_adapter: Adapter) -> SparseDiff:
    return linear_adapter[f"{OUTPUT}.weight"]


def test_indices_in_any_order_and_as_floats_of_windows(
    diff: SparseDiff, base: Path, peft_folder: Folder
):
    order = torch.randperm(diff.nnz, generator=torch.Generator().manual_seed(0))
    tensors = shira(diff)
    weight, index = tensors
    tensors = {weight: tensors[weight][order], index: tensors[index][:, order].float()}
    adapter = foreign.read(peft_folder({"peft_type": "SHIRA"}, tensors), base=base).adapter
    assert adapter[f"{OUTPUT}.weight"].equals(diff)


def test_fan_in_fan_out_turns_rows_and_columns(diff: SparseDiff, peft_folder: Folder):
    config = {"peft_type": "SHIRA", "fan_in_fan_out": True}
    shapes = {f"{OUTPUT}.weight": (24, 16)}
    adapter = foreign.read(peft_folder(config, shira(diff)), base=shapes).adapter
    assert torch.equal(adapter[f"{OUTPUT}.weight"].to_dense(), diff.to_dense().t())


def test_an_adapters_name_left_in_the_keys(diff: SparseDiff, base: Path, peft_folder: Folder):
    tensors = {f"{k}.default": t for k, t in shira(diff).items()}
    folder = peft_folder({"peft_type": "SHIRA"}, tensors)
    assert foreign.read(folder, base=base).adapter[f"{OUTPUT}.weight"].equals(diff)
    folder = peft_folder({"peft_type": "SHIRA"}, tensors | shira(diff))
    with pytest.raises(AdapterFormatError, match="is there twice"):
        foreign.read(folder, base=base)


def test_encoders_are_found_with_and_without_their_heads_prefix(
    diff: SparseDiff, base: Path, peft_folder: Folder
):
    short = OUTPUT.removeprefix("roberta.")
    adapter = foreign.read(
        peft_folder({"peft_type": "SHIRA"}, shira(diff, short)), base=base
    ).adapter
    assert adapter[f"{short}.weight"].equals(diff)


def _with(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        (key,) = [k for k in tensors if k.endswith(part)]
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def _put(value: float, *at: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[at] = value
        return tensor

    return change


BAD = {
    "row outside": (shira, _with("indices", _put(16, 0, 0)), r"row 16 \(entry 0\) is outside"),
    "row negative": (shira, _with("indices", _put(-1, 0, 2)), r"row -1 \(entry 2\) is outside"),
    "column outside": (shira, _with("indices", _put(24, 1, 0)), r"column 24 \(entry 0\)"),
    "fewer": (shira, _with("indices", lambda t: t[:, 1:]), r"wanted \(2, \d+\)"),
    "three rows": (shira, _with("indices", lambda t: t[[0, 1, 1]]), r"wanted \(2, \d+\)"),
    "repeated": (shira, _with("indices", lambda t: t[:, [0, *range(t.shape[1] - 1)]]), "duplicate"),
    "fractions": (shira, _with("indices", lambda t: t + 0.5), "not all whole numbers"),
    "huge floats": (shira, _with("indices", lambda t: t + 2.0**25), "not all whole numbers"),
    "NaN index": (shira, _with("indices", lambda t: t + float("nan")), "not all whole numbers"),
    "NaN": (shira, _with("weight", _put(float("nan"), 0)), "must be finite"),
    "integers": (shira, _with("weight", lambda t: t.int()), "values are torch.int32"),
    "flat outside": (supertuning, _with("indices", _put(16 * 24, 0)), "384 entries"),
    "flat negative": (supertuning, _with("indices", _put(-5, 0)), "negative"),
    "flat repeated": (supertuning, _with("indices", lambda t: t[[0, *range(len(t) - 1)]]),
                      "duplicate"),
    "flat of two rows": (supertuning, _with("indices", lambda t: t.view(1, -1)), "values for"),
    "flat bool": (supertuning, _with("indices", lambda t: t > 3), "wanted integers"),
    "infinite": (supertuning, _with("values", _put(float("inf"), 0)), "must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=str)
def test_damaged_files_are_refused(diff: SparseDiff, base: Path, peft_folder: Folder, case: str):
    layout, edit, message = BAD[case]
    tensors = layout(diff)
    edit(tensors)
    folder = peft_folder({"peft_type": layout.__name__.upper()}, tensors)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        foreign.read(folder, base=base)
    assert OUTPUT in str(caught.value)
    assert str(folder / "adapter_model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds list, wanted an object"),
        ("{}", "has no peft_type"),
        ('{"peft_type": 3}', "has no peft_type"),
        ('{"peft_type": "IA3"}', "'IA3' cannot be represented .* rescales"),
        ('{"peft_type": "NEW"}', "'NEW' cannot be represented .* does not know"),
        ('{"peft_type": "LORA"}', "holds no lora_A and lora_B|neither density"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_damaged_configurations(peft_folder: Folder, text: str, message: str):
    folder = peft_folder({}, {"head.weight": torch.ones(2, 2)})
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises((AdapterFormatError, OptionError), match=message):
        Adapter.load(folder)


def test_files_that_are_missing_or_not_what_their_name_says(
    diff: SparseDiff, base: Path, peft_folder: Folder
):
    folder = peft_folder({"peft_type": "SHIRA"}, shira(diff))
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterFormatError, match="no safetensors file, or damaged"):
        foreign.read(folder, base=base)
    torch.save({"w": torch.ones(1)}, file)
    with pytest.raises(AdapterFormatError, match="it is a pickle"):
        foreign.read(folder, base=base)
    file.unlink()
    with pytest.raises(AdapterFormatError, match=r"neither adapter_model\.safetensors nor"):
        foreign.read(folder, base=base)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


def test_a_malicious_adapter_model_bin_does_not_run(
    diff: SparseDiff, base: Path, peft_folder: Folder
):
    folder = peft_folder({"peft_type": "SHIRA"}, shira(diff))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.shira_weight": Bomb()}, folder / "adapter_model.bin")
    for load in (Adapter.load, lambda f: foreign.read(f, base=base)):
        with pytest.raises(AdapterFormatError, match="would run code"):
            load(folder)


LORA = {
    f"{OUTPUT}.lora_A.weight": torch.ones(2, 24),
    f"{OUTPUT}.lora_B.weight": torch.ones(16, 2),
}
BAD_LORA: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "ranks differ": ({}, {f"{OUTPUT}.lora_B.weight": torch.ones(16, 3)}, r"\(2, 24\) and \(16, 3"),
    "a convolution": ({}, {f"{OUTPUT}.lora_A.weight": torch.ones(2, 24, 1, 1)}, "Convolutions"),
    "NaN": ({}, {f"{OUTPUT}.lora_A.weight": torch.full((2, 24), float("nan"))}, "finite"),
    "overflow": (
        {},
        {f"{OUTPUT}.lora_A.weight": torch.full((2, 24), 3e38)},
        r"change of .*output\.dense.* must be finite",
    ),
    "DoRA's vector": ({}, {f"{OUTPUT}.lora_magnitude_vector": torch.ones(16)}, "DoRA rescales"),
    "alpha": ({"lora_alpha": "8"}, {}, "lora_alpha .* wanted a number"),
    "another r": ({"r": 8}, {}, r"matrices of rank 2, but adapter_config.json says r=8"),
    "r no number": ({"r": "2"}, {}, "r in adapter_config.json is .* wanted a number"),
    "another r in the patterns": ({"r": 8, "rank_pattern": {".*dense": 4}}, {}, "rank 2, but"),
    "infinite alpha": ({"lora_alpha": float("inf")}, {}, "lora_alpha of module .* is inf"),
    "pattern": ({"alpha_pattern": {"out.*": 3}}, {}, r"expression 'out\.\*'; only plain"),
    "pattern's value": ({"alpha_pattern": {"dense": "x"}}, {}, r"\['dense'\] is no number"),
    "unknown field": ({"use_magic": True}, {}, "sets 'use_magic', which this reader does not"),
    "activated": ({"alora_invocation_tokens": [1]}, {}, "activated LoRA"),
}


@pytest.mark.parametrize("case", BAD_LORA, ids=str)
def test_damaged_or_other_lora_is_refused(peft_folder: Folder, case: str):
    config, tensors, message = BAD_LORA[case]
    folder = peft_folder({"peft_type": "LORA", "lora_alpha": 2} | config, LORA | tensors)
    with pytest.raises(AdapterFormatError, match=message):
        foreign.read(folder, nnz=3)


@pytest.mark.parametrize(
    "config", [{}, {"r": 2}, {"r": 8, "rank_pattern": {".*dense": 2}}], ids=str
)
def test_a_rank_that_the_configuration_gives(peft_folder: Folder, config: dict[str, Any]):
    found = peft_folder({"peft_type": "LORA", "lora_alpha": 2} | config, LORA)
    assert foreign.read(found, density=1.0).adapter.nnz == 16 * 24


def test_half_a_lora_is_refused(peft_folder: Folder):
    key = f"{OUTPUT}.lora_A.weight"
    folder = peft_folder({"peft_type": "LORA"}, {key: LORA[key]})
    with pytest.raises(AdapterFormatError, match=r"lacks lora_B\.weight"):
        foreign.read(folder, nnz=3)


def test_options_of_other_formats_are_named(diff: SparseDiff, base: Path, peft_folder: Folder):
    folder = peft_folder({"peft_type": "SHIRA"}, shira(diff))
    with pytest.raises(UnknownNameError, match="'peft-shira' has no option 'density'"):
        foreign.read(folder, base=base, density=0.1)


@pytest.mark.parametrize("target", ["peft-shira", "peft-supertuning", "spiel"])
def test_what_peft_cannot_hold_is_refused_before_anything_is_written(
    linear_adapter: Adapter, base: Path, tmp_path: Path, target: str
):
    good = dict(linear_adapter.items())
    bias = {f"{OUTPUT}.bias": SparseDiff.from_dense(torch.ones(16))}
    embedding = {
        "roberta.embeddings.word_embeddings.weight": SparseDiff.from_dense(torch.ones(161, 16))
    }
    replaced = {f"{OUTPUT}.weight": SparseDiff.from_dense(torch.ones(16, 24), mode="set")}
    for diffs, message in (
        (good | bias, r"output\.dense\.bias' has shape \(16,\).*matrices.*--exclude"),
        (good | embedding, "word_embeddings.* belongs to an embedding"),
        (good | replaced, r"mode 'set'.*only adds"),
        ({}, "no entries to write"),
    ):
        with pytest.raises(AdapterFormatError, match=message):
            foreign.write(Adapter(diffs), tmp_path / "out", target)
    with pytest.raises(AdapterFormatError, match="belongs to Embedding"):
        foreign.write(Adapter(good | embedding), tmp_path / "out", target, base=base)
    half = Adapter(good, dense={"classifier.dense.weight": torch.ones(16, 16)})
    with pytest.raises(AdapterFormatError, match=r"'classifier\.dense', but not .*dense\.bias"):
        foreign.write(half, tmp_path / "out", target, base=base)
    loose = Adapter(good, dense={"scale": torch.ones(2)})
    with pytest.raises(AdapterFormatError, match="'scale' belongs to no module"):
        foreign.write(loose, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()
    written = foreign.write(Adapter(good | bias), tmp_path / "out", target, exclude=["*.bias"])
    assert written.lost[-1] == "1 tensors were left out (--exclude)"


def test_shira_cannot_hold_a_dense_matrix_beside_a_thin_one(tmp_path: Path):
    adapter = Adapter(
        {
            "a.weight": SparseDiff.from_dense(torch.ones(20, 20)),
            "b.weight": SparseDiff.from_dense(torch.eye(2, 30)),
        }
    )
    with pytest.raises(AdapterFormatError, match=r"'b\.weight'.*10 \* 32.*--to peft-supertuning"):
        foreign.write(adapter, tmp_path, "peft-shira")
    foreign.write(adapter, tmp_path, "peft-supertuning")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["sparsity"] == 0.0
    back = foreign.read(tmp_path, base={"a.weight": (20, 20), "b.weight": (2, 30)}).adapter
    assert torch.equal(back["b.weight"].to_dense(), torch.eye(2, 30))


@pytest.mark.parametrize("numel", [1, 3, 10, 97, 768 * 768, 250_002 * 768, 2**31 - 1])
def test_the_sparsity_that_is_written_gives_room_for_every_count(numel: int):
    from sparseft.io.foreign.peft_supertuning import _count, _sparsity

    for nnz in (n for n in (1, 2, 3, numel // 100, numel // 3, numel - 1, numel) if 0 < n <= numel):
        sparsity = _sparsity([(nnz, numel), (1, 7)])
        assert 0 <= sparsity < 1
        assert _count(numel, sparsity) >= nnz
        if nnz / numel > 1 / 7:
            assert _count(numel, sparsity) - nnz <= 1


def test_formats_that_are_only_read_and_unknown_ones(linear_adapter: Adapter, tmp_path: Path):
    with pytest.raises(OptionError, match="lora is read, not written. Written are composable-sft"):
        foreign.write(linear_adapter, tmp_path, "lora")
    with pytest.raises(UnknownNameError, match="Did you mean 'peft-shira'"):
        foreign.write(linear_adapter, tmp_path, "peft-shria")
    with pytest.raises(UnknownNameError, match="matches none of 3 tensors"):
        foreign.write(linear_adapter, tmp_path, "spiel", exclude=["nothing*"])


def test_a_given_base_is_compared_with_formats_that_have_shapes(
    linear_adapter: Adapter, base: Path, tmp_path: Path
):
    foreign.write(linear_adapter, tmp_path, "composable-sft")
    adapter = foreign.read(tmp_path, base=base, name="qu").adapter
    assert adapter.name == "qu"
    assert len(adapter.metadata.fingerprint.tensors) == 3
    with pytest.raises(BaseMismatchError, match=r"shape \(16, 16\), but base .* has \(8, 8\)"):
        foreign.read(tmp_path, base={n: (8, 8) for n in linear_adapter})


def test_a_kill_never_leaves_two_halves(
    linear_adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At every step of replacing one adapter by another: the old one, none, or the new one."""
    folder, names = tmp_path / "a", ("adapter_config.json", "adapter_model.safetensors")
    replace, seen = os.replace, []

    def pair() -> list[bytes | None]:
        files = [folder / name for name in names]
        return [f.read_bytes() if f.exists() else None for f in files]

    def watched(source: Path, target: Path) -> None:
        seen.append(pair())
        replace(source, target)

    foreign.write(linear_adapter, folder, "spiel")
    old = pair()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        foreign.write(linear_adapter, folder, "peft-supertuning", overwrite=True)
    new = pair()
    assert None not in new
    assert new[0] != old[0]
    assert new[1] != old[1]
    assert seen == [[None, old[1]], [None, new[1]]]


@pytest.mark.parametrize("step", [1, 2])
def test_a_full_disk_leaves_the_old_folder(
    linear_adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    foreign.write(linear_adapter, tmp_path / "a", "spiel")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    left = [step]

    def full(handle: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        foreign.write(linear_adapter, tmp_path / "a", "peft-supertuning", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
