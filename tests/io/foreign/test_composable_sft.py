"""composable-sft files: an encoder and a decoder written apart from ours, and hostile files."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError
from sparseft.io import foreign


def encode(delta: Tensor) -> dict[str, Any]:
    """Encode as the original does: column-major, first step a numpy int64, others Python ints."""
    flat = np.flatnonzero(delta.float().numpy().ravel(order="F")).astype(np.int64)
    steps = [int(s) for s in np.diff(flat)]
    where = np.unravel_index(flat, delta.shape, order="F")
    values = delta[tuple(torch.from_numpy(w.copy()) for w in where)].reshape(-1)
    first = [flat[0]] if len(flat) else []
    return {"size": delta.shape, "index_steps": first + steps, "values": values}


def decode(entry: dict[str, Any]) -> Tensor:
    """Decode with the original's arithmetic, which is in 32 bits."""
    sums = np.cumsum(entry["index_steps"], dtype=np.int32)
    moduli = np.cumprod(list(entry["size"]), dtype=np.int32)
    divisors = np.concatenate([[1], moduli[:-1]], dtype=np.int32)
    where = (sums[None] % moduli[:, None]) // divisors[:, None]
    return torch.sparse_coo_tensor(
        where, entry["values"], size=entry["size"], check_invariants=True
    ).to_dense()


def sparse(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=rng) * (torch.rand(shape, generator=rng) < 0.3)).to(dtype)


@pytest.fixture
def deltas() -> dict[str, Tensor]:
    return {
        "bert.embeddings.weight": sparse((13, 7), 0),
        "bert.bias": sparse((11,), 1),
        "bert.conv": sparse((3, 5, 4), 2, torch.bfloat16),
        "bert.still": torch.zeros(4, 6),
    }


def save(folder: Path, content: Any, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "pytorch_diff.bin", **options)
    return folder


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_originals_files_load_exactly(deltas: dict[str, Tensor], tmp_path: Path, zipped: bool):
    head = {"classifier.weight": torch.randn(3, 7)}
    content = {"diffs": {n: encode(d) for n, d in deltas.items()}, "abs": head}
    assert isinstance(content["diffs"]["bert.bias"]["index_steps"][0], np.int64)
    folder = save(tmp_path / "sw", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):  # the numpy integer: why an allow-list is needed
        torch.load(folder / "pytorch_diff.bin", weights_only=True)
    adapter = Adapter.load(folder)
    assert adapter.name == "sw"
    assert adapter.metadata.extra["converted"]["from"] == "composable-sft"
    for name, delta in deltas.items():
        assert torch.equal(adapter[name].to_dense(), delta)
        assert adapter[name].dtype == delta.dtype
        assert adapter[name].equals(SparseDiff.from_dense(delta))
    assert torch.equal(adapter.dense["classifier.weight"], head["classifier.weight"])
    assert Adapter.load(folder / "pytorch_diff.bin").name == "sw"
    # As a file by any name, too.
    other = (folder / "pytorch_diff.bin").rename(tmp_path / "swahili.pt")
    assert Adapter.load(other).equals(adapter)
    assert Adapter.load(other).name == "swahili"


def test_files_written_with_numpy_1(deltas: dict[str, Tensor], tmp_path: Path):
    content = {"diffs": {n: encode(d) for n, d in deltas.items()}, "abs": {}}
    folder = save(tmp_path / "old", content, _use_new_zipfile_serialization=False)
    file = folder / "pytorch_diff.bin"
    raw = file.read_bytes()
    names = {b"numpy._core.multiarray", b"numpy.core.multiarray"}
    (mine,) = [n for n in names if n + b"\nscalar" in raw]
    (theirs,) = names - {mine}
    file.write_bytes(raw.replace(mine + b"\nscalar", theirs + b"\nscalar"))
    for name, delta in deltas.items():
        assert torch.equal(Adapter.load(folder)[name].to_dense(), delta)


def test_reading_leaves_the_allow_list_of_torch_as_it_was(
    deltas: dict[str, Tensor], tmp_path: Path
):
    before = set(torch.serialization.get_safe_globals())
    Adapter.load(save(tmp_path, {"diffs": {"w": encode(sparse((3, 4), 0))}, "abs": {}}))
    assert set(torch.serialization.get_safe_globals()) == before


