"""Trimming and random dropping: exact counts, exact factors, and what the draws depend on."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.composition import Part, methods
from sparseft.composition.preparation import drop, drop_by_rank, kept_of, trim

SHAPE = torch.Size((40, 25))


def make_part(values, *, shape=SHAPE, name="w", digest="ab" * 16, seed=0, indices=None):
    """A part whose entries lie anywhere in the tensor."""
    values = torch.as_tensor(values)
    if indices is None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(shape.numel(), generator=generator)[: len(values)]
        indices = order.sort().values.int()
    return Part(indices, values, shape, name, digest)


def normal(n, seed=0, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_size(values):
    """Places of the entries, the largest first; of equals the first."""
    return sorted(range(len(values)), key=lambda i: (-abs(float(values[i])), i))


def survivors(step, part):
    """Which entries stay, as a bool (nnz,)."""
    return torch.isin(part.indices, step(part).indices)


def stream_word(seed, part, flat):
    """Philox-4x32-7 in Python's integers, keyed as `preparation._thinned` says."""
    secret = hashlib.blake2b(f"{seed}:{part.digest}:{part.name}".encode(), digest_size=16).digest()
    k0, k1, c2, c3 = (int.from_bytes(secret[i : i + 4], "little") for i in (0, 4, 8, 12))
    c0, c1 = flat % 2**32, flat >> 32
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0


class TestTrim:
    @settings(max_examples=80, deadline=None)
    @given(
        values=st.lists(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, -3.0, 1e-30]), max_size=60
        ),
        density=st.floats(0.0, 1.0, exclude_min=True),
        gamma=st.floats(0.0, 1.0, exclude_max=True),
    )
    def test_keeps_exactly_the_largest(self, values, density, gamma):
        part = make_part(torch.tensor(values, dtype=torch.float32))
        for outliers in (0.0, gamma):
            step = trim(density, outliers=outliers)
            if step is None:
                assert density == 1
                continue
            count = kept_of(len(values), density)
            left_out = min(int(outliers * len(values)), len(values) - count)
            wanted = sorted(by_size(values)[left_out : left_out + count])
            got = step(part)
            assert got.indices.tolist() == part.indices[wanted].tolist()
            assert got.values.tolist() == part.values[wanted].tolist()

    @pytest.mark.parametrize(
        ("nnz", "density", "kept"),
        [(0, 0.5, 0), (1, 0.01, 1), (100, 0.001, 1), (100, 0.29, 29), (100, 0.57, 57),
         (5, 0.5, 2), (7, 0.5, 4), (1000, 0.9999, 1000), (3, 1.0, 3)],
    )  # fmt: skip
    def test_counts(self, nnz, density, kept):
        assert kept_of(nnz, density) == kept
        step = trim(density)
        if step is not None:
            assert step(make_part(normal(nnz))).values.numel() == kept

    def test_values_are_moved_not_changed(self):
        part = make_part(normal(500, dtype=torch.float64))
        got = trim(0.3)(part)
        assert got.values.dtype == torch.float64
        assert torch.equal(got.values, part.values[torch.isin(part.indices, got.indices)])

    def test_the_paper_s_density_of_a_dense_tensor(self):
        """``density * nnz / numel`` of a dense tensor is ``density`` of the adapter's entries."""
        sparse = make_part(normal(400))
        dense = torch.zeros(SHAPE).flatten()
        dense[sparse.indices.long()] = sparse.values
        whole = make_part(dense, indices=torch.arange(dense.numel(), dtype=torch.int32))
        got = trim(0.5)(sparse)
        same = trim(0.5 * 400 / SHAPE.numel())(whole)
        assert got.indices.tolist() == same.indices.tolist()


