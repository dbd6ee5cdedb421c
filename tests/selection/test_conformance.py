"""What every registered selection method keeps to, in every scope."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import select
from sparseft._integrity import bits_equal
from sparseft.errors import MaskError, UnknownNameError
from sparseft.selection import Masks, selectors
from sparseft.selection.counts import apportion

CANDIDATES = ["cube", "embed.weight", "empty", "matrix", "scalar", "strided", "vector"]
NUMEL = 24 + 18 + 0 + 30 + 1 + 36 + 7
SCORING = sorted(n for n, e in selectors().items() if e.traits["kind"] != "patterns")


def arguments(method, base):
    """What each method needs besides a count; a new method without an entry must need nothing."""
    return {
        "magnitude": {"base": base},
        "deltas_svd": {"base": base, "rank": 2, "residual": 0.2},
        "function": {"fn": lambda name, p: p.detach().float().abs()},
    }.get(method, {})


def test_methods_are_described():
    assert set(selectors()) >= {"magnitude", "random", "file", "function"}
    for entry in selectors().values():
        assert entry.reference.startswith("https://")
        assert entry.summary
        assert entry.traits["kind"] in ("scores", "either", "patterns")
        parameters = list(inspect.signature(entry.fn).parameters.values())
        assert parameters[0].name == "candidates"
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[1:])
        assert all(p.annotation is not p.empty for p in parameters)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("method", SCORING)
class TestScores:
    def test_exact_count_at_every_size(self, method, scope, pair):
        base, tuned = pair()
        for nnz in range(NUMEL + 1):
            masks = select(tuned, method, nnz=nnz, scope=scope, **arguments(method, base))
            assert sum(p.nnz for p in masks.values()) == nnz == masks.nnz

    def test_shape_of_the_result(self, method, scope, pair):
        base, tuned = pair()
        masks = select(tuned, method, nnz=40, scope=scope, **arguments(method, base))
        assert isinstance(masks, Masks)
        assert list(masks) == CANDIDATES
        parameters = dict(tuned.named_parameters())
        for name, pattern in masks.items():
            assert pattern.shape == parameters[name].shape
            # Checked again from scratch: ascending, unique, in range, of the right dtype.
            assert type(pattern)(pattern.indices, pattern.shape).nnz == pattern.nnz

    def test_deterministic_and_changes_nothing(self, method, scope, pair):
        base, tuned = pair()
        before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
        versions = {n: p._version for n, p in tuned.named_parameters()}
        state = torch.get_rng_state()
        first = select(tuned, method, nnz=33, scope=scope, **arguments(method, base))
        torch.manual_seed(99)
        second = select(tuned, method, nnz=33, scope=scope, **arguments(method, base))
        assert first.equals(second)
        assert all(bits_equal(p, before[n]) for n, p in tuned.named_parameters())
        assert versions == {n: p._version for n, p in tuned.named_parameters()}
        assert all(p.grad is None for p in tuned.parameters())
        torch.set_rng_state(state)
        select(tuned, method, nnz=33, scope=scope, **arguments(method, base))
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"

    def test_reduced_precision(self, method, scope, pair):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            base, tuned = pair(dtype)
            masks = select(tuned, method, density=0.3, scope=scope, **arguments(method, base))
            assert masks.nnz == round(0.3 * NUMEL)

    def test_share_of_each_tensor(self, method, scope, pair):
        if scope == "global":
            return
        base, tuned = pair()
        masks = select(tuned, method, nnz=50, scope=scope, **arguments(method, base))
        shares = apportion(50, [p.numel for p in masks.values()])
        assert [p.nnz for p in masks.values()] == shares

    def test_share_of_each_row(self, method, scope, pair):
        if scope != "row":
            return
        base, tuned = pair()
        masks = select(tuned, method, nnz=50, scope=scope, **arguments(method, base))
        for name in ("matrix", "cube", "strided", "embed.weight"):
            rows = masks[name].row_offsets().diff().tolist()
            assert max(rows) - min(rows) <= 1
            assert rows == sorted(rows, reverse=True), "the first rows keep the units left over"


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_masks_nest_as_nnz_grows(method, scope, pair):
    base, tuned = pair()
    if scope != "global":  # shares are apportioned anew for each total, so take multiples
        sizes = [NUMEL // 4, NUMEL // 2, NUMEL]
    else:
        sizes = list(range(NUMEL + 1))
    smaller = None
    for nnz in sizes:
        masks = select(tuned, method, nnz=nnz, scope=scope, **arguments(method, base))
        if smaller is not None:
            for name, pattern in smaller.items():
                assert set(pattern.indices.tolist()) <= set(masks[name].indices.tolist())
        smaller = masks


class TestSeveralCounts:
    """A list of counts: what each count alone gives, from scores that are computed once."""

    COUNTS = (40, 3, NUMEL, 0, 40, 77)

    @pytest.mark.parametrize("scope", ["global", "tensor", "row"])
    @pytest.mark.parametrize("method", SCORING)
    def test_each_is_what_its_count_alone_gives(self, method, scope, pair):
        for dtype in (torch.float32, torch.float64):
            base, tuned = pair(dtype)
            given = arguments(method, base)
            several = select(tuned, method, nnz=self.COUNTS, scope=scope, **given)
            assert [masks.nnz for masks in several] == list(self.COUNTS)
            for count, masks in zip(self.COUNTS, several, strict=True):
                assert isinstance(masks, Masks)
                assert masks.equals(select(tuned, method, nnz=count, scope=scope, **given)), count

    def test_of_densities(self, pair):
        base, tuned = pair()
        several = select(tuned, density=[0.5, 0.1], base=base)
        assert [masks.nnz for masks in several] == [58, 12]
        assert several[1].equals(select(tuned, density=0.1, base=base))
        [alone] = select(tuned, density=[0.1], base=base)
        assert alone.equals(several[1])

    @pytest.mark.parametrize("scope", ["global", "tensor", "row"])
    def test_scores_are_computed_once(self, scope, pair):
        _, tuned = pair()
        asked = []

        def score(name, parameter):
            asked.append(name)
            return parameter.abs()

        select(tuned, "function", nnz=[5, 50, 20], fn=score, scope=scope)
        assert asked == CANDIDATES

    @pytest.mark.parametrize("scope", ["global", "tensor", "row"])
    def test_differences_are_taken_once(self, scope, pair, monkeypatch):
        from sparseft.ops import topk
        from sparseft.selection import differences

        base, tuned = pair()
        taken = []

        def count(new, old, of=topk.difference):
            taken.append(new.numel())
            return of(new, old)

        monkeypatch.setattr(topk, "difference", count)
        monkeypatch.setattr(differences, "difference", count)
        select(tuned, nnz=[5, 50, 20], base=base, scope=scope)
        assert sum(taken) == NUMEL

    def test_masks_nest(self, pair):
        base, tuned = pair()
        several = select(tuned, nnz=list(range(NUMEL + 1)), base=base)
        for small, large in zip(several, several[1:], strict=False):
            for name, pattern in small.items():
                assert set(pattern.indices.tolist()) <= set(large[name].indices.tolist())

    def test_ready_masks_have_the_count_they_have(self, pair, tmp_path):
        base, tuned = pair()
        path = select(tuned, nnz=31, base=base).save(tmp_path / "m.safetensors")
        assert [m.nnz for m in select(tuned, "file", path=path, nnz=[31, 31])] == [31, 31]
        with pytest.raises(MaskError, match="30 entries were asked for but the masks .* have 31"):
            select(tuned, "file", path=path, nnz=[31, 30])

    def test_refusals(self, pair):
        base, tuned = pair()
        with pytest.raises(MaskError, match="nnz is an empty list"):
            select(tuned, nnz=[], base=base)
        with pytest.raises(MaskError, match="got both"):
            select(tuned, nnz=[1, 2], density=[0.1], base=base)
        with pytest.raises(MaskError, match=r"nnz is 2.5, wanted an integer"):
            select(tuned, nnz=[1, 2.5], base=base)
        with pytest.raises(MaskError, match=r"density is 7, wanted a fraction"):
            select(tuned, density=(0.1, 7), base=base)
        with pytest.raises(MaskError, match=r"nnz is '12', wanted an integer"):
            select(tuned, nnz="12", base=base)


def brute_force(scores, nnz):
    """Stable sort of (score descending, name, flat index)."""
    entries = [
        (-float(value), name, i)
        for name, tensor in sorted(scores.items())
        for i, value in enumerate(tensor.reshape(-1).tolist())
    ]
    kept = sorted(entries)[:nnz]
    return {name: sorted(i for _, n, i in kept if n == name) for name in scores}


values = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_global_ties_go_to_name_then_index(data):
    shapes = data.draw(
        st.lists(st.sampled_from([(), (0,), (5,), (2, 3), (2, 2, 2)]), min_size=1, max_size=4)
    )
    scores = {}
    # Registered in reverse, so that registration order and canonical order differ.
    for i in reversed(range(len(shapes))):
        count = torch.Size(shapes[i]).numel()
        drawn = data.draw(st.lists(values, min_size=count, max_size=count))
        scores[f"p{i}"] = torch.tensor(drawn).reshape(shapes[i])
    model = torch.nn.ParameterDict(
        {n: torch.nn.Parameter(torch.zeros_like(s)) for n, s in scores.items()}
    )
    nnz = data.draw(st.integers(0, sum(s.numel() for s in scores.values())))
    masks = select(model, "function", nnz=nnz, fn=lambda n, p: scores[n])
    got = {n: p.indices.tolist() for n, p in masks.items()}
    assert got == brute_force(scores, nnz)
    assert list(got) == sorted(scores)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_pieces_do_not_show(scope, pair, monkeypatch):
    """The same masks whatever the size of the pieces; rows and tensors span several of them."""
    import sparseft.selection.registry as registry

    base, tuned = pair()
    wanted = {m: select(tuned, m, nnz=61, scope=scope, base=base) for m in ("magnitude", "random")}
    for size in (1, 4, 7, 35):
        monkeypatch.setattr(registry, "PIECE", size)
        for method, masks in wanted.items():
            assert select(tuned, method, nnz=61, scope=scope, base=base).equals(masks), size


@given(
    total=st.integers(0, 10**6),
    sizes=st.lists(st.integers(0, 10**12), min_size=1, max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_apportion(total, sizes):
    total = min(total, sum(sizes))
    shares = apportion(total, sizes)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        assert 0 <= share <= size
        if sum(sizes):
            assert abs(share - total * size / sum(sizes)) < 1 + 1e-6


def test_a_method_that_breaks_the_protocol_is_named(pair):
    from sparseft.selection import Piece, register_selector
    from sparseft.selection.registry import REGISTRY

    base, tuned = pair()

    def methods():
        def late(candidates):
            """Leave out the first tensor."""
            for name, p in list(candidates.parameters.items())[1:]:
                yield Piece(name, 0, p.detach().abs().reshape(-1))

        def short(candidates):
            """Stop early."""
            yield Piece("cube", 0, torch.ones(24))

        def long(candidates):
            """Yield too many scores."""
            yield Piece("cube", 0, torch.ones(25))

        def extra(candidates):
            """Go on past the end."""
            for name, p in candidates.parameters.items():
                yield Piece(name, 0, p.detach().abs().reshape(-1))
            yield Piece("more", 0, torch.ones(1))

        return [(late, "'cube' from entry 0"), (short, "got the end"),
                (long, "25 scores came for 'cube'"), (extra, "past the last")]  # fmt: skip

    for fn, message in methods():
        register_selector("broken", reference="https://example.org")(fn)
        try:
            with pytest.raises(MaskError, match=message):
                select(tuned, "broken", nnz=3)
        finally:
            REGISTRY.unregister("broken")
    with pytest.raises(UnknownNameError, match=r"no selection method 'magnitud'.*'magnitude'"):
        select(tuned, "magnitud", nnz=3)
