"""The kernels around a truncated SVD against their definitions; interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch

from sparseft.denoise import Denoise, denoised
from sparseft.errors import DecompositionError
from sparseft.ops import backend, difference_, prune_residual_
from sparseft.ops._sketch import sign_sketch
from sparseft.ops.cholesky_inverse import (
    cholesky_inverse,
    cholesky_inverse_reference,
    cholesky_qr_float32,
)
from sparseft.ops.residual import difference_reference, prune_residual_reference

pytestmark = pytest.mark.usefixtures("poisoned_launcher")
LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def whole_numbers(count: int, m: int, n: int, r: int, device: str):
    """Matrices whose products are exact in any order and in TF32, with many ties."""
    delta = torch.randint(-3, 4, (count, m, n)).float()
    left, right = torch.randint(-2, 3, (count, m, r)), torch.randint(-1, 2, (count, r, n))
    return delta.to(device), left.float().to(device), right.float().to(device)


# ---- differences


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differences_have_the_definitions_bits(dtype, wide, device):
    theta1 = torch.randn(65, 37, device=device).to(dtype)
    theta0 = torch.randn(37, 65, device=device).half().mT
    theta1[0, 0], theta1[1, 1] = float("nan"), float("inf")
    for old in (theta0, None):
        wanted = difference_reference(theta1, old, wide)
        for shape, turned in (((65, 37), False), ((37, 65), True)):
            out = torch.full(shape, 7.0, dtype=wide, device=device)
            difference_(out.mT if turned else out, theta1, old, backend="triton")
            got = out.mT if turned else out
            assert torch.equal(got.nan_to_num(99), wanted.nan_to_num(99))


@pytest.mark.parametrize("device", LANES)
def test_differences_of_slices_touch_nothing_else(device):
    theta1 = torch.randn(20, 30, device=device).bfloat16()
    held = torch.full((24, 40), 7.0, device=device)
    difference_(held[2:22, 4:34], theta1, theta1, backend="triton")
    assert held[2:22, 4:34].count_nonzero() == 0
    assert int((held == 7).sum()) == 24 * 40 - 20 * 30
    assert difference_(held[:0], theta1[:0, :1].expand(0, 40), backend="triton").shape == (0, 40)


# ---- signs


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize(
    ("rows", "columns", "seed", "dtype"),
    [
        (5, range(1), 0, torch.float32),
        (70, range(5, 77), 2**63 + 11, torch.float64),
        (65, range(64, 96), 2**31 - 1, torch.bfloat16),
        (3, range(31, 33), 2**40 + 3, torch.float16),
    ],
)
def test_signs_are_the_hosts_bit_for_bit(rows, columns, seed, dtype, device):
    got = sign_sketch(
        rows, columns, seed, dtype=dtype, device=torch.device(device), backend="triton"
    )
    wanted = sign_sketch(
        rows, columns, seed, dtype=dtype, device=torch.device("cpu"), backend="reference"
    )
    assert torch.equal(got.cpu(), wanted)


# ---- pruned residuals


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize(
    ("m", "n", "r"), [(1, 1, 1), (1, 70, 0), (64, 64, 32), (65, 3, 3), (7, 130, 33)]
)
def test_exact_products_keep_the_definitions_entries(m, n, r, device):
    delta, left, right = whole_numbers(3, m, n, r, device)
    numel = m * n
    for keep in ([numel // 3, numel, 0], [1, numel // 2, max(0, numel - 1)]):
        wanted = prune_residual_reference(delta, left, right, keep)
        got = prune_residual_(delta.clone(), left, right, keep, backend="triton")
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("device", LANES)
def test_real_numbers_keep_exactly_the_largest(device, assert_as_accurate):
    delta, left = torch.randn(2, 70, 90, device=device), torch.randn(2, 70, 40, device=device)
    right = torch.randn(2, 40, 90, device=device)
    low = prune_residual_(delta.clone(), left, right, 0, backend="triton")
    assert_as_accurate(low, left @ right, left.double() @ right.double(), name="low-rank part")
    for keep in (1, 630, 6299):
        got = prune_residual_(delta.clone(), left, right, keep, backend="triton")
        # given the product that the kernel made, the selection is the definition's
        rest = (delta - low).abs().view(2, -1)
        chosen = rest.argsort(dim=1, descending=True, stable=True)[:, :keep]
        flat, kept = low.view(2, -1), delta.view(2, -1).gather(1, chosen)
        assert torch.equal(got.view(2, -1), flat.scatter(1, chosen, kept)), keep


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("value", [0.0, -2.0])
def test_equal_residuals_everywhere_go_to_the_first(value, device):
    delta = torch.full((2, 9, 150), value, device=device)
    nothing = delta.new_zeros(2, 9, 1), delta.new_zeros(2, 1, 150)
    prune_residual_(delta, *nothing, [700, 1], backend="triton")
    flat = delta.view(2, -1)
    assert (flat[0, :700] == value).all()
    assert flat[1, 0] == value
    assert flat[0, 700:].count_nonzero() == flat[1, 1:].count_nonzero() == 0


@pytest.mark.parametrize("device", LANES)
def test_infinity_comes_first_and_nan_is_refused_before_anything_is_written(device):
    delta, left, right = whole_numbers(3, 6, 7, 2, device)
    low = left @ right
    delta[0, 1, 2] = float("-inf")
    kept = prune_residual_(delta.clone(), left, right, 1, backend="triton")
    assert kept[0, 1, 2] == float("-inf")
    delta[2, 5, 6] = float("nan")
    before = delta.clone()
    with pytest.raises(DecompositionError, match=r"matrix 2 of shape \(6, 7\).*holds NaN"):
        prune_residual_(delta, left, right, [1, 2, 3], backend="triton")
    assert torch.equal(delta.nan_to_num(99), before.nan_to_num(99))
    prune_residual_(delta, left, right, [42, 42, 0], backend="triton")
    assert torch.equal(delta[2], low[2])
    assert torch.equal(delta[:2], before[:2])


# ---- Cholesky


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("r", [1, 17, 64, 66])
def test_inverse_factors_are_as_accurate_as_torchs(r, device, assert_as_accurate):
    x = torch.randn(2, 2 * r + 8, r, device=device)
    gram, shift = x.mT @ x, torch.tensor([0.0, 2.0], device=device)
    inverse, failed = cholesky_inverse(gram, shift, backend="triton")
    theirs, _ = cholesky_inverse_reference(gram, shift)
    exact, _ = cholesky_inverse_reference(gram.double(), shift.double())
    assert failed.tolist() == [0, 0]
    assert_as_accurate(inverse.contiguous(), theirs, exact, factor=4.0, name=f"r={r}")
    assert inverse.triu(1).count_nonzero() == 0


@pytest.mark.parametrize("device", LANES)
def test_failed_factors_are_counted(device):
    eye = torch.eye(5, device=device)
    odd = eye.clone()
    odd[2, 2] = -1
    grams = torch.stack([eye, odd, eye * float("nan"), 4 * eye])
    inverse, failed = cholesky_inverse(grams, backend="triton")
    assert failed.tolist() == [0, 1, 5, 0]
    assert torch.equal(inverse[3], eye / 2)
    columns = torch.randn(2, 30, 6, device=device)
    columns[1, :, 2] = 0
    q = cholesky_qr_float32(columns, backend="triton")
    assert (q[0].mT @ q[0] - torch.eye(6, device=device)).abs().max() < 1e-5
    assert q[1].isnan().all()


# ---- all of them


@pytest.mark.parametrize("device", LANES)
def test_denoising_launches_them(device, monkeypatch):
    """Which kernels a call runs, and how often: once a tensor, or once a chunk."""
    from sparseft_kernels import residual, svd

    calls = [(svd, "launch_difference"), (svd, "launch_sign_sketch")]
    counts = {name: 0 for _, name in (*calls, (residual, "launch_prune_residual"))}

    def count(module, name):
        launch = getattr(module, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return launch(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for module, name in (*calls, (residual, "launch_prune_residual")):
        count(module, name)
    # two tall and wide of one shape go together; one too small for a sketch
    shapes = [(72, 80), (80, 72), (33, 20)]
    pairs = [
        (str(i), torch.randn(s, device=device).bfloat16(), torch.randn(s, device=device).bfloat16())
        for i, s in enumerate(shapes)
    ]
    how = Denoise(rank=2, residual=0.1)
    with backend("triton" if device == "cpu" else "auto"):
        got = {name: value.clone() for name, value in denoised(pairs, how)}
    assert counts == {"launch_difference": 3, "launch_sign_sketch": 1, "launch_prune_residual": 2}
    with backend("reference"):
        wanted = dict(denoised(pairs, how))
    assert sum(counts.values()) == 6
    for name, theta1, theta0 in pairs:
        delta = theta1.float() - theta0.float()
        kept = round(0.1 * delta.numel())
        assert int((got[name] == delta).sum()) == int((wanted[name] == delta).sum()) == kept
        # products differ in the last bits: nearly equal residuals may change places, no more
        moved = (got[name] == delta) != (wanted[name] == delta)
        edge = (delta - wanted[name]).abs().max()
        low = torch.where(got[name] == delta, wanted[name], got[name])
        assert ((delta - low).abs()[moved] > edge * (1 - 1e-4)).all()
        assert ((got[name] - wanted[name]).abs()[~moved] < 1e-4).all()
