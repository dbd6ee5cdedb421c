"""Exact top-k kernels: the reference's patterns bit for bit, interpreted or on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparseft
from sparseft import ops
from sparseft.errors import BackendError, MaskError
from sparseft.ops.topk import topk_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# An odd matrix, less than a block, one past a block of 64, nothing, 0-d, several spans.
SHAPES = [(13, 31), (5,), (65,), (0, 4), (), (3, 7, 29)]
LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]

Pairs = list[tuple[str, torch.Tensor, torch.Tensor]]


@pytest.fixture
def kernels():
    return pytest.importorskip("sparseft_kernels.topk", reason="Triton is not installed")


@pytest.fixture
def small(kernels, monkeypatch, poisoned_launcher):
    """Tiles and bounds so small that a few hundred entries take every path."""
    config = kernels.TOPK._replace(block=64, spans=8, sample=64, spare=8)
    monkeypatch.setattr(kernels, "TOPK", config)
    return kernels


def pairs_of(device: str, dtype: torch.dtype, kind: str = "normal", shapes=SHAPES) -> Pairs:
    out = []
    for i, shape in enumerate(shapes):
        theta0 = torch.randn(shape)
        delta = torch.randn(shape) * 0.01
        if kind == "constant":
            theta0, delta = torch.zeros(shape), torch.full(shape, -3.0)
        elif kind == "zeros":
            delta = torch.zeros(shape)
        elif kind == "ties":
            theta0, delta = torch.zeros(shape), torch.randint(-2, 3, shape).float()
        elif kind == "few":
            delta = torch.where(torch.rand(shape) < 0.02, delta, 0)
        elif kind == "subnormal":
            theta0, delta = torch.zeros(shape), torch.randint(-9, 9, shape) * 2.0**-149
        elif kind == "inf":
            delta = torch.where(torch.rand(shape) < 0.05, float("-inf"), delta)
        theta0 = theta0.to(dtype)
        out.append((f"t{i}", (theta0.float() + delta).to(dtype).to(device), theta0.to(device)))
    return out


def total(pairs: Pairs) -> int:
    return sum(theta1.numel() for _, theta1, _ in pairs)


def scores_of(pairs: Pairs) -> list[tuple[str, torch.Tensor]]:
    return [(name, (new.float() - old.float()).abs().cpu()) for name, new, old in pairs]


def assert_selects(pairs: Pairs, k: int) -> None:
    """The kernels keep what one stable sort keeps, and so does the reference path."""
    top = ops.topk_differences(pairs, k, backend="triton")
    scores = scores_of(pairs)
    expected = topk_reference(scores, k)
    assert list(top.patterns) == list(expected)
    for name, mask in expected.items():
        pattern = top.patterns[name]
        assert pattern.indices.dtype == torch.int32
        assert pattern.shape == mask.shape
        assert torch.equal(pattern.indices.cpu().long(), mask.flatten().nonzero().view(-1)), name
    assert top.zeros == max(0, k - sum(int(s.count_nonzero()) for _, s in scores))
    theirs = ops.topk_differences(pairs, k, backend="reference")
    assert theirs.zeros == top.zeros
    for name, pattern in theirs.patterns.items():
        assert torch.equal(pattern.indices, top.patterns[name].indices)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", ["0", "1", "1%", "half", "all but one", "all"])
def test_every_count(small, device, dtype, k):
    pairs = pairs_of(device, dtype)
    n = total(pairs)
    counts = {"0": 0, "1": 1, "1%": n // 100, "half": n // 2, "all but one": n - 1, "all": n}
    assert_selects(pairs, counts[k])


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("kind", ["constant", "zeros", "ties", "few", "subnormal", "inf"])
def test_every_kind_of_tie(small, device, kind):
    pairs = pairs_of(device, torch.float32, kind)
    for k in (7, total(pairs) // 3):
        assert_selects(pairs, k)


@pytest.mark.parametrize("device", LANES)
def test_dtypes_and_alignments_may_be_mixed(small, device):
    """Each kind of pair is a launch of its own; the order of ties is that of the tensors."""

    def shifted(x: torch.Tensor) -> torch.Tensor:
        """The same entries, one element past an aligned address."""
        out = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view(x.shape)
        return out.copy_(x)

    def cast(dtype1: torch.dtype, dtype0: torch.dtype, shift: bool) -> Pairs:
        name, new, old = pairs_of(device, torch.float16, "ties", [(17, 11)])[0]
        new, old = new.to(dtype1), old.to(dtype0)
        return [(f"{dtype1}{dtype0}{shift}", shifted(new) if shift else new, old)]

    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    pairs = cast(brain, brain, True) + cast(brain, single, False) + cast(single, half, False)
    pairs += cast(brain, brain, False) + cast(single, single, True)
    for k in (1, 100, total(pairs) // 2):
        assert_selects(pairs, k)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("kind", ["normal", "constant", "few"])
@pytest.mark.parametrize("bracket", ["too low", "too high", "apart"])
def test_the_sample_does_not_decide(small, device, kind, bracket, monkeypatch):
    """Whatever the sample says, the answer is exact; a bad guess costs reads, counted here."""
    low_high = {"too low": [0, 1], "too high": [0x7F80_0000] * 2, "apart": [1, 0x7F80_0000]}
    guess = torch.tensor(low_high[bracket], dtype=torch.int32, device=device)
    monkeypatch.setattr(small, "_bracket", lambda source, k: guess)
    refined = []
    radix = small._radix

    def watched(source, k, limit=None):
        refined.append(limit)
        return radix(source, k, limit)

    monkeypatch.setattr(small, "_radix", watched)
    pairs = pairs_of(device, torch.bfloat16, kind)
    k = total(pairs) // 10
    assert_selects(pairs, k)
    assert refined[0] == 2 * k + small.TOPK.spare, "the bad bracket was not seen"


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("kind", ["normal", "constant", "few", "zeros"])
@pytest.mark.parametrize("bad", [False, True], ids=["sampled", "bad bracket"])
def test_memory_is_bounded_by_the_count(small, device, kind, bad, monkeypatch):
    """All that the launcher allocates for one selection of k out of 25 k, added up."""
    monkeypatch.setattr(small, "TOPK", small.TOPK._replace(block=512))
    pairs = pairs_of(device, torch.bfloat16, kind, [(25, 300), (5000,)])
    k = total(pairs) // 25
    if bad:
        guess = torch.tensor([0, 0x7F80_0000], dtype=torch.int32, device=device)
        monkeypatch.setattr(small, "_bracket", lambda source, k: guess)
    sizes = []
    allocate = small.empty

    def watched(*args, **kwargs):
        out = allocate(*args, **kwargs)
        sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(small, "empty", watched)
    ops.topk_differences(pairs, k, backend="triton")
    spans = 3 * (small.TOPK.spans + 2)  # of the tensors twice, and of the list
    fixed = 8 * small.TOPK.spare + 4 * small.TOPK.sample + 16 * spans + 64
    assert max(sizes) <= 4 * (2 * k + small.TOPK.spare)
    assert sum(sizes) <= 20 * k + fixed


@pytest.mark.parametrize("device", LANES)
def test_the_tiles_that_ship(kernels, poisoned_launcher, device):
    """Blocks of 2048 entries, full and cut off."""
    pairs = pairs_of(device, torch.bfloat16, shapes=[(2048,), (3, 1000), (2049,)])
    assert_selects(pairs, 700)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("nnz", [0, 9])
@pytest.mark.parametrize("value", ["nan", "inf - inf"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
def test_what_cannot_be_ranked_is_named(small, device, nnz, value):
    pairs = pairs_of(device, torch.bfloat16)
    bad = float("nan" if value == "nan" else "inf")
    for tensor in ("t2", "t5"):
        _, new, old = pairs[int(tensor[1])]
        new.view(-1)[60:] = bad
        if value == "inf - inf":
            old.view(-1)[60:] = bad
    for backend in ("triton", "reference"):
        with pytest.raises(MaskError, match=r"of 't2' are NaN \(first at flat index 60\)"):
            ops.topk_differences(pairs, nnz, backend=backend)


@pytest.mark.parametrize("device", LANES)
def test_plain_scores(small, device):
    scores = {n: s.to(device) for n, s in scores_of(pairs_of(device, torch.float32, "few"))}
    signed = {n: -s for n, s in scores.items()}  # with zeros of both signs
    for k in (3, 30, 500):
        expected = topk_reference([(n, s.cpu()) for n, s in scores.items()], k)
        for got in (
            ops.topk_patterns(scores.items(), k, backend="triton"),
            ops.topk_patterns(signed.items(), k, abs=True, backend="triton"),
        ):
            for name, mask in expected.items():
                assert torch.equal(got[name].to_mask().cpu(), mask)
    single = ops.topk_single(scores["t0"], 50, backend="triton")
    assert single.equals(ops.topk_single(scores["t0"], 50, backend="reference"))
    minus_zero = {"a": torch.tensor([-0.0, 0.0, -0.0], device=device)}
    assert ops.topk_patterns(minus_zero.items(), 2, backend="triton")["a"].indices.tolist() == [
        0,
        1,
    ]
    with pytest.raises(MaskError, match="'t0' hold negative values; pass abs=True"):
        ops.topk_patterns(signed.items(), 3, backend="triton")
    signed["t2"][7] = float("nan")
    with pytest.raises(MaskError, match=r"'t2' hold NaN \(first seen at flat index 7\)"):
        ops.topk_patterns(signed.items(), 3, abs=True, backend="triton")


@pytest.mark.parametrize("device", LANES)
def test_bad_calls_are_named(small, device):
    ones = torch.ones(4, device=device)
    with pytest.raises(MaskError, match="nnz=9 entries.*only 4"):
        ops.topk_differences([("a", ones, ones)], 9, backend="triton")
    with pytest.raises(MaskError, match="'a' were added twice"):
        ops.topk_differences([("a", ones, ones)] * 2, 1, backend="triton")
    with pytest.raises(MaskError, match=r"theta1 of 'a' has shape \(4,\) but theta0 has \(3,\)"):
        ops.topk_differences([("a", ones, ones[:3])], 1, backend="triton")
    with pytest.raises(MaskError, match="integer >= 0"):
        ops.topk_differences([("a", ones, ones)], -1, backend="triton")
    with pytest.raises(BackendError, match="one of its tensors is torch.float64"):
        ops.topk_differences([("a", ones.double(), ones)], 1, backend="triton")
    strided = torch.ones(4, 3, device=device).t()
    with pytest.raises(BackendError, match="not contiguous"):
        ops.topk_differences([("a", strided, strided)], 1, backend="triton")
    with pytest.raises(BackendError, match="per_row=True.* has no Triton kernel"):
        ops.topk_single(ones, 1, per_row=True, backend="triton")
    nothing = ops.topk_differences([("a", ones[:0], ones[:0])], 0, backend="triton")
    assert nothing.patterns["a"].nnz == 0


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_select_takes_the_same_masks(small, device, scope):
    base = torch.nn.Sequential(torch.nn.Linear(11, 23), torch.nn.Linear(23, 7, bias=False))
    tuned = torch.nn.Sequential(torch.nn.Linear(11, 23), torch.nn.Linear(23, 7, bias=False))
    base.to(device).bfloat16()
    tuned.to(device).bfloat16()
    masks = {}
    for backend in ("triton", "reference"):
        if scope == "row" and backend == "triton":
            continue  # rows have no kernel: chosen by "auto" below
        with ops.backend(backend):
            masks[backend] = sparseft.select(tuned, nnz=77, base=base, scope=scope)
    masks["auto"] = sparseft.select(tuned, nnz=77, base=base, scope=scope)
    assert masks["reference"].nnz == 77
    assert all(m.equals(masks["reference"]) for m in masks.values())
    if scope != "row":
        with torch.no_grad():
            tuned[1].weight[2, 3] = float("nan")
        with ops.backend("triton"), pytest.raises(MaskError, match=r"'1.weight' are NaN \(first"):
            sparseft.select(tuned, nnz=77, base=base, scope=scope)


@pytest.mark.interpret
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), max_size=2),
            st.sampled_from(DTYPES),
            st.sampled_from(["normal", "constant", "zeros", "ties", "few", "subnormal", "inf"]),
        ),
        min_size=1,
        max_size=4,
    ),
    fraction=st.floats(0, 1),
    block=st.sampled_from([16, 64]),
    sample=st.sampled_from([2, 16, 1 << 19]),
    seed=st.integers(0, 2**16),
)
def test_equals_one_stable_sort(small, tensors, fraction, block, sample, seed):
    torch.manual_seed(seed)
    pairs = []
    for i, (shape, dtype, kind) in enumerate(tensors):
        _, new, old = pairs_of("cpu", dtype, kind, [tuple(shape)])[0]
        pairs.append((f"t{i}", new, old))
    config = small.TOPK._replace(block=block, sample=sample, spare=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "TOPK", config)
        assert_selects(pairs, round(fraction * total(pairs)))


@pytest.mark.interpret
def test_a_tensor_past_two_to_the_31(kernels, monkeypatch):
    """Only the last spans of 2**31 + 100 entries are read (the others hold zeros, which the system
    does not even store): their addresses and indices are 64-bit.
    """
    n = 2**31 + 100
    theta1 = torch.from_numpy(np.zeros(n, dtype=np.float16))  # torch.zeros would write them
    places = [n - 1, n - 90, n - 5000]
    theta1[places] = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float16)
    monkeypatch.setattr(kernels, "TOPK", kernels.TOPK._replace(sample=64))
    monkeypatch.setattr(  # spans that are not read count nothing
        kernels, "empty", lambda size, like, dtype=None: like.new_zeros(size, dtype=dtype)
    )
    build = kernels._source

    def last_spans(tensors, *args):
        source = build(tensors, *args)
        kinds = [kind._replace(spans=kind.spans[-2:]) for kind in source.kinds]
        return source._replace(kinds=kinds)

    monkeypatch.setattr(kernels, "_source", last_spans)
    # a floor of 1 lists the three; that their list has a span more than it reads does not matter
    bracket = torch.tensor([1, 0x7F80_0000], dtype=torch.int32)
    monkeypatch.setattr(kernels, "_bracket", lambda source, k: bracket)
    for k, expected in ((3, sorted(places)), (2, sorted(places[:2])), (1, [n - 1])):
        found = kernels.launch_topk([theta1], None, k)
        assert found.indices[0].dtype == torch.int64
        assert found.indices[0].tolist() == expected


def difference(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight before and after: bf16 steps of a trained model tie by the thousand."""
    old = torch.empty(n, dtype=dtype, device="cuda").normal_()
    step = torch.empty(n, dtype=dtype, device="cuda").normal_(std=0.01)
    return old + step, old


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu_and_waits_twice_at_most():
    import warnings

    pairs = [(f"t{i}", *difference(1 << 20, torch.float32)) for i in range(4)]
    tensors = [t for _, *pair in pairs for t in pair]
    assert ops.resolve_backend("topk_differences", *tensors) == "triton"
    ops.topk_differences(pairs, 40_000)  # compiled before the count
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ops.topk_differences(pairs, 40_000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= 2, [str(w.message) for w in waits]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["trained", "constant", "zeros", "clustered"])
def test_memory_and_determinism_at_size(kind):
    """2**28 entries, 0.1 % kept: what is allocated beside the weights, and the same bits twice."""
    new, old = difference(1 << 28, torch.bfloat16)
    if kind == "constant":
        old.zero_()
        new.fill_(1)
    elif kind == "zeros":
        new.copy_(old)
    elif kind == "clustered":
        new[1 << 20 :] = old[1 << 20 :]
    pairs = [("a", new[: 1 << 27], old[: 1 << 27]), ("b", new[1 << 27 :], old[1 << 27 :])]
    k = (1 << 28) // 1000
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = ops.topk_differences(pairs, k, backend="triton").patterns
    assert torch.cuda.max_memory_allocated() - before <= 20 * k + (48 << 20)
    second = ops.topk_differences(pairs, k, backend="triton").patterns
    theirs = ops.topk_differences(pairs, k, backend="reference").patterns
    for name, pattern in first.items():
        assert torch.equal(pattern.indices, second[name].indices)
        assert torch.equal(pattern.indices, theirs[name].indices)


@pytest.mark.gpu
@pytest.mark.parametrize("one", [True, False], ids=["one tensor", "several"])
def test_more_than_two_to_the_31_entries(one):
    """Of 2**31 + 12345 bf16 entries, in one tensor and in all."""
    n = 2**31 + 12_345
    new, old = difference(n, torch.bfloat16)
    cuts = [n] if one else [n // 3, n // 3, n - 2 * (n // 3)]
    pairs = [
        (f"t{i}", a, b)
        for i, (a, b) in enumerate(zip(new.split(cuts), old.split(cuts), strict=True))
    ]
    k = n // 1000
    mine = ops.topk_differences(pairs, k, backend="triton").patterns
    theirs = ops.topk_differences(pairs, k, backend="reference").patterns
    assert sum(p.nnz for p in mine.values()) == k
    for name, pattern in mine.items():
        assert pattern.indices.dtype == (torch.int64 if one else torch.int32)
        assert torch.equal(pattern.indices, theirs[name].indices)
