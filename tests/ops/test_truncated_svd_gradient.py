"""The gradient of the nearest matrix of a rank, and where there is none."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from sparseft import ops
from sparseft.errors import DecompositionError, OptionError

RULES = [{"rank": 2}, {"energy": 0.7}, {"hard_threshold": 0.5}]


def gapped(*shape, dtype=torch.float64):
    """Singular values k, k - 1, ..., 1, a third of each: gaps everywhere."""
    k = min(shape[1:])
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return ((u * torch.arange(k, 0, -1) / 3) @ vh).to(dtype)


def loss_gradient(f, a, weight):
    a = a.detach().requires_grad_()
    return torch.autograd.grad((f(a) * weight).sum(), a)[0]


class TestGradient:
    @pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4), (1, 4, 4), (2, 1, 3)], ids=str)
    @pytest.mark.parametrize("rule", RULES, ids=str)
    @pytest.mark.parametrize("method", ["auto", "gram"])
    def test_gradcheck(self, shape, rule, method):
        a = gapped(*shape).requires_grad_()
        assert gradcheck(lambda x: ops.low_rank_approximation(x, method=method, **rule), (a,))

    def test_ranks_that_differ_in_a_batch(self):
        a = gapped(3, 5, 6)
        a[1] *= 10
        a[2] *= 0.01
        ranks = ops.truncated_svd(a, hard_threshold=0.3).ranks.tolist()
        assert ranks[2] == 0 < ranks[0] < ranks[1] == 5
        f = lambda x: ops.low_rank_approximation(x, hard_threshold=0.3)  # noqa: E731
        assert gradcheck(f, (a.requires_grad_(),))
        g = torch.randn(a.shape, dtype=a.dtype)
        grad = loss_gradient(f, a, g)
        assert torch.equal(grad[1], g[1])  # whole rank: the identity
        assert not grad[2].any()

    @pytest.mark.parametrize("shape", [(1, 80, 100), (1, 100, 80)], ids=str)
    def test_as_through_the_whole_decomposition(self, shape):
        """torch differentiates the factors, where all singular values differ."""
        a, g = gapped(*shape), torch.randn(shape, dtype=torch.float64)

        def through_factors(x):
            u, s, vh = torch.linalg.svd(x, full_matrices=False)
            return (u[..., :7] * s[:, None, :7]) @ vh[:, :7]

        mine = loss_gradient(lambda x: ops.low_rank_approximation(x, rank=7), a, g)
        theirs = loss_gradient(through_factors, a, g)
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-11 * float(theirs.abs().max()))

    def test_multiplicity_inside_the_kept_part_is_no_matter(self):
        """There torch's gradient through the factors divides by zero."""
        q = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))[0]
        values = torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        a = ((q[0] * values) @ q[1].mT)[None].requires_grad_()
        assert gradcheck(lambda x: ops.low_rank_approximation(x, rank=3), (a,))

    def test_a_tangent_direction_passes_unchanged(self):
        a = gapped(1, 5, 7)
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        low = (u[..., :2] * s[:, None, :2]) @ vh[:, :2]
        tangent = u[..., :2] @ torch.randn(1, 2, 7, dtype=a.dtype)
        grad = loss_gradient(lambda x: ops.low_rank_approximation(x, rank=2), low, tangent)
        assert torch.allclose(grad, tangent, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_narrow_dtypes(self, dtype):
        a = gapped(2, 70, 90, dtype=dtype)
        g = torch.randn(a.shape)
        f = lambda x: ops.low_rank_approximation(x, rank=4)  # noqa: E731
        grad, exact = loss_gradient(f, a, g), loss_gradient(f, a.double(), g.double())
        assert grad.dtype == dtype
        error = (grad.double() - exact).norm() / exact.norm()
        assert error < 4 * torch.finfo(dtype).eps * 66 / 1  # condition: sigma_4 / gap is 67

    def test_sequences(self):
        parts = [gapped(1, 4, 5)[0].requires_grad_() for _ in range(2)]
        ops.low_rank_approximation(parts, rank=2).square().sum().backward()
        for part in parts:  # |A_r|^2 / 2 has the gradient A_r
            low = ops.low_rank_approximation(part.detach()[None], rank=2)[0]
            assert torch.allclose(part.grad, 2 * low, atol=1e-10)

    def test_without_a_gradient_it_is_the_truncated_svd(self):
        a = gapped(2, 150, 160, dtype=torch.float32)
        got = ops.low_rank_approximation(a, rank=5, seed=3)
        found = ops.truncated_svd(a, rank=5, seed=3)
        assert found.methods == ("block", "block")
        assert torch.equal(got, found.reconstruct())
        assert not got.requires_grad


class TestNoGradient:
    @pytest.mark.parametrize(
        ("values", "rank"),
        [([2.0, 2.0, 1.0], 1), ([2.0, 1.0, 1.0 - 1e-12], 2), ([2.0, 0.0, 0.0], 2)],
        ids=["repeated", "almost", "rank-deficient"],
    )
    def test_a_vanishing_gap_is_named(self, values, rank):
        fine = gapped(1, 3, 4)[0]
        q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
        bad = torch.diag(torch.tensor(values, dtype=torch.float64)) @ q[:3]
        a = torch.stack([fine, bad]).requires_grad_()
        out = ops.low_rank_approximation(a, rank=rank, names=["up", "down"])
        message = rf"matrix 1 \('down'\) has no gradient at rank {rank}: singular value {rank} is"
        with pytest.raises(DecompositionError, match=message):
            out.sum().backward()

    def test_a_rank_beyond_that_of_float32_noise(self):
        a = (torch.randn(1, 80, 3) @ torch.randn(1, 3, 90)).requires_grad_()
        with pytest.raises(DecompositionError, match="matrix 0 has no gradient at rank 5"):
            ops.low_rank_approximation(a, rank=5).sum().backward()

    def test_once(self):
        a = gapped(1, 4, 5).requires_grad_()
        loss = ops.low_rank_approximation(a, rank=2).square().sum()
        (grad,) = torch.autograd.grad(loss, a, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    def test_options_are_checked(self):
        with pytest.raises(OptionError, match="wanted exactly one"):
            ops.low_rank_approximation(torch.randn(1, 3, 3, requires_grad=True))
        with pytest.raises(DecompositionError, match="holds 1 NaN"):
            ops.low_rank_approximation(torch.tensor([[[float("nan")]]], requires_grad=True), rank=1)
