"""Checkpoints on disk: read tensor by tensor, refused where damaged, written as streams."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseft.errors import CompositionError, UnknownNameError
from sparseft.io import checkpoint_shards
from sparseft.io.checkpoint_files import CheckpointFiles
from sparseft.io.checkpoint_shards import TensorInfo
from sparseft.io.checkpoint_writer import aligned, write_safetensors
from sparseft.io.model_folder import copy_companions, find_model, shown_name

TENSORS = {
    "half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
    "matrix": torch.arange(6.0).view(2, 3),
    "none": torch.empty(0, 4),
    "one": torch.tensor(3.0),
    "steps": torch.tensor([2**40]),
    "flags": torch.tensor([True, False, True]),
}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def sharded(folder, parts, kind="safetensors"):
    """Save ``parts`` as shards with an index."""
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    table = {}
    for i, part in enumerate(parts):
        file = f"{stem}-{i + 1:05}-of-{len(parts):05}.{end}"
        if kind == "safetensors":
            save_file(part, folder / file, {"format": "pt"})
        else:
            torch.save(part, folder / file)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["file", "folder", "shards", "bin", "bin shards"])
def test_every_layout_gives_the_same_tensors(tmp_path, kind):
    path = tmp_path
    if kind in ("file", "folder"):
        save_file(TENSORS, tmp_path / "model.safetensors")
        path = tmp_path / "model.safetensors" if kind == "file" else tmp_path
    elif kind == "bin":
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(TENSORS)
        parts = [{n: TENSORS[n] for n in names[:2]}, {n: TENSORS[n] for n in names[2:]}]
        sharded(tmp_path, parts, "safetensors" if kind == "shards" else "bin")
    files = CheckpointFiles(path)
    assert set(files.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert same(files.read(name), tensor)
        assert b"".join(map(bytes, files.pieces(name))) == bytes_of(tensor)
        assert files.info(name) == TensorInfo.of(name, tensor)
    files.read("matrix").zero_()
    assert same(files.read("matrix"), TENSORS["matrix"]), "what is read is the caller's own"
    with pytest.raises(UnknownNameError, match="no tensor 'matrx'. Did you mean 'matrix'"):
        files.read("matrx")


def test_a_view_in_a_pickle_is_read_row_major(tmp_path):
    torch.save({"w": TENSORS["matrix"].t()}, tmp_path / "pytorch_model.bin")
    read = CheckpointFiles(tmp_path).read("w")
    assert read.is_contiguous()
    assert read.tolist() == TENSORS["matrix"].t().tolist()


def test_pieces_are_compared_whatever_their_size(tmp_path, monkeypatch):
    weights = {"w": torch.arange(5000.0)}
    save_file(weights, tmp_path / "a.safetensors")
    weights["w"][4999] = -1
    save_file(weights, tmp_path / "b.safetensors")
    torch.save({"w": torch.arange(5000.0)}, tmp_path / "c.bin")
    monkeypatch.setattr(checkpoint_shards, "PIECE", 777)
    a, b, c = (CheckpointFiles(tmp_path / f) for f in ("a.safetensors", "b.safetensors", "c.bin"))
    assert a.same_bytes("w", a, "w")
    assert not a.same_bytes("w", b, "w")
    assert a.same_bytes("w", c, "w")
    assert c.same_bytes("w", a, "w")


def test_old_pickles_are_read_whole_and_said(tmp_path, caplog):
    torch.save(
        {"w": TENSORS["matrix"]}, tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )  # fmt: skip
    assert same(CheckpointFiles(tmp_path).read("w"), TENSORS["matrix"])
    assert "cannot be mapped" in caplog.text


class _Runs:
    def __reduce__(self):
        return print, ("run!",)


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": {**ENTRY, "data_offsets": [0, 800]}}, "'w' lies outside the file"),
        ({"w": {**ENTRY, "data_offsets": [8, 0]}}, "'w' lies outside the file"),
        ({"w": {**ENTRY, "data_offsets": [-8, 0]}}, "'w' lies outside the file"),
        ({"w": {**ENTRY, "shape": [3]}}, "has 8 bytes; the file is damaged"),
        ({"w": {**ENTRY, "shape": "no"}}, "'w' lies outside the file, or is damaged"),
        ({"w": [1]}, "'w' lies outside the file, or is damaged"),
        ({"__metadata__": [1]}, "__metadata__ is no object"),
        (b"[1]", "no JSON object"),
        (b"{", "is not JSON"),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    header_file(tmp_path / "model.safetensors", header, b"12345678")
    with pytest.raises(CompositionError, match=message):
        CheckpointFiles(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in"):
        CheckpointFiles(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CompositionError, match="Git LFS pointer"):
        CheckpointFiles(tmp_path)
    file.write_bytes(struct.pack("<Q", 1 << 50) + b"{}")
    with pytest.raises(CompositionError, match="no safetensors file, or cut off"):
        CheckpointFiles(tmp_path)
    file.unlink()
    pickled = tmp_path / "pytorch_model.bin"
    torch.save({"w": _Runs()}, pickled)
    with pytest.raises(CompositionError, match="would run code .*_Runs|would run code .*print"):
        CheckpointFiles(tmp_path)
    pickled.write_bytes(pickle.dumps({"w": _Runs()}, protocol=2))
    with pytest.raises(CompositionError, match=r"pytorch_model\.bin: not opened.*would run code"):
        CheckpointFiles(tmp_path)
    torch.save({"state_dict": {"w": TENSORS["one"]}}, pickled)
    with pytest.raises(CompositionError, match="'state_dict' in it is dict"):
        CheckpointFiles(tmp_path)


def fuzzed(raw, count=150):
    """Yield cut off and changed copies of ``raw``."""
    rng = random.Random(0)
    for i in range(count):
        if i % 3 == 0:
            yield raw[: rng.randrange(1, len(raw))]
        else:
            copy = bytearray(raw)
            copy[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
            yield bytes(copy)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damaged_pickles_are_refused_by_name_or_read(tmp_path, zipped):
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    refused = []
    for damaged in fuzzed(file.read_bytes()):
        file.write_bytes(damaged)
        try:
            files = CheckpointFiles(tmp_path)
            for name in files.names:
                files.read(name)
        except CompositionError as error:  # nothing else
            refused.append(str(error))
    assert len(refused) >= 50  # all that are cut off
    assert all(str(file) in message for message in refused)


def test_what_a_checkpoint_claims_and_does_not_store_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(1).expand(2**40)}, file)
    with pytest.raises(CompositionError, match="'w' claims 1,099,511,627,776 elements"):
        CheckpointFiles(tmp_path)
    torch.save({1: torch.ones(1)}, file)
    with pytest.raises(CompositionError, match="is not a state dict"):
        CheckpointFiles(tmp_path)
    inner = io.BytesIO()
    torch.save({"w": torch.zeros(100_000)}, inner)
    with zipfile.ZipFile(inner) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for member in source.infolist():
            out.writestr(member.filename, source.read(member))
    with pytest.raises(CompositionError, match="unpack to .* possible bomb"):
        CheckpointFiles(tmp_path)


def test_damaged_indexes(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    save_file({"w": TENSORS["matrix"]}, tmp_path / "a.safetensors")
    save_file({"w": TENSORS["matrix"]}, tmp_path / "b.safetensors")

    def write(table):
        index.write_text(json.dumps({"weight_map": table}))

    write({"w": "../a.safetensors"})
    with pytest.raises(CompositionError, match="outside its folder"):
        CheckpointFiles(tmp_path)
    write({"w": "a.safetensors", "x": "gone.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors, which is not there \(1 of 2"):
        CheckpointFiles(tmp_path)
    write({"w": "a.safetensors", "x": "a.safetensors"})
    with pytest.raises(CompositionError, match="names 'x', which is in none"):
        CheckpointFiles(tmp_path)
    write({"w": "a.safetensors", "x": "b.safetensors"})
    with pytest.raises(CompositionError, match="'w' is in a.safetensors and in b.safetensors"):
        CheckpointFiles(tmp_path)
    index.write_text("[]")
    with pytest.raises(CompositionError, match="no index of shards"):
        CheckpointFiles(tmp_path)


def test_a_file_that_changes_or_vanishes_meanwhile(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": TENSORS["matrix"]}, file)
    files = CheckpointFiles(tmp_path)
    save_file({"w": TENSORS["matrix"], "x": TENSORS["one"]}, file)
    with pytest.raises(CompositionError, match="was changed by somebody"):
        files.read("w")
    file.unlink()
    with pytest.raises(FileNotFoundError):
        files.read("w")


class TestWriting:
    def test_read_by_the_safetensors_package(self, tmp_path):
        infos = aligned([TensorInfo.of(n, t) for n, t in TENSORS.items()])
        write_safetensors(
            tmp_path / "out.safetensors", infos, {"by": "me"},
            lambda info: [memoryview(bytes_of(TENSORS[info.name]))],
        )  # fmt: skip
        read = load_file(tmp_path / "out.safetensors")
        assert all(same(read[n], t) for n, t in TENSORS.items())
        assert CheckpointFiles(tmp_path / "out.safetensors").shards[0].metadata == {
            "format": "pt",
            "by": "me",
        }

    def test_order_is_kept_where_it_can_be(self):
        a, b = TensorInfo("a", "BF16", (2,), 4), TensorInfo("b", "F32", (1,), 4)
        assert aligned([a, b]) == [a, b]
        odd = TensorInfo("a", "BF16", (1,), 2)
        assert aligned([odd, b]) == [b, odd]

    def test_wrong_number_of_bytes(self, tmp_path):
        with pytest.raises(CompositionError, match="has 3 bytes where 4 were announced"):
            write_safetensors(
                tmp_path / "out.safetensors", [TensorInfo("a", "BF16", (2,), 4)], {},
                lambda info: [memoryview(b"123")],
            )  # fmt: skip
        assert list(tmp_path.iterdir()) == []


class TestFolders:
    def test_companions(self, tmp_path):
        source, target = tmp_path / "model", tmp_path / "new"
        kept = [
            "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
            "sentencepiece.bpe.model", "chat_template.jinja", "modeling_own.py", "LICENSE",
            "1_Pooling/config.json",
        ]  # fmt: skip
        left = [
            "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md",
            "tf_model.h5", "training_args.bin", "optimizer.pt", "trainer_state.json",
            ".gitattributes", ".cache/x.json", "checkpoint-10/config.json", "onnx/model.onnx",
            "adapter_config.json",
            "2_Dense/model.safetensors", "sparseft_composition.json",
        ]  # fmt: skip
        for name in [*kept, *left]:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(name)
        assert copy_companions(source, target) == sorted(kept)
        there = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
        assert there == sorted(kept)
        (source / "modules.json").write_text("[]")
        assert "2_Dense/model.safetensors" in copy_companions(source, target)

    def test_read_only_links_of_a_download(self, tmp_path):
        source, target = tmp_path / "snapshot", tmp_path / "new"
        source.mkdir()
        target.mkdir()
        (tmp_path / "blob").write_text("{}")
        (tmp_path / "blob").chmod(0o444)
        (source / "config.json").symlink_to(tmp_path / "blob")
        copy_companions(source, target)
        assert not (target / "config.json").is_symlink()
        assert (target / "config.json").stat().st_mode & 0o200

    def test_finding(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "base").mkdir()
        assert find_model("base").is_dir()
        assert shown_name("./base") == "base"
        assert shown_name("org/name") == "org/name"
        (tmp_path / "file.bin").write_bytes(b"")
        with pytest.raises(CompositionError, match="base model: file.bin is a file"):
            find_model("file.bin")
        with pytest.raises(CompositionError, match=r"tuned model: no folder ./gone"):
            find_model("./gone", "tuned")

    def test_a_name_on_the_hub(self, tmp_path, monkeypatch):
        """Files of pickles are fetched only where there are no others; half a cache is not used."""
        import huggingface_hub

        cache, asked = tmp_path / "cache", []
        cache.mkdir()

        def snapshot_download(name, *, ignore_patterns, local_files_only=False):
            asked.append((local_files_only, "*.bin" in ignore_patterns))
            if not local_files_only:
                (cache / "config.json").write_text("{}")
                if "*.bin" not in ignore_patterns:
                    (cache / "pytorch_model.bin").write_bytes(b"")
            return str(cache)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: None)
        assert find_model("org/pickled") == cache
        assert asked == [(True, True), (True, False), (False, True), (False, False)]
        asked.clear()
        assert find_model("org/pickled") == cache
        assert asked == [(True, True)], "what was downloaded is used as it is"
        (cache / "pytorch_model.bin").unlink()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **where: str(cache))
        with pytest.raises(CompositionError, match="no weights that are whole.*hf download"):
            find_model("org/nothing")