def test_the_older_layout_of_body_and_head(tmp_path: Path):
    delta = sparse((5, 3), 4)
    folder = save(tmp_path, {"body": {"w": encode(delta)}, "head": {"h": torch.ones(2)}})
    adapter = Adapter.load(folder)
    assert torch.equal(adapter["w"].to_dense(), delta)
    assert torch.equal(adapter.dense["h"], torch.ones(2))


def test_positions_past_32_bits_are_read_right(tmp_path: Path):
    """Where the original's decoder wraps around: column 39,999 of 65,536 x 40,000."""
    rows, columns = 65536, 40000
    where = [(0, 0), (65535, 32768), (7, 39999)]
    flat = sorted(r + rows * c for r, c in where)
    steps = [flat[0], *np.diff(flat).tolist()]
    entry = {"size": torch.Size([rows, columns]), "index_steps": steps, "values": torch.ones(3)}
    diff = Adapter.load(save(tmp_path, {"diffs": {"w": entry}}))["w"]
    assert diff.indices.dtype == torch.int64
    assert diff.indices.tolist() == sorted(r * columns + c for r, c in where)


def test_names_lose_what_wrappers_added(tmp_path: Path):
    entry = encode(sparse((3, 4), 0))
    content = {"diffs": {"module._orig_mod.bert._fsdp_wrapped_module.w": entry}, "abs": {}}
    assert Adapter.load(save(tmp_path, content)).names == ["bert.w"]
    content["diffs"]["bert.w"] = entry
    with pytest.raises(AdapterFormatError, match=r"two diffs of parameter 'bert\.w'"):
        Adapter.load(save(tmp_path, content))


def test_the_original_reads_what_is_written(deltas: dict[str, Tensor], tmp_path: Path):
    adapter = Adapter(
        {n: SparseDiff.from_dense(d) for n, d in deltas.items()},
        name="x",
        dense={"head.weight": torch.randn(2, 3)},
    )
    before = {n: d.indices.clone() for n, d in adapter.items()}
    written = foreign.write(adapter, tmp_path / "out", "composable-sft")
    assert written.nbytes == (tmp_path / "out" / "pytorch_diff.bin").stat().st_size
    content = torch.load(tmp_path / "out" / "pytorch_diff.bin", weights_only=True)
    for name, entry in content["diffs"].items():
        assert all(type(step) is int for step in entry["index_steps"])
        if deltas[name].any():
            assert torch.equal(decode(entry), deltas[name])
        assert torch.equal(adapter[name].indices, before[name])  # nothing was sorted in place
    assert torch.equal(content["abs"]["head.weight"], adapter.dense["head.weight"])
    assert Adapter.load(tmp_path / "out").equals(adapter)
    with pytest.raises(FileExistsError):
        foreign.write(adapter, tmp_path / "out", "composable-sft")


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (5, 0, 2), (1, 9), (9, 1), (3, 4, 5, 2)], ids=str
)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_any_shape_there_and_back(tmp_path: Path, shape: tuple[int, ...], density: float):
    rng = torch.Generator().manual_seed(len(shape))
    mask = torch.rand(shape, generator=rng) < density
    adapter = Adapter({"w": SparseDiff.from_dense(torch.randn(shape, generator=rng), mask)})
    if shape:  # numpy has no positions in a scalar
        encoded = {"diffs": {"w": encode(adapter["w"].to_dense())}, "abs": {}}
        assert Adapter.load(save(tmp_path / "theirs", encoded)).equals(adapter)
    with_head = Adapter(dict(adapter.items()), dense={"h": torch.ones(1)})
    foreign.write(with_head, tmp_path / "ours", "composable-sft")
    assert Adapter.load(tmp_path / "ours").equals(with_head)
    if not adapter.nnz:
        with pytest.raises(AdapterFormatError, match="no entries to write"):
            foreign.write(adapter, tmp_path / "none", "composable-sft")


def test_several_threads_read_at_once(tmp_path: Path, deltas: dict[str, Tensor]):
    content = {"diffs": {n: encode(d) for n, d in deltas.items()}, "abs": {}}
    folders = [save(tmp_path / str(i), content) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(Adapter.load, folders * 4))
    assert all(adapter.equals(loaded[0]) for adapter in loaded)


def test_writing_refuses_what_the_original_would_misread(tmp_path: Path):
    wide = SparseDiff(torch.tensor([5]), torch.ones(1), torch.Size([65536, 40000]))
    with pytest.raises(AdapterFormatError, match=r"2,621,440,000 entries.*32 bits"):
        foreign.write(Adapter({"w": wide}), tmp_path, "composable-sft")
    replaced = SparseDiff.from_dense(torch.ones(3), mode="set")
    with pytest.raises(AdapterFormatError, match=r"'w' has mode 'set'.*only adds"):
        foreign.write(Adapter({"w": replaced}), tmp_path, "composable-sft")
    assert not list(tmp_path.iterdir())


