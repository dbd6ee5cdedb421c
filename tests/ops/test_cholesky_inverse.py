"""Inverse Cholesky factors and the fp32 CholeskyQR made of them."""

from __future__ import annotations

import math

import pytest
import torch

from sparseft.errors import DecompositionError
from sparseft.ops.cholesky_inverse import cholesky_inverse, cholesky_qr_float32


def conditioned(count: int, m: int, r: int, condition: float) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(count, m, r).double())
    turn, _ = torch.linalg.qr(torch.randn(count, r, r).double())
    return ((q * torch.logspace(0, -math.log10(condition), r).double()) @ turn.mT).float()


@pytest.mark.parametrize("r", [1, 5, 130])
def test_it_inverts_the_factor(r):
    x = torch.randn(3, 2 * r + 3, r).double()
    gram, shift = x.mT @ x, torch.tensor([0.0, 1.0, 0.5]).double()
    inverse, failed = cholesky_inverse(gram, shift)
    assert failed.tolist() == [0, 0, 0]
    assert torch.equal(inverse, inverse.tril())
    whole = gram + shift[:, None, None] * torch.eye(r)
    assert torch.allclose(inverse @ whole @ inverse.mT, torch.eye(r).double().expand(3, r, r))


def test_a_matrix_without_a_factor_is_reported_and_the_others_are_not():
    eye = torch.eye(4)
    inverse, failed = cholesky_inverse(torch.stack([eye, -eye, eye * float("nan"), 4 * eye]))
    assert failed.bool().tolist() == [False, True, True, False]
    assert torch.equal(inverse[3], eye / 2)


def test_no_matrices():
    inverse, failed = cholesky_inverse(torch.empty(0, 3, 3))
    assert inverse.shape == (0, 3, 3)
    assert failed.shape == (0,)


@pytest.mark.parametrize(
    ("gram", "shift", "match"),
    [
        (torch.eye(3), None, r"\(3, 3\); wanted float32 or float64 \(B, r, r\)"),
        (torch.eye(3)[None].half(), None, "gram is torch.float16"),
        (torch.eye(3)[None], torch.zeros(2), r"shift is torch.float32 \(2,\)"),
        (torch.eye(3)[None], torch.zeros(1).double(), "shift is torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(gram, shift, match):
    with pytest.raises(DecompositionError, match=match):
        cholesky_inverse(gram, shift)


@pytest.mark.parametrize("condition", [1, 1e3, 1e6])
def test_columns_are_orthonormal_up_to_the_condition_it_is_for(condition):
    columns = conditioned(2, 200, 12, condition) * torch.logspace(-8, 8, 12)
    q = cholesky_qr_float32(columns).double()
    assert (q.mT @ q - torch.eye(12)).abs().max() < 1e-5
    r = q.mT @ columns.double()
    assert (r.diagonal(dim1=1, dim2=2) > 0).all()
    scale = columns.double().norm(dim=1, keepdim=True)
    assert ((q @ r - columns) / scale).abs().max() < 1e-5


def test_beyond_it_says_so():
    columns = conditioned(2, 60, 6, 10)
    columns[1, :, 3] = columns[1, :, 1]
    q = cholesky_qr_float32(columns)
    assert q[0].isfinite().all()
    # two equal columns: refused, or whatever a shifted factor makes of them, but never garbage
    assert q[1].isnan().all() or (q[1].mT @ q[1] - torch.eye(6)).abs().max() < 1e-5
