"""`Adapter` as a value: a mapping with provenance, digest and summary; and base fingerprints."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path

import pytest
import torch

from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError, DiffError, UnknownNameError
from sparseft.fingerprint import (
    Fingerprint,
    compare,
    fingerprint_tensor,
    sample_positions,
)


def make(**kwargs: object) -> Adapter:
    diffs = {
        "b.weight": SparseDiff.from_dense(torch.tensor([[0.0, -3.0], [1.0, 0.0]])),
        "a.bias": SparseDiff.from_dense(torch.tensor([2.0, 0.0, 0.0]).bfloat16(), mode="set"),
    }
    return Adapter(diffs, dense={"head": torch.tensor([[1.0, -5.0]])}, **kwargs)  # type: ignore[arg-type]


def test_a_mapping_in_order_of_names():
    adapter = make(name="sw")
    assert list(adapter) == adapter.names == ["a.bias", "b.weight"]
    assert len(adapter) == 2
    assert adapter["b.weight"].nnz == 2
    assert adapter.get("absent") is None
    assert dict(adapter.items()).keys() == set(adapter.names)
    assert adapter.nnz == 3
    assert adapter.nbytes == 2 * (4 + 4) + (4 + 2) + 2 * 4
    assert "sw" in repr(adapter)
    with pytest.raises(UnknownNameError, match=r"no diff of 'b\.weigth'. Did you mean 'b\.weight'"):
        adapter["b.weigth"]


def test_identity_is_not_contents():
    one, two = make(), make()
    assert one != two
    assert len({one, two}) == 2
    assert one.equals(two)
    assert Adapter({})  # true although empty: an adapter may hold only a head


def test_digest_covers_contents_only():
    adapter = make(name="x", metadata=AdapterMetadata(seed=1))
    assert adapter.digest == make(name="y", metadata=AdapterMetadata(seed=2)).digest
    changed = {
        "a value": Adapter({**adapter, "a.bias": adapter["b.weight"]}, dense=adapter.dense),
        "a name": Adapter(
            {"a.bias": adapter["a.bias"], "c": adapter["b.weight"]}, dense=adapter.dense
        ),
        "no head": Adapter(dict(adapter)),
        "another head": Adapter(dict(adapter), dense={"head": -adapter.dense["head"]}),
        "head of another shape": Adapter(dict(adapter), dense={"head": adapter.dense["head"].t()}),
    }
    assert len({a.digest for a in changed.values()} | {adapter.digest}) == 1 + len(changed)
    assert not any(adapter.equals(a) for a in changed.values())


def test_digest_does_not_confuse_names_with_contents():
    diff = SparseDiff.from_dense(torch.ones(1))
    assert (
        Adapter({"a": diff, "b": diff}).digest
        != Adapter({f"a:{diff.digest()}:diff:1:b": diff}).digest
    )


@pytest.mark.parametrize(
    ("diffs", "dense", "message"),
    [
        ({"w": torch.ones(2)}, {}, r"diffs\['w'\] is Tensor, wanted a SparseDiff"),
        ({"": SparseDiff.from_dense(torch.ones(1))}, {}, "'' cannot name a parameter"),
        ({3: SparseDiff.from_dense(torch.ones(1))}, {}, "3 cannot name a parameter"),
        ({}, {"h": torch.ones(2, dtype=torch.int64)}, r"dense\['h'\] is torch.int64"),
        ({}, {"h": [1.0]}, r"dense\['h'\] is list"),
        ({}, {"h": torch.tensor([1.0, math.nan])}, r"dense\['h'\] must be finite; .*entry 1"),
        (
            {"w": SparseDiff.from_dense(torch.ones(1))},
            {"w": torch.ones(1)},
            "both a diff and a dense",
        ),
    ],
    ids=["tensor", "empty-name", "number-name", "int-head", "list-head", "nan-head", "both"],
)
def test_refuses(diffs: dict, dense: dict, message: str):
    with pytest.raises(DiffError, match=message):
        Adapter(diffs, dense=dense)


def test_metadata_extra_is_json():
    metadata = AdapterMetadata(extra={"langs": ("sw", "en")})
    assert metadata.extra == {"langs": ["sw", "en"]}  # as a file would give it back
    for bad in ({"x": torch.ones(1)}, {"x": math.nan}, {"x": object()}):
        with pytest.raises(AdapterFormatError, match="no JSON form"):
            AdapterMetadata(extra=bad)
    with pytest.raises(dataclasses.FrozenInstanceError):
        metadata.seed = 3  # type: ignore[misc]
    assert set(AdapterMetadata().versions) == {"sparseft", "torch"}


def test_to_casts_diffs():
    half = make().to(dtype=torch.float16)
    assert {d.dtype for d in half.values()} == {torch.float16}
    assert half.dense["head"].dtype == torch.float32
    assert half["b.weight"].values.tolist() == [-3.0, 1.0]


@pytest.mark.parametrize("loaded", [False, True])
def test_copies_and_pickles(tmp_path: Path, loaded: bool):
    adapter = make(name="sw", metadata=AdapterMetadata(seed=3))
    source = adapter
    if loaded:
        adapter.save(tmp_path)
        source = Adapter.load(tmp_path, check="lazy")
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert other.equals(adapter)
        assert other.name == "sw"
        assert other.metadata == adapter.metadata
        other["b.weight"].values.zero_()
        assert source["b.weight"].values.tolist() == [-3.0, 1.0]


def test_summary():
    summary = make(name="sw", metadata=AdapterMetadata(method="magnitude")).summary()
    bias, weight, head = summary.tensors
    assert (bias.name, bias.kind, bias.shape, bias.nnz) == ("a.bias", "diff", (3,), 1)
    assert (bias.mode, bias.dtype, bias.nbytes) == ("set", "bfloat16", 6)
    assert bias.density == pytest.approx(1 / 3)
    assert (weight.mean_abs, weight.max_abs, weight.density) == (2.0, 3.0, 0.5)
    assert (head.kind, head.shape, head.nnz, head.density) == ("dense", (1, 2), 2, 1.0)
    assert (head.mean_abs, head.max_abs, head.nbytes) == (3.0, 5.0, 8)
    assert (summary.nnz, summary.numel, summary.dense_numel) == (3, 7, 2)
    assert summary.density == pytest.approx(3 / 7)
    assert summary.nbytes == make().nbytes
    assert summary.digest == make().digest
    assert summary.metadata.method == "magnitude"
    assert Adapter({}).summary().density == 0.0


# Fingerprints


@pytest.fixture
def base() -> torch.Tensor:
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 0.05


def test_equal_only_if_every_byte_is(base: torch.Tensor):
    first = fingerprint_tensor("w", base)
    assert compare(first, fingerprint_tensor("w", base.clone())) == "equal"
    assert compare(first, fingerprint_tensor("w", base.t().contiguous().t())) == "equal"
    untouched = set(sample_positions("w", base.numel()).tolist())
    place = next(i for i in range(base.numel()) if i not in untouched)
    changed = base.clone()
    changed.view(-1)[place] += 1e-3  # outside the samples: the digest sees it
    assert compare(first, fingerprint_tensor("w", changed)) == "different"
    assert compare(first, fingerprint_tensor("w", base.view(-1))) == "different"


CASTS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("there", CASTS, ids=str)
@pytest.mark.parametrize("here", CASTS, ids=str)
def test_a_cast_of_the_same_base_is_recognised(
    base: torch.Tensor, here: torch.dtype, there: torch.dtype
):
    extremes = base.clone().view(-1)
    places = sample_positions("w", base.numel())
    # Past fp16's range, its subnormals, bf16 halves, zeros.
    extremes[places[:6]] = torch.tensor([1e5, -1e5, 3e-8, 1e-30, 1 + 2**-8, -0.0])
    for tensor in (base, extremes):
        a = fingerprint_tensor("w", tensor.to(here))
        b = fingerprint_tensor("w", tensor.to(there))
        assert compare(a, b) == compare(b, a) == ("equal" if here == there else "cast")


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_of_another_base_is_not(base: torch.Tensor, there: torch.dtype):
    a = fingerprint_tensor("w", base)
    other = torch.randn(base.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    assert compare(a, fingerprint_tensor("w", other.to(there))) == "different"
    # Fine-tuned a little: more than rounding at some sample.
    tuned = base * (1 + 4 * torch.finfo(there).eps)
    assert compare(a, fingerprint_tensor("w", tuned.to(there))) == "different"
    flipped = fingerprint_tensor("w", (-base).to(there))
    assert compare(a, flipped) == "different"


def test_non_finite_bases(tmp_path: Path):
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0] * 8)
    here, there = fingerprint_tensor("w", values), fingerprint_tensor("w", values.half())
    assert compare(here, there) == "cast"
    assert compare(here, fingerprint_tensor("w", -values.half())) == "different"
    diff = SparseDiff.from_dense(torch.ones(32))
    adapter = Adapter({"w": diff}, metadata=AdapterMetadata(fingerprint=Fingerprint({"w": here})))
    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path).metadata.fingerprint
    assert loaded is not None
    assert compare(loaded.tensors["w"], here) == "equal"
    assert compare(loaded.tensors["w"], there) == "cast"


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5,)])
def test_small_tensors(shape: tuple[int, ...]):
    tensor = torch.ones(shape)
    mine = fingerprint_tensor("w", tensor)
    assert len(mine.samples) == (16 if tensor.numel() else 0)
    assert compare(mine, fingerprint_tensor("w", tensor.bfloat16())) == "cast"
    assert mine.dtype in str(mine)


def test_positions_are_fixed_by_name_and_size():
    # Files carry samples taken at these positions: another rule would be another format.
    assert sample_positions("w", 1000)[:4].tolist() == [693, 30, 272, 666]
    assert sample_positions("w", 1000).tolist() != sample_positions("v", 1000).tolist()
    assert int(sample_positions("w", 2**40).max()) > 2**31


def test_integer_tensors_are_digested():
    counts = torch.arange(20)
    assert (
        compare(fingerprint_tensor("n", counts), fingerprint_tensor("n", counts + 1)) == "different"
    )
    assert compare(fingerprint_tensor("n", counts), fingerprint_tensor("n", counts)) == "equal"
