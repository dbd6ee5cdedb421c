"""Truncated SVD by its invariants: U and V themselves are free in sign and rotation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import ops
from sparseft.errors import DecompositionError, OptionError
from sparseft.ops.truncated_svd import truncated_svd_reference

SPECTRA = {
    "i**-0.5": lambda k: torch.arange(1, k + 1).double() ** -0.5,
    "i**-1": lambda k: 1 / torch.arange(1, k + 1).double(),
    "halving": lambda k: 0.5 ** torch.arange(k).double(),
    "repeated": lambda k: torch.arange(k).div(10, rounding_mode="floor").add(1).double() ** -1,
    "rank 5": lambda k: (torch.arange(k) < 5).double(),
    # the third step, squared, is beyond fp32
    "steps": lambda k: (
        torch.where(torch.arange(k) < 5, 1.0, 1e-4).double()
        * torch.where(torch.arange(k) < 20, 1.0, 0.03).double()
    ),
    "flat": lambda k: torch.ones(k, dtype=torch.float64),
    "zero": lambda k: torch.zeros(k, dtype=torch.float64),
}
METHODS = ["block", "gram", "svd"]


def matrices(sigma, m, n, batch=2, dtype=torch.float32, seed=0):
    """(batch, m, n) with given singular values."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    q = [torch.randn(batch, size, k, generator=g, dtype=torch.float64) for size in (m, n)]
    u, v = (torch.linalg.qr(x)[0] for x in q)
    return ((u * sigma(k)) @ v.mT).to(dtype)


def check(found: ops.TruncatedSVD, a: torch.Tensor, slack: float = 1.01) -> None:
    """Everything that holds whatever the way, the rule and the matrix."""
    count, m, n = a.shape
    r = found.S.shape[1]
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    assert (found.U.shape, found.Vh.shape) == ((count, m, r), (count, r, n))
    assert found.U.dtype == found.S.dtype == found.Vh.dtype == dtype
    assert found.ranks.tolist() == [min(k, m, n) for k in found.ranks.tolist()]
    assert r == (max(found.ranks.tolist()) if count and m and n else r)
    assert (found.S.diff(dim=1) <= 0).all()
    assert (found.S >= 0).all()
    u, s, vh = found.U.double(), found.S.double(), found.Vh.double()
    for i, k in enumerate(found.ranks.tolist()):
        eye = torch.eye(k, dtype=torch.float64)
        assert torch.allclose(u[i, :, :k].mT @ u[i, :, :k], eye, rtol=0, atol=1e-5)
        assert torch.allclose(vh[i, :k] @ vh[i, :k].mT, eye, rtol=0, atol=1e-5)
        assert not u[i, :, k:].any()
        assert not s[i, k:].any()
        assert not vh[i, k:].any()
    wide = a.double()
    norm = torch.linalg.vector_norm(wide, dim=(1, 2))
    floor = 4 * torch.finfo(dtype).eps * norm  # of the factors' own rounding
    left = torch.linalg.vector_norm(wide - (u * s[:, None]) @ vh, dim=(1, 2))
    best = torch.linalg.vector_norm(
        wide - truncated_svd_reference(wide, found.ranks.tolist()), dim=(1, 2)
    )
    assert (left <= slack * best + floor).all(), (left, best)
    assert torch.allclose(found.norm, norm, rtol=1e-6, atol=0)
    assert ((found.residual - left).abs() <= 1e-3 * left + floor).all(), (found.residual, left)


