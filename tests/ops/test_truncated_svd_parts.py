"""What the truncated SVD is made of: the sketch, orthonormal columns, rules for ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import ops
from sparseft.errors import OptionError
from sparseft.ops._cholesky_qr import orthonormal_columns
from sparseft.ops._rank_rules import RankRule, marchenko_pastur_median, noise_threshold
from sparseft.ops._sketch import _STEP, _TENSOR, sign_sketch
from sparseft.ops._svd_problem import full_precision

CPU = torch.device("cpu")


def sketch(rows, columns, seed, dtype=torch.float64):
    return sign_sketch(rows, columns, seed, dtype=dtype, device=CPU)


def philox_word(seed, *counter):
    """Philox-4x32-7 in Python integers."""
    word = 0xFFFFFFFF
    c, k = list(counter), [seed & word, seed >> 32]
    for _ in range(7):
        one, two = c[2] * 0xCD9E8D57, c[0] * 0xD2511F53
        c = [(one >> 32) ^ c[1] ^ k[0], one & word, (two >> 32) ^ c[3] ^ k[1], two & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return c[0]


class TestSketch:
    @pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**64 - 1])
    def test_by_integers_alone(self, seed):
        wanted = [
            [2 * (philox_word(seed, i, j // 32, _TENSOR, _STEP) >> (j % 32) & 1) - 1
             for j in range(70)]
            for i in range(5)
        ]  # fmt: skip
        assert sketch(5, range(70), seed).tolist() == wanted

    def test_fixed_for_good(self):
        """A change of these signs changes results: it belongs in the changelog under Numerics."""
        signs = "".join("+" if x > 0 else "-" for x in sketch(2, range(24), 3).flatten())
        assert signs == "+-++++--+--++-+----++++---+-+-++++++++---+-+++-+"

    @given(start=st.integers(0, 100), size=st.integers(0, 100), rows=st.integers(0, 9))
    @settings(max_examples=60, deadline=None)
    def test_any_part_is_a_part_of_the_whole(self, start, size, rows):
        whole = sketch(9, range(200), 11)
        assert torch.equal(
            sketch(rows, range(start, start + size), 11), whole[:rows, start:][:, :size]
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_exact_in_every_dtype(self, dtype):
        assert torch.equal(sketch(40, range(33), 2, dtype).double(), sketch(40, range(33), 2))

    def test_balanced_and_uncorrelated(self):
        signs = sketch(4096, range(96), 5)
        assert signs.abs().eq(1).all()
        gram = signs.mT @ signs / 4096
        assert (gram - torch.eye(96)).abs().max() < 6 / 64  # six standard deviations
        other = sketch(4096, range(96), 6)
        assert abs(float((signs * other).mean())) < 6 / math.sqrt(4096 * 96)


def conditioned(condition, n=200, k=24, batch=1):
    q, _ = torch.linalg.qr(torch.randn(batch, n, k, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(batch, k, k, dtype=torch.float64))
    return (q * torch.logspace(0, -math.log10(condition), k).double()) @ v


def off(q):
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max())


@pytest.fixture
def qr_calls(monkeypatch):
    """Shapes that Householder QR is asked for."""
    calls, real = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x: (calls.append(tuple(x.shape)), real(x))[1])
    return calls


class TestOrthonormalColumns:
    @pytest.mark.parametrize("condition", [1.0, 1e3, 1e5, 1e7, 1e10, 1e15], ids=str)
    def test_every_condition(self, condition, qr_calls):
        y = conditioned(condition)
        qr_calls.clear()
        one, two = (orthonormal_columns(y, passes=p) for p in (1, 2))
        assert off(one) < 1e-4
        assert off(two) < 1e-9
        assert len(qr_calls) == (2 if condition >= 1e7 else 0)
        r = two.mT @ y
        assert torch.allclose(two @ r, y, atol=1e-13)
        assert r.tril(-1).abs().max() < 1e-9
        assert (r.diagonal(dim1=1, dim2=2) > -1e-12).all()

    def test_rounded_to_fp32(self):
        for condition in (1e2, 1e6, 1e9):
            assert off(orthonormal_columns(conditioned(condition).float(), passes=2).float()) < 1e-6

    def test_dependent_zero_and_huge_columns(self, qr_calls):
        y = torch.randn(3, 30, 6, dtype=torch.float64)
        y[0, :, 3] = y[0, :, 1]
        y[0, :, 5] = 0
        y[1] = 0
        y[2] *= torch.tensor([1e-150, 1.0, 1e140, 1e-30, 1e10, 1.0], dtype=y.dtype)
        basis = orthonormal_columns(y, passes=2)
        assert off(basis) < 1e-9
        assert qr_calls == [(2, 30, 6)]
        alone = orthonormal_columns(y[2:], passes=2)
        assert len(qr_calls) == 1  # scales of columns do not matter
        assert torch.allclose(alone[0], basis[2], atol=1e-12)

    @pytest.mark.parametrize("scale", [1e-40, 1.0, 1e15, 1e40], ids=str)
    def test_the_factorisation_s_own_verdict_counts(self, scale):
        """What it leaves on the diagonal where it failed may look like a pivot."""
        y = torch.randn(40, 30, 4, dtype=torch.float64) * scale
        y[:, :, 2:] = y[:, :, :2] + y[:, :, 1:2]
        assert off(orthonormal_columns(y, passes=1)) < 1e-9

    def test_a_bad_matrix_leaves_the_others_alone(self):
        good = conditioned(10.0, batch=2)
        both = torch.stack([good[0], torch.zeros_like(good[0]), good[1]])
        basis = orthonormal_columns(both, passes=1)
        assert torch.allclose(basis[[0, 2]], orthonormal_columns(good, passes=1), atol=1e-13)

    def test_of_nothing(self):
        assert orthonormal_columns(torch.zeros(0, 5, 2), passes=2).shape == (0, 5, 2)
        assert orthonormal_columns(torch.zeros(2, 5, 0), passes=2).shape == (2, 5, 0)


class TestRules:
    def test_of_gavish_and_donoho(self):
        """Their table of omega(beta), and 4 / sqrt(3)."""
        assert noise_threshold(100, 100) == pytest.approx(40 / math.sqrt(3))
        assert noise_threshold(7, 90) == noise_threshold(90, 7)
        for beta, omega in ((0.05, 1.5194), (0.1, 1.6089), (1.0, 2.8582)):
            got = noise_threshold(round(1000 * beta), 1000) / math.sqrt(
                1000 * marchenko_pastur_median(beta)
            )
            assert got == pytest.approx(omega, abs=3e-4)

    @pytest.mark.parametrize("shape", [(200, 200), (60, 300)], ids=str)
    def test_the_median_of_noise(self, shape):
        squares = torch.linalg.svdvals(torch.randn(*shape, dtype=torch.float64)).square()
        got = float(squares.median()) / max(shape)
        assert got == pytest.approx(marchenko_pastur_median(min(shape) / max(shape)), rel=0.03)

    @given(
        values=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=20),
        energy=st.floats(1e-3, 1.0),
    )
    @settings(max_examples=100, deadline=None)
    def test_energy_takes_the_fewest(self, values, energy):
        squares = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)[None]
        total = squares.sum(1)
        r = int(RankRule(energy=energy).ranks(squares, total, torch.ones_like(total), (20, 20)))
        assert r <= squares.shape[1]
        assert float(squares[0, :r].sum()) >= (energy - 2e-12) * float(total)
        if r:
            assert float(squares[0, : r - 1].sum()) < energy * float(total)

    def test_energy_that_is_not_there_yet(self):
        squares = torch.tensor([[4.0, 1.0]], dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        assert RankRule(energy=0.9).ranks(squares, 100 * one, one, (9, 9)).tolist() == [3]

    def test_a_rule_is_checked_wherever_it_is_made(self):
        with pytest.raises(OptionError, match="wanted exactly one of"):
            RankRule(rank=1, hard_threshold="median")


class TestFullPrecision:
    @pytest.mark.parametrize("setting", ["medium", "high", "highest"])
    def test_the_setting_is_put_back(self, setting):
        before = torch.get_float32_matmul_precision()
        matmul = torch.backends.mkldnn.matmul
        try:
            torch.set_float32_matmul_precision(setting)
            own = matmul.fp32_precision
            with full_precision(CPU):
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == own
            assert torch.get_float32_matmul_precision() == setting
        finally:
            torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize("method", ["block", "gram"])
    def test_results_are_products_in_fp32(self, method, monkeypatch):
        """Under a setting that allows bf16, singular values stay those of fp32."""
        seen = []
        real = torch.Tensor.__matmul__

        def watch(x, y):
            if x.dtype == torch.float32:
                seen.append((torch.backends.mkldnn.matmul.fp32_precision, y.shape[-1]))
            return real(x, y)

        monkeypatch.setattr(torch.Tensor, "__matmul__", watch)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            ops.truncated_svd(torch.randn(1, 150, 160), rank=3, method=method)
        finally:
            torch.set_float32_matmul_precision(before)
        # b = q^T a and b^T u, or a^T u
        assert {precision for precision, _ in seen[-2:]} == {"ieee"}
        assert len(seen) == (1 + 2 * 4 + 2 if method == "block" else 1)
