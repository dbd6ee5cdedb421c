"""Masks on disk: saved, loaded, taken from adapters, hostile; checkpoints read lazily."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparseft import Adapter, SparseDiff, attach, select
from sparseft.errors import AdapterFormatError, AttachError, MaskError
from sparseft.selection import Checkpoint, Masks


class TestFiles:
    def test_attach_given_a_path_says_how_files_are_read(self, tmp_path):
        model = nn.Linear(4, 3)
        path = select(model, "random", nnz=5).save(tmp_path / "masks.safetensors")
        for given in (path, str(path)):
            with pytest.raises(AttachError, match="wanted a mapping from parameter") as caught:
                attach(model, given)
            assert f"masks is the path {str(path)!r}" in str(caught.value)
            assert f"Adapter.load({str(path)!r})" in str(caught.value)
            assert f"sparseft.select(model, method='file', path={str(path)!r})" in str(caught.value)
        with attach(model, select(model, method="file", path=str(path))) as sparse:
            assert sparse.nnz == 5
        with pytest.raises(AttachError, match="masks is list, wanted a mapping"):
            attach(model, ["weight"])
        assert all(p.requires_grad for p in model.parameters())

    def test_round_trip(self, pair, tmp_path):
        base, tuned = pair()
        masks = select(tuned, nnz=31, base=base)
        path = masks.save(tmp_path / "deep" / "masks.safetensors")
        assert Masks.load(path).equals(masks)
        assert list(Masks.load(path)) == list(masks)
        assert select(tuned, "file", path=path).equals(masks)
        first = path.read_bytes()
        masks.save(path)
        assert path.read_bytes() == first
        with pytest.raises(FileExistsError):
            masks.save(path, overwrite=False)

    def test_of_an_adapter(self, pair, tmp_path):
        base, tuned = pair()
        mask = torch.rand(5, 6) < 0.5
        adapter = Adapter({"matrix": SparseDiff.from_dense(torch.ones(5, 6), mask)})
        adapter.save(tmp_path / "a")
        for path in (tmp_path / "a", tmp_path / "a" / "adapter.safetensors"):
            masks = select(tuned, "file", path=path)
            assert torch.equal(masks["matrix"].to_mask(), mask)
            assert masks.nnz == int(mask.sum())
        assert list(masks) == ["cube", "embed.weight", "empty", "matrix", "scalar", "strided",
                               "vector"]  # fmt: skip

    def test_count_must_agree(self, pair, tmp_path):
        base, tuned = pair()
        path = select(tuned, nnz=31, base=base).save(tmp_path / "m.safetensors")
        assert select(tuned, "file", path=path, nnz=31).nnz == 31
        with pytest.raises(MaskError, match="30 entries were asked for but the masks .* have 31"):
            select(tuned, "file", path=path, nnz=30)

    def test_of_another_model(self, pair, tmp_path):
        base, tuned = pair()
        masks = Masks.of({"matrx": torch.ones(5, 6, dtype=torch.bool)})
        path = masks.save(tmp_path / "m.safetensors")
        with pytest.raises(MaskError, match=r"'matrx'.*no such parameter.*Did you mean 'matrix'"):
            select(tuned, "file", path=path)
        path = Masks.of({"matrix": torch.ones(6, 5, dtype=torch.bool)}).save(path)
        with pytest.raises(MaskError, match=r"'matrix' has shape \(6, 5\) but .* \(5, 6\)"):
            select(tuned, "file", path=path)
        path = Masks.of({"matrix": torch.ones(5, 6, dtype=torch.bool)}).save(path)
        with pytest.raises(MaskError, match="include/exclude rule it out"):
            select(tuned, "file", path=path, exclude="matrix")

    def test_hostile(self, tmp_path):
        path = tmp_path / "m.safetensors"

        def write(tensors, shapes):
            save_file(tensors, path, metadata={"shapes": json.dumps(shapes)})

        good = torch.tensor([1, 3], dtype=torch.int32)
        for indices, shape, message in (
            (torch.tensor([3, 1], dtype=torch.int32), [4], "'w'.*not ascending"),
            (torch.tensor([1, 1], dtype=torch.int32), [4], "'w'.*duplicate"),
            (torch.tensor([-1, 1], dtype=torch.int32), [4], "'w'.*negative"),
            (good, [3], "'w'.*out of range"),
            (torch.tensor([1.0]), [4], "'w'.*wanted integers"),
            (good, [-4], "no table of shapes"),
            (good, ["4"], "no table of shapes"),
            (good, [2**62, 4], "'w'.*2\\*\\*63"),
        ):
            write({"w": indices}, {"w": shape})
            with pytest.raises(MaskError, match=message):
                Masks.load(path)
        write({"w": good}, {"w": [4], "v": [4]})
        with pytest.raises(MaskError, match="'v' has a tensor or a shape, but not both"):
            Masks.load(path)
        save_file({"w": good}, path)
        with pytest.raises(MaskError, match="holds no masks"):
            Masks.load(path)
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(MaskError, match="no safetensors file, or damaged"):
            Masks.load(path)
        with pytest.raises(FileNotFoundError):
            Masks.load(tmp_path / "nothing")
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "adapter.safetensors").write_bytes(b"x" * 50)
        with pytest.raises(AdapterFormatError):
            Masks.load(tmp_path / "bad")


def test_checkpoint_reads_lazily(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    assert set(found) == {"a", "b"}
    assert len(found) == 2
    assert "a" in found
    assert torch.equal(found["a"], torch.ones(3))
    with pytest.raises(KeyError):
        found["c"]