class TestInvariants:
    @pytest.mark.parametrize("shape", [(150, 200), (200, 150)], ids=["wide", "tall"])
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("spectrum", SPECTRA)
    def test_rank(self, spectrum, method, shape):
        a = matrices(SPECTRA[spectrum], *shape)
        found = ops.truncated_svd(a, rank=20, method=method)
        assert found.methods == (method, method)
        assert found.ranks.tolist() == [20, 20]
        check(found, a)
        least = 1e-6 if method == "block" else 1e-7
        wanted = torch.linalg.svdvals(a.double())[:, :20]
        assert (found.S - wanted <= least * wanted[:, :1]).all()  # Ritz values are never too large

    @pytest.mark.parametrize(
        ("make", "rank"),
        [
            (lambda: torch.randn(1, 256, 256), 48),
            (lambda: torch.randn(1, 384, 300), 59),
            (lambda: torch.randn(1, 256, 8) @ torch.randn(1, 8, 256) + torch.randn(256, 256), 48),
            (lambda: matrices(lambda k: torch.arange(1, k + 1).double() ** -0.2, 256, 256, 1), 48),
        ],
        ids=["noise", "tall noise", "low rank under noise", "i**-0.2"],
    )
    def test_flat_spectra_take_more_iterations(self, make, rank):
        torch.manual_seed(3)
        a = make()
        found = ops.truncated_svd(a, rank=rank)
        assert found.methods == ("block",)
        check(found, a)

    def test_more_iterations_for_the_flat_ones_of_a_batch(self):
        torch.manual_seed(3)
        steep = matrices(SPECTRA["i**-1"], 256, 256)
        a = torch.cat([steep[:1], torch.randn(1, 256, 256), steep[1:]])
        found = ops.truncated_svd(a, rank=48)
        check(found, a)
        for i in range(3):
            alone = ops.truncated_svd(a[i : i + 1], rank=48)
            assert torch.allclose(alone.S[0], found.S[i], rtol=1e-5)
            assert torch.allclose(alone.residual[0], found.residual[i], rtol=1e-5)

    def test_an_energy_of_noise(self):
        a = torch.randn(1, 400, 400, generator=torch.Generator().manual_seed(5))
        found = ops.truncated_svd(a, energy=0.4)
        assert found.methods == ("block",)
        squares = torch.linalg.svdvals(a.double()).square()[0]
        fewest = 1 + int((squares.cumsum(0) < 0.4 * squares.sum()).sum())
        assert fewest <= int(found.ranks) <= fewest + 2
        check(found, a)

    @pytest.mark.parametrize("spectrum", SPECTRA)
    def test_energy_is_reached(self, spectrum):
        a = matrices(SPECTRA[spectrum], 320, 400)
        found = ops.truncated_svd(a, energy=0.9)
        check(found, a)
        assert (found.energy >= 0.9 - 1e-6).all()
        squares = torch.linalg.svdvals(a.double()).square()
        shares = squares.cumsum(1) / squares.sum(1, keepdim=True).clamp_min(1e-300)
        fewest = [0 if spectrum == "zero" else 1 + int((x < 0.9 - 1e-9).sum()) for x in shares]
        for got, least in zip(found.ranks.tolist(), fewest, strict=True):
            assert least <= got <= least + 2
        wanted = "gram" if spectrum in ("flat", "i**-0.5") else "block"
        assert found.methods == (wanted, wanted)

    def test_the_block_grows_until_the_energy_is_reached(self):
        a = matrices(lambda k: (torch.arange(k) < 100).double() + 1e-3, 520, 520, batch=1)
        found = ops.truncated_svd(a, energy=0.95)
        assert found.methods == ("block",)  # 95 columns: past the first 64
        assert 95 <= int(found.ranks) <= 96
        check(found, a)

    def test_an_exhausted_matrix_beside_one_that_grows(self):
        diagonal = torch.zeros(520, 520)
        diagonal[:3, :3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        other = matrices(lambda k: (torch.arange(k) < 100).double(), 520, 520, batch=1)[0]
        a = torch.stack([diagonal, other, torch.zeros_like(other)])
        found = ops.truncated_svd(a, energy=0.95)
        assert found.methods == ("block",) * 3
        assert found.ranks.tolist() == [3, 95, 0]
        check(found, a)

    def test_both_ways_in_one_batch(self):
        steep, flat = (matrices(SPECTRA[x], 340, 350, batch=1)[0] for x in ("i**-1", "flat"))
        a = torch.stack([flat, steep, flat])
        found = ops.truncated_svd(a, energy=0.9)
        assert found.methods == ("gram", "block", "gram")
        assert found.ranks.tolist() == [306, 6, 306]
        check(found, a)
        alone = ops.truncated_svd(a[1:2], energy=0.9)
        assert torch.allclose(alone.S[0], found.S[1, :6], rtol=1e-6)

    @pytest.mark.parametrize("threshold", [0.01, "median"])
    @pytest.mark.parametrize("shape", [(300, 330), (40, 100), (330, 300)], ids=str)
    def test_hard_threshold_finds_the_planted_rank(self, shape, threshold):
        noise = 0.01 * torch.randn(2, *shape)
        a = matrices(lambda k: torch.where(torch.arange(k) < 3, 5.0, 0.0).double(), *shape) + noise
        found = ops.truncated_svd(a, hard_threshold=threshold)
        assert found.ranks.tolist() == [3, 3]
        check(found, a)
        scaled = ops.truncated_svd(
            a * 2.0**60,
            hard_threshold=threshold if threshold == "median" else threshold * 2.0**60,
        )
        assert scaled.ranks.tolist() == [3, 3]

    def test_no_noise_keeps_what_there_is(self):
        a = matrices(SPECTRA["rank 5"], 40, 50, dtype=torch.float64)
        assert (ops.truncated_svd(a, hard_threshold=1e-9).ranks == 5).all()
        assert (ops.truncated_svd(torch.zeros(1, 9, 9), hard_threshold="median").ranks == 0).all()

    @given(
        shape=st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 12)),
        rule=st.sampled_from(
            [{"rank": 0}, {"rank": 1}, {"rank": 4}, {"rank": 99}, {"energy": 1e-6}, {"energy": 0.7},
             {"energy": 1.0}, {"hard_threshold": 0.3}, {"hard_threshold": "median"}]
        ),
        method=st.sampled_from(["auto", *METHODS]),
        kind=st.sampled_from(["normal", "integers", "dependent", "double", "half"]),
        seed=st.integers(0, 2**64 - 1),
    )  # fmt: skip
    @settings(max_examples=150, deadline=None)
    def test_small_and_empty(self, shape, rule, method, kind, seed):
        a = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**32))
        if kind == "integers":
            a = a.round()
        elif kind == "dependent":
            a = a[:, :1] * a[:, :, :1]
        a = a.to({"double": torch.float64, "half": torch.float16}.get(kind, torch.float32))
        found = ops.truncated_svd(a, method=method, seed=seed, **rule)
        check(found, a, slack=1.05)  # with so few columns the sketch has fewer to spare
        if "rank" in rule:
            assert found.S.shape[1] == min(rule["rank"], *shape[1:])
        if "energy" in rule:
            assert (found.energy >= rule["energy"] - 1e-5).all()

    @pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.9}, {"hard_threshold": "median"}])
    def test_an_empty_batch(self, rule):
        found = ops.truncated_svd(torch.empty(0, 200, 90, dtype=torch.bfloat16), **rule)
        r = rule.get("rank", 0)
        assert (found.U.shape, found.S.shape, found.Vh.shape) == ((0, 200, r), (0, r), (0, r, 90))
        assert found.ranks.shape == found.residual.shape == found.energy.shape == (0,)
        assert found.reconstruct().shape == (0, 200, 90)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1)], ids=str)
    def test_single_rows_and_columns(self, shape):
        a = torch.randn(3, *shape)
        found = ops.truncated_svd(a, rank=64)
        check(found, a)
        assert torch.allclose(found.S[:, 0], torch.linalg.vector_norm(a, dim=(1, 2)))