def _edit(**fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        entry = encode(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
        entry["index_steps"] = [int(s) for s in entry["index_steps"]]
        return {"diffs": {"layer.w": {**entry, **fields}}, "abs": {}}

    return make


def _whole(tensor: Any) -> Callable[[], Any]:
    return lambda: {"diffs": {}, "abs": {"head.w": tensor}}


BAD = {
    "negative step": (_edit(index_steps=[1, -1, 2]), r"'layer\.w': index_steps\[1\] is -1"),
    "step 0": (_edit(index_steps=[1, 0, 1]), r"'layer\.w'.*duplicate"),
    "past the end": (_edit(index_steps=[1, 1, 2]), r"'layer\.w'.*past the end at entry 2"),
    "sum overflows": (_edit(index_steps=[2**63 - 1, 2**63 - 1, 3]), r"past the end at entry 0"),
    "step beyond int64": (_edit(index_steps=[1, 2**63, 1]), r"'layer\.w'.*64-bit integers"),
    "fractional step": (_edit(index_steps=[1, 1.5, 1]), r"'layer\.w'.*64-bit integers"),
    "steps of text": (_edit(index_steps="123"), "index_steps is str, wanted a list"),
    "too few values": (_edit(values=torch.ones(2)), r"'layer\.w': \(2,\) values for \(3,\)"),
    "values of two dimensions": (_edit(values=torch.ones(3, 1)), r"\(3, 1\) values for \(3,\)"),
    "NaN": (_edit(values=torch.tensor([1.0, float("nan"), 1.0])), r"finite.*entry 0 is nan"),
    "infinity": (_edit(values=torch.tensor([float("inf"), 1.0, 1.0])), r"finite.*inf"),
    "integer values": (_edit(values=torch.ones(3, dtype=torch.int64)), "values are torch.int64"),
    "values no tensor": (_edit(values=[1.0, 1.0, 1.0]), "is list, wanted an ordinary dense tensor"),
    "sparse values": (_edit(values=torch.ones(3).to_sparse()), "torch.sparse_coo"),
    "negative size": (_edit(size=(2, -2)), r"'layer\.w': shape is \[2, -2\]"),
    "size overflows": (_edit(size=(2**40, 2**40)), "more than 2\\*\\*63 - 1 entries"),
    "size of floats": (_edit(size=(2.0, 2.0)), r"shape is \[2\.0, 2\.0\]"),
    "size a number": (_edit(size=4), "shape is int, wanted"),
    "no values": (lambda: {"diffs": {"w": {"size": (1,), "index_steps": []}}}, "is NoneType"),
    "no size": (
        lambda: {"diffs": {"w": {"values": torch.ones(1), "index_steps": [0]}}},
        "'w' lacks 'size'",
    ),
    "diffs a list": (lambda: {"diffs": [1]}, "holds no 'diffs'"),
    "entry a tensor": (lambda: {"diffs": {"w": torch.ones(3)}}, "is Tensor, wanted size"),
    "a name no text": (lambda: {"diffs": {1: {}}}, "mapping from parameter names"),
    "an empty name": (lambda: {"diffs": {"": encode(torch.ones(2))}}, "cannot name a parameter"),
    "nothing": (lambda: {"diffs": {}, "abs": {}}, "no tensor that could be converted"),
    "whole NaN": (_whole(torch.tensor([float("nan")])), r"'head\.w' must be finite"),
    "whole integers": (_whole(torch.ones(2, dtype=torch.int8)), r"'head\.w' is torch.int8"),
    "whole, expanded": (_whole(torch.ones(1).expand(2**40)), r"claims 1,099,511,627,776 elements"),
    "both": (
        lambda: {"diffs": {"w": encode(torch.ones(2))}, "abs": {"w": torch.ones(2)}},
        "'w' has a sparse change and is stored whole",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_damaged_and_forged_files_are_refused(tmp_path: Path, case: str):
    make, message = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = save(tmp_path / "bad", make())
        with pytest.raises(AdapterFormatError, match=message) as caught:
            Adapter.load(folder)
    assert str(folder / "pytorch_diff.bin") in str(caught.value)


def test_the_forgers_file_without_an_edit_is_accepted(tmp_path: Path):
    assert Adapter.load(save(tmp_path, _edit()())).nnz == 3


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


class NumpyBomb:
    """Asks numpy's scalar, which is on the list, for an arbitrary object."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (np.int64(1).__reduce__()[0], (np.dtype("O"), pickle.dumps(Bomb())))


@pytest.mark.parametrize("bomb", [Bomb(), NumpyBomb()], ids=["function", "numpy object"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["pytorch_diff.bin", "weights.pt"])
def test_a_malicious_pickle_does_not_run(tmp_path: Path, bomb: Any, zipped: bool, name: str):
    entry = {**encode(torch.ones(3)), "index_steps": [bomb, 1, 1]}
    file = tmp_path / name
    torch.save({"diffs": {"w": entry}}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        AdapterFormatError, match="not opened, as it is damaged, cut off, or would run code"
    ):
        Adapter.load(file)
    with pytest.raises(AdapterFormatError):
        Adapter.load(tmp_path if name == "pytorch_diff.bin" else file)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path):
    inner = io.BytesIO()
    torch.save({"diffs": {"w": encode(torch.ones(100_000))}}, inner)
    with (
        zipfile.ZipFile(inner) as source,
        zipfile.ZipFile(tmp_path / "pytorch_diff.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in source.infolist():
            packed.writestr(member.filename, source.read(member))
    with pytest.raises(AdapterFormatError, match="unpack to .* possible bomb"):
        Adapter.load(tmp_path)


def test_one_tensor_many_times_is_refused(tmp_path: Path):
    shared = torch.ones(1000)
    content = {"diffs": {}, "abs": {f"w{i}": shared for i in range(1000)}}
    with pytest.raises(AdapterFormatError, match="unfold to 4,000,000"):
        Adapter.load(save(tmp_path, content))


@pytest.mark.parametrize("keep", [0, 1, 4, 100, 0.5, 0.99])
def test_cut_off_files(deltas: dict[str, Tensor], tmp_path: Path, keep: float):
    folder = save(tmp_path, {"diffs": {n: encode(d) for n, d in deltas.items()}, "abs": {}})
    file = folder / "pytorch_diff.bin"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(AdapterFormatError, match=r"pytorch_diff\.bin: .*cut off"):
        Adapter.load(folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_length_of_a_cut_off_file(deltas: dict[str, Tensor], tmp_path: Path, zipped: bool):
    file = tmp_path / "pytorch_diff.bin"
    content = {"diffs": {"w": encode(deltas["bert.bias"])}, "abs": {}}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    raw = file.read_bytes()
    for length in range(0, len(raw), max(1, len(raw) // 60)):
        file.write_bytes(raw[:length])
        with pytest.raises(AdapterFormatError, match=r"pytorch_diff\.bin: .*cut off"):
            Adapter.load(tmp_path)


def test_a_changed_byte_does_not_change_the_adapter(deltas: dict[str, Tensor], tmp_path: Path):
    """The archive stores checksums: what a flip changes is refused, what it does not is equal."""
    folder = save(tmp_path, {"diffs": {n: encode(d) for n, d in deltas.items()}, "abs": {}})
    file = folder / "pytorch_diff.bin"
    raw = bytearray(file.read_bytes())
    whole = Adapter.load(folder)
    refused = []
    for at in range(0, len(raw), max(1, len(raw) // 300)):
        raw[at] ^= 0x10
        file.write_bytes(raw)
        try:
            assert Adapter.load(folder).equals(whole)
        except AdapterFormatError as error:
            refused.append(str(error))
        raw[at] ^= 0x10
    assert len(refused) > 100
    assert all(str(file) in message for message in refused)


def test_files_without_checksums_are_read(deltas: dict[str, Tensor], tmp_path: Path):
    content = {"diffs": {n: encode(d) for n, d in deltas.items()}, "abs": {}}
    whole = Adapter.load(save(tmp_path / "with", content))
    torch.serialization.set_crc32_options(False)
    try:
        folder = save(tmp_path / "without", content)
    finally:
        torch.serialization.set_crc32_options(True)
    assert Adapter.load(folder).equals(whole)


def test_a_pickle_of_protocol_4_is_refused_in_one_message(tmp_path: Path):
    """Without torch's warning, which would be an error here."""
    content = {"diffs": {"w": encode(torch.tensor([1.0, 0.0]))}, "abs": {}}
    torch.save(content, tmp_path / "pytorch_diff.bin", pickle_protocol=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AdapterFormatError, match="saved with pickle_protocol=4"):
            Adapter.load(tmp_path)
