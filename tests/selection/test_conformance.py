"""What every registered selection method keeps to, in every scope."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import select
from sparseft._integrity import bits_equal
from sparseft.errors import MaskError, OptionError, SparseFtError, UnknownNameError
from sparseft.selection import Masks, options_of, selectors
from sparseft.selection.counts import apportion

CANDIDATES = ["cube", "embed.weight", "empty", "matrix", "scalar", "strided", "vector"]
NUMEL = 24 + 18 + 0 + 30 + 1 + 36 + 7
KIND = {name: entry.traits["kind"] for name, entry in selectors().items()}
SCORING = [n for n, kind in KIND.items() if kind in ("scores", "either")]
STRUCTURES = [n for n, kind in KIND.items() if kind == "structure"]
SCOPES = [(n, scope) for n in SCORING for scope in ("global", "tensor", "row")]
SCOPES += [(n, scope) for n in STRUCTURES for scope in ("global", "tensor")]
ANY_SCOPE = pytest.mark.parametrize(("method", "scope"), SCOPES)

# What scores share is looked at once in depth; the others only add scores.
EVERY_SIZE = {"magnitude", "rows", "tiles"}
SOME = [(n, scope) for n, scope in SCOPES if scope == "global" or n in EVERY_SIZE]
# Methods that never look at a value, so that a NaN is nothing to them.
BLIND = {"random"}


BATCHES = [torch.linspace(-1, 1, 36), torch.linspace(0, 3, 36)]


def loss(model, batch):
    """Depend on every floating parameter, each entry in its own way."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    return sum((p.float().reshape(-1) - batch[: p.numel()]).square().sum() for p in floating)


def arguments(method, base, score="magnitude"):
    """What each method needs besides a count; a new method without an entry must need nothing."""
    own = {
        "magnitude": {"base": base},
        "function": {"fn": lambda name, p: p.detach().float().abs()},
        "deltas_svd": {"base": base, "rank": 1, "residual": 0.5},
        "low_rank": {"rank": 2},
        "movement": {"base": base},
        "fisher": {"batches": BATCHES, "loss_fn": loss},
        "gradient": {"batches": BATCHES, "loss_fn": loss},
        "blocks": {"block": (2, 3)},
    }.get(method, {})
    if "score" in options_of(method):
        own.update(arguments(score, base))
    return own


def chosen(model, method, nnz, base, scope="global", **options):
    """Select; a structure that says its own count is not asked for another."""
    given = {**arguments(method, base, options.get("score", "magnitude")), **options}
    if KIND[method] == "patterns":
        return select(model, method, **given)
    return select(model, method, nnz=nnz, scope=scope, **given)


def test_methods_are_described():
    assert set(selectors()) >= {
        "magnitude", "random", "file", "function", "weight_magnitude", "deltas_svd", "low_rank",
        "rows", "blocks", "tiles", "n:m", "fisher", "gradient", "movement",
    }  # fmt: skip
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    for name, entry in selectors().items():
        assert f"`{name}`" in readme
        assert entry.reference.startswith("https://")
        assert entry.summary
        assert entry.traits["kind"] in ("scores", "either", "patterns", "structure")
        parameters = list(inspect.signature(entry.fn).parameters.values())
        assert parameters[0].name == "candidates"
        kinds = {p.kind for p in parameters[1:]}
        builds_on = "score" in entry.options
        assert kinds <= {inspect.Parameter.KEYWORD_ONLY} | (
            {inspect.Parameter.VAR_KEYWORD} if builds_on else set()
        )
        assert all(p.annotation is not p.empty for p in parameters)
        if entry.traits["kind"] == "structure":
            assert {"nnz", "scope"} <= set(entry.options)
        assert set(entry.options) <= set(options_of(name))


@ANY_SCOPE
class TestEveryMethod:
    def test_exact_count_at_every_size(self, method, scope, pair):
        base, tuned = pair()
        sizes = (
            range(NUMEL + 1) if method in EVERY_SIZE else [*range(0, NUMEL, 9), NUMEL - 1, NUMEL]
        )
        for nnz, masks in zip(sizes, chosen(tuned, method, sizes, base, scope), strict=True):
            assert sum(p.nnz for p in masks.values()) == nnz == masks.nnz

    def test_several_counts_are_what_each_alone_gives(self, method, scope, pair):
        counts = (40, 3, 0, 40, 77) if method in EVERY_SIZE else (77, 40)
        for dtype in (torch.float32, torch.float64) if method in EVERY_SIZE else (torch.float64,):
            base, tuned = pair(dtype)
            several = chosen(tuned, method, counts, base, scope)
            for count, masks in zip(counts, several, strict=True):
                assert isinstance(masks, Masks)
                assert masks.equals(chosen(tuned, method, count, base, scope)), count

    def test_reduced_precision(self, method, scope, pair):
        for dtype in (torch.bfloat16, torch.float16):
            base, tuned = pair(dtype)
            masks = select(tuned, method, density=0.3, scope=scope, **arguments(method, base))
            assert masks.nnz == round(0.3 * NUMEL)


@pytest.mark.parametrize(("method", "scope"), [case for case in SCOPES if case[1] != "global"])
def test_share_of_each_tensor_and_row(method, scope, pair):
    base, tuned = pair()
    masks = chosen(tuned, method, 50, base, scope)
    shares = apportion(50, [p.numel for p in masks.values()])
    assert [p.nnz for p in masks.values()] == shares
    for name in ("matrix", "cube", "strided", "embed.weight") if scope == "row" else ():
        rows = masks[name].row_offsets().diff().tolist()
        assert max(rows) - min(rows) <= 1
        assert rows == sorted(rows, reverse=True), "the first rows keep the units left over"