class TestConventions:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_narrow_dtypes_are_widened(self, dtype):
        a = matrices(SPECTRA["i**-1"], 150, 140).to(dtype)
        found, wide = (ops.truncated_svd(x, rank=8) for x in (a, a.float()))
        assert all(torch.equal(x, y) for x, y in zip(found[:6], wide[:6], strict=True))

    @pytest.mark.parametrize("method", METHODS)
    def test_float64_stays_float64(self, method):
        a = matrices(SPECTRA["halving"], 150, 140, dtype=torch.float64)
        found = ops.truncated_svd(a, rank=12, method=method)
        check(found, a)
        exact = torch.linalg.svdvals(a)[:, :12]
        assert torch.allclose(found.S, exact, rtol=1e-7, atol=0)
        if method == "svd":
            tiny = matrices(lambda k: 10.0 ** -torch.arange(k).double(), 15, 15, dtype=a.dtype)
            got = ops.truncated_svd(tiny, rank=12).S
            assert torch.allclose(got, torch.linalg.svdvals(tiny)[:, :12], rtol=1e-3)

    def test_signs(self):
        for shape in ((150, 200), (200, 150), (20, 20)):
            a = matrices(SPECTRA["i**-1"], *shape, batch=1)
            found = ops.truncated_svd(a, rank=6)
            other = ops.truncated_svd(-a, rank=6)
            short = "Vh" if shape[0] > shape[1] else "U"
            assert torch.allclose(getattr(found, short), getattr(other, short), atol=1e-5)
            columns = found.Vh.mT if short == "Vh" else found.U
            peak = columns.abs().argmax(1, keepdim=True)
            assert (columns.gather(1, peak) > 0).all()
        flat = torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]]])  # ties: the first decides
        found = ops.truncated_svd(flat.mT @ flat, rank=1)
        assert (found.U[:, 0] > 0).all()

    def test_seed(self):
        a = matrices(SPECTRA["i**-0.5"], 150, 200)
        one, same = (ops.truncated_svd(a, rank=9, seed=7) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(one[:6], same[:6], strict=True))
        other = ops.truncated_svd(a, rank=9, seed=8)
        assert one.methods == ("block", "block")
        assert not torch.equal(one.Vh, other.Vh)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        ops.truncated_svd(a, rank=9)
        assert torch.equal(state, torch.get_rng_state())

    def test_power_iterations_and_oversampling_help(self):
        a = matrices(SPECTRA["i**-0.5"], 300, 300)
        residual = [
            float(ops.truncated_svd(a, rank=20, power_iterations=q, oversample=p).residual.sum())
            for q, p in ((0, 0), (1, 0), (2, 0), (2, 30))
        ]
        assert residual == sorted(residual, reverse=True)
        assert residual[0] > 1.02 * residual[-1]

    @pytest.mark.parametrize("power", [300, 120, -120, -300])
    def test_sizes_whose_squares_overflow(self, power):
        dtype = torch.float64 if abs(power) > 120 else torch.float32
        a = matrices(SPECTRA["i**-1"], 130, 140, dtype=dtype)
        plain = ops.truncated_svd(a, rank=5)
        big = torch.ldexp(a, torch.tensor(float(power)).to(dtype))
        found = ops.truncated_svd(torch.stack([a[0], big[1]]), rank=5)
        assert torch.allclose(found.U, plain.U, atol=1e-5)
        unit = torch.tensor([1.0, 2.0**power], dtype=torch.float64)
        assert torch.allclose(found.S.double(), plain.S.double() * unit[:, None], rtol=1e-5, atol=0)
        assert torch.allclose(found.residual, plain.residual * unit, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("size", [1.7e308, 5e-324], ids=str)
    def test_the_ends_of_the_range(self, size):
        found = ops.truncated_svd(torch.full((1, 1, 1), size, dtype=torch.float64), rank=1)
        assert found.S.tolist() == [[size]]

    def test_subnormal_matrices(self):
        a = matrices(SPECTRA["rank 5"], 20, 30, batch=1) * 2.0**-140
        found = ops.truncated_svd(a, rank=5)
        wanted = torch.linalg.svdvals(a.double())[:, :5]
        assert torch.allclose(found.S.double(), wanted, rtol=0, atol=2.0**-149)

    def test_sequences_strides_and_no_writes(self):
        a = matrices(SPECTRA["i**-1"], 150, 200)
        before = a.clone()
        plain = ops.truncated_svd(a, rank=7)
        assert torch.equal(a, before)
        assert torch.equal(ops.truncated_svd(list(a), rank=7).U, plain.U)
        strided = torch.stack([a, a], -1)[..., 0]
        turned = a.mT.contiguous().mT
        for other in (strided, turned):
            assert torch.allclose(ops.truncated_svd(other, rank=7).U, plain.U, atol=1e-4)
        repeated = ops.truncated_svd(a[:1].expand(3, -1, -1), rank=7)
        assert torch.allclose(repeated.S, plain.S[:1].expand(3, -1), rtol=1e-6)

    def test_autocast_changes_nothing(self):
        a = matrices(SPECTRA["i**-1"], 150, 200)
        plain = ops.truncated_svd(a, rank=7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ops.truncated_svd(a, rank=7)
            whole = found.reconstruct()
        assert torch.equal(found.Vh, plain.Vh)
        assert torch.equal(whole, plain.reconstruct())


class TestRefusals:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_not_finite_names_the_matrix(self, value, dtype):
        a = torch.randn(3, 5, 4).to(dtype)
        a[1, 2, 3] = value
        found = "1 NaN and 0" if value != value else "0 NaN and 1"
        with pytest.raises(DecompositionError, match=rf"matrix 1 of shape \(5, 4\) holds {found}"):
            ops.truncated_svd(a, rank=1)
        with pytest.raises(DecompositionError, match=r"matrix 1 \('layer\.1\.query'\)"):
            ops.truncated_svd(a, energy=0.5, names=[f"layer.{i}.query" for i in range(3)])

    def test_shapes_and_dtypes(self):
        a = torch.randn(4, 5)
        for wrong, message in (
            (a, r"shape \(4, 5\); wanted \(B, m, n\), pass matrices\[None\]"),
            ([], "an empty sequence has no shape"),
            ([a, a.mT], r"matrix 1 is torch.float32 \(5, 4\)"),
            ([a, a.double()], "matrix 1 is torch.float64"),
            ([a, a[0]], r"matrix 1 has shape \(5,\)"),
            (torch.ones(1, 4, 5, dtype=torch.int64), "dtype torch.int64"),
            (torch.ones(1, 4, 5, dtype=torch.complex64), "dtype torch.complex64"),
        ):
            with pytest.raises(DecompositionError, match=message):
                ops.truncated_svd(wrong, rank=1)
        for wrong, message in (
            ({"q": a}, r"matrices is a dict; wanted .* list\(matrices.values\(\)\)"),
            (a.numpy()[None], r"matrices is a ndarray; wanted a tensor \(B, m, n\)"),
            (3, "matrices is a int; wanted a tensor"),
            ([a, a.numpy()], "matrix 1 is a ndarray; wanted a tensor, torch.as_tensor"),
            (["ab"], "matrix 0 is a str; wanted a tensor"),
        ):
            with pytest.raises(DecompositionError, match=message):
                ops.truncated_svd(wrong, rank=1)
        with pytest.raises(DecompositionError, match=r"names is the string 'ab'; wanted one name"):
            ops.truncated_svd([a, a], rank=1, names="ab")
        with pytest.raises(DecompositionError, match="1 names for 2 matrices"):
            ops.truncated_svd([a, a], rank=1, names=["one"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "got none of them; wanted exactly one"),
            ({"rank": 1, "energy": 0.9}, r"got rank=1, energy=0\.9; wanted exactly one"),
            ({"rank": -1}, "rank is -1; wanted an integer"),
            ({"rank": 1.5}, r"rank is 1\.5"),
            ({"rank": True}, "rank is True"),
            ({"energy": 0.0}, r"energy is 0\.0; wanted a number in"),
            ({"energy": 1.1}, r"energy is 1\.1"),
            ({"energy": float("nan")}, "energy is nan"),
            ({"hard_threshold": "mean"}, "hard_threshold is 'mean'"),
            ({"hard_threshold": -1.0}, "hard_threshold is -1"),
            ({"rank": 1, "method": "blocks"}, "Did you mean 'block'"),
            ({"rank": 1, "seed": -1}, "seed is -1"),
            ({"rank": 1, "oversample": 0.5}, r"oversample is 0\.5"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        with pytest.raises(OptionError, match=message):
            ops.truncated_svd(torch.randn(1, 4, 5), **options)

    def test_gradients_of_factors(self):
        a = torch.randn(2, 5, 4, requires_grad=True)
        for factor in ops.truncated_svd(a, rank=2)[:3]:
            assert factor.requires_grad
            with pytest.raises(DecompositionError, match="gradient of the factors U, S, Vh"):
                factor.sum().backward()
        with torch.no_grad():
            assert not ops.truncated_svd(a, rank=2).U.requires_grad