class TestDrop:
    def test_nothing_is_dropped_at_density_1(self):
        assert drop(1.0, 0) is None
        assert drop_by_rank(1.0, 0.2, "row", 0) is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_survivors_are_divided_by_the_density(self, dtype):
        part = make_part(normal(900, dtype=dtype))
        got = drop(0.3, 0)(part)
        stayed = torch.isin(part.indices, got.indices)
        assert 0 < got.values.numel() < 900
        assert torch.equal(got.values, part.values[stayed] / torch.tensor(0.3, dtype=dtype))

    @pytest.mark.parametrize("density", [0.02, 0.5, 0.9])
    def test_expectation_and_spread_over_seeds(self, density):
        """Kept counts of 300 seeds are binomial, entry by entry and in all."""
        seeds, part = 300, make_part(normal(1000))
        kept = torch.stack([survivors(drop(density, s), part) for s in range(seeds)]).double()
        spread = (density * (1 - density)) ** 0.5
        assert abs(kept.mean() - density) < 4 * spread / (seeds * 1000) ** 0.5
        entry = (kept.mean(0) - density) / (spread / seeds**0.5)
        assert entry.abs().max() < 5
        assert 0.85 < entry.std() < 1.15
        total = (kept.sum(1) - 1000 * density) / (1000**0.5 * spread)
        assert 0.8 < total.std() < 1.2

    def test_the_expected_diff_is_the_diff(self):
        part = make_part(normal(200))
        mean = torch.zeros(200, dtype=torch.float64)
        for seed in range(400):
            got = drop(0.5, seed)(part)
            mean[torch.isin(part.indices, got.indices)] += got.values.double() / 400
        error = (mean - part.values.double()) / part.values.double().abs()  # std 1 / sqrt(400)
        assert error.abs().max() < 5 / 20

    def test_an_entry_s_fate_depends_on_itself_alone(self):
        """Take half of the entries away: the others stay or go as before."""
        part = make_part(normal(800))
        some = torch.rand(800, generator=torch.Generator().manual_seed(5)) < 0.5
        step = drop(0.4, 11)
        assert torch.equal(survivors(step, part)[some], survivors(step, part.keep(some)))

    @pytest.mark.parametrize("change", ["seed", "name", "digest"])
    def test_independent_draws(self, change):
        part = make_part(normal(1000))
        first = survivors(drop(0.5, 1), part)
        if change == "seed":
            second = survivors(drop(0.5, 2), part)
        else:
            second = survivors(drop(0.5, 1), part._replace(**{change: "other"}))
        assert 430 < int((first == second).sum()) < 570  # 500 +- 4.4 sigma

    def test_no_generator_is_read_or_moved(self):
        part = make_part(normal(100))
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = survivors(drop(0.5, 0), part)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert torch.equal(survivors(drop(0.5, 0), part), first)

    @pytest.mark.parametrize(
        ("first", "kept"),
        [(0, [1, 4, 5, 6, 7, 10, 11, 12, 15]), (2**33, [0, 3, 4, 11, 12, 14, 15])],
        ids=["low", "high"],
    )
    def test_the_stream_is_what_it_says_and_stays_so(self, first, kept):
        """What a seed drops today it drops in every release: files record the seed alone."""
        part = make_part(torch.ones(16), indices=torch.arange(16) + first)
        got = (drop(0.5, 0)(part).indices - first).tolist()
        assert got == kept
        assert got == [i for i in range(16) if stream_word(0, part, first + i) < 2**31]

    @pytest.mark.parametrize("n", [0, 1, (1 << 15) - 1, (1 << 15) + 1, 70000])
    def test_blocks_do_not_show(self, n):
        indices = torch.arange(n, dtype=torch.int32) * 3
        part = make_part(torch.ones(n), shape=torch.Size((300_000,)), indices=indices)
        got = drop(0.5, 4)(part).indices
        pieces = [part.keep(indices // 3 % 7 == r) for r in range(7)]  # each in one block
        apart = torch.cat([drop(0.5, 4)(piece).indices for piece in pieces]).sort().values
        assert got.tolist() == apart.tolist()


class TestDropByRank:
    def expected(self, part, density, epsilon, ranks):
        """Probability to stay of each entry, in Python."""
        columns = part.shape.numel() // part.shape[0] if len(part.shape) > 1 else 1
        flat = part.indices.tolist()
        group = [i // columns if ranks == "row" and len(part.shape) > 1 else 0 for i in flat]
        out = [0.0] * len(flat)
        for g in set(group):
            members = [i for i in by_size(part.values) if group[i] == g]
            for place, i in enumerate(members):
                share = 1 - place / (len(members) - 1) if len(members) > 1 else 0.5
                out[i] = density - epsilon + 2 * epsilon * share
        return torch.tensor(out, dtype=torch.float64)

    @pytest.mark.parametrize("shape", [(40, 25), (1000,), (10, 4, 25), (1000, 1)], ids=str)
    @pytest.mark.parametrize("ranks", ["row", "tensor"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_survivors_are_divided_by_their_probability(self, ranks, shape, dtype):
        values = normal(400, dtype=dtype)
        values[::3] = values[::3].round()  # ties
        part = make_part(torch.where(values == 0, 1.0, values), shape=torch.Size(shape))
        keep = self.expected(part, 0.5, 0.3, ranks)
        got = drop_by_rank(0.5, 0.3, ranks, 3)(part)
        stayed = torch.isin(part.indices, got.indices)
        torch.testing.assert_close(
            (part.values[stayed] / got.values).double(), keep[stayed], rtol=3e-7, atol=0
        )

    @pytest.mark.parametrize("ranks", ["row", "tensor"])
    def test_frequencies_are_the_probabilities(self, ranks):
        part, seeds = make_part(normal(600)), 300
        keep = self.expected(part, 0.6, 0.35, ranks)
        step = [drop_by_rank(0.6, 0.35, ranks, s) for s in range(seeds)]
        often = torch.stack([survivors(s, part) for s in step]).double().mean(0)
        z = (often - keep) / (keep * (1 - keep) / seeds).sqrt()
        assert z.abs().max() < 5
        assert 0.85 < z.std() < 1.15

    def test_without_a_window_it_is_dare(self):
        part = make_part(normal(500))
        for got, wanted in zip(
            drop_by_rank(0.4, 0.0, "row", 9)(part), drop(0.4, 9)(part), strict=True
        ):
            assert torch.equal(got, wanted) if isinstance(got, torch.Tensor) else got == wanted

    def test_probability_one_always_stays(self):
        part = make_part(normal(100))
        for seed in range(50):
            kept = survivors(drop_by_rank(0.6, 0.4, "tensor", seed), part)
            assert kept[by_size(part.values)[0]]


@pytest.mark.parametrize("method", sorted(methods()))
def test_no_tensor_of_the_weights_size_is_made(method):
    """A weight of 2**44 entries, an adapter of 64: anything dense would not fit in memory."""
    options = {"density": 0.5} if "density" in methods()[method].options else {}
    recipe = methods()[method].fn(**options)
    if recipe.prepare is None:
        assert not options
        return
    at = torch.arange(64) * 2**38 + 5
    part = make_part(normal(64), shape=torch.Size((2**22, 2**22)), indices=at)
    got = recipe.prepare(part)
    assert 0 < got.values.numel() < 64
    assert got.indices.numel() == got.values.numel()