@pytest.mark.parametrize(("method", "scope"), [*SOME, ("n:m", "global")])
class TestResultAndModel:
    def test_shape_of_the_result(self, method, scope, pair):
        base, tuned = pair()
        masks = chosen(tuned, method, 40, base, scope)
        assert isinstance(masks, Masks)
        assert list(masks) == CANDIDATES
        parameters = dict(tuned.named_parameters())
        for name, pattern in masks.items():
            assert pattern.shape == parameters[name].shape
            # Checked again from scratch: ascending, unique, in range, of the right dtype.
            assert type(pattern)(pattern.indices, pattern.shape).nnz == pattern.nnz

    def test_deterministic_and_changes_nothing(self, method, scope, pair):
        base, tuned = pair()
        parameters = dict(tuned.named_parameters())
        before = {n: p.detach().clone() for n, p in parameters.items()}
        versions = {n: p._version for n, p in parameters.items()}
        trained = {n: p.requires_grad for n, p in parameters.items()}
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in tuned.modules()]
        state = torch.get_rng_state()
        first = chosen(tuned, method, 33, base, scope)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
        torch.manual_seed(99)
        assert chosen(tuned, method, 33, base, scope).equals(first)
        torch.set_rng_state(state)
        assert all(bits_equal(p, before[n]) for n, p in parameters.items())
        assert versions == {n: p._version for n, p in parameters.items()}
        assert trained == {n: p.requires_grad for n, p in parameters.items()}
        assert all(p.grad is None for p in parameters.values())
        assert hooks == [
            (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in tuned.modules()
        ]
        assert tuned.training


@pytest.mark.parametrize("method", sorted({*SCORING, *STRUCTURES, "n:m"} - BLIND))
def test_nan_is_refused_by_name(method, pair):
    base, tuned = pair()
    with torch.no_grad():
        tuned.matrix[3, 2] = torch.nan
    # Its gradients are not even looked at: the loss of the batch is NaN.
    what = "batch 0 is nan" if "batches" in options_of(method) else "matrix.*NaN|NaN.*matrix"
    with pytest.raises(SparseFtError, match=what):
        chosen(tuned, method, 40, base)


BASED = [n for n in (*SCORING, *STRUCTURES, "n:m") if "base" in options_of(n)]


@pytest.mark.parametrize("method", BASED)
def test_nan_in_the_base_is_refused_by_name(method, pair):
    base, tuned = pair()
    with torch.no_grad():
        base.matrix[3, 2] = torch.nan
    with pytest.raises(SparseFtError, match="matrix.*NaN|NaN.*matrix"):
        chosen(tuned, method, 40, base)


@pytest.mark.parametrize("method", [*SCORING, *STRUCTURES, "n:m"])
def test_some_parameters_only(method, pair):
    base, tuned = pair()
    masks = chosen(tuned, method, 12, base, include=["matrix", "head.*", "empty"])
    assert list(masks) == ["embed.weight", "empty", "matrix"]
    assert KIND[method] == "patterns" or masks.nnz == 12
    alone = [("scalar", 1), ("vector", 7)]
    if "batches" not in options_of(method):  # no gradient can reach it
        alone.append(("empty", 0))
    for name, numel in alone:
        [(only, pattern)] = chosen(tuned, method, numel, base, include=name).items()
        assert only == name
        assert KIND[method] == "patterns" or pattern.nnz == numel


@pytest.mark.parametrize("score", SCORING)
@pytest.mark.parametrize("method", [*STRUCTURES, "n:m"])
def test_every_structure_builds_on_every_score(method, score, pair):
    base, tuned = pair()
    masks = chosen(tuned, method, 40, base, score=score)
    assert KIND[method] == "patterns" or masks.nnz == 40
    with pytest.raises(UnknownNameError, match=f"'{method}' with score='{score}' has no option"):
        chosen(tuned, method, 40, base, score=score, nothing=1)


def test_scores_that_do_not_exist_or_give_masks(pair):
    base, tuned = pair()
    for method in (*STRUCTURES, "n:m"):
        with pytest.raises(UnknownNameError, match="score='magnitud'.*Did you mean 'magnitude'"):
            select(tuned, method, nnz=5, base=base, score="magnitud")
        with pytest.raises(OptionError, match="score='rows' of .* gives masks, wanted .*random"):
            select(tuned, method, nnz=5, base=base, score="rows")
        with pytest.raises(OptionError, match=f"'{method}' with score='magnitude': .*needs base="):
            select(tuned, method, nnz=5)


NESTED = ("magnitude", "random", "rows", "blocks")


@pytest.mark.parametrize(("method", "scope"), [case for case in SCOPES if case[0] in NESTED])
def test_masks_nest_as_nnz_grows(method, scope, pair):
    base, tuned = pair()
    if scope != "global":  # shares are apportioned anew for each total, so take multiples
        sizes = [NUMEL // 4, NUMEL // 2, NUMEL]
    else:
        sizes = list(range(NUMEL + 1))
    several = chosen(tuned, method, sizes, base, scope)
    for small, large in zip(several, several[1:], strict=False):
        for name, pattern in small.items():
            assert set(pattern.indices.tolist()) <= set(large[name].indices.tolist())


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
    methods = [n for n, s in SCOPES if s == scope] + ["n:m"]
    wanted = {method: chosen(tuned, method, 61, base, scope) for method in methods}
    for size in (1, 7, 35):
        monkeypatch.setattr(registry, "PIECE", size)
        for method, masks in wanted.items():
            assert chosen(tuned, method, 61, base, scope).equals(masks), (method, size)


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
