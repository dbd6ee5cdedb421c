"""Denoising and its kernels at real sizes on a GPU: counts, precision, memory, graphs."""

from __future__ import annotations

import pytest
import torch

from sparseft.denoise import Denoise, denoised
from sparseft.ops import backend, difference_, prune_residual_
from sparseft.ops._sketch import sign_sketch
from sparseft.ops.cholesky_inverse import cholesky_qr_float32

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_launcher")]

# Matrices, rank: layers of XLM-R base, a rank of no whole step, its embedding, a layer of Llama-7B.
SHAPES = [
    pytest.param((8, 768, 768), 64, id="xlmr-base-query"),
    pytest.param((2, 768, 3072), 45, id="xlmr-base-up"),
    pytest.param((1, 768, 250_002), 64, id="xlmr-base-embedding"),
    pytest.param((1, 4096, 11_008), 256, id="llama-7b-down"),
]


def factors(shape: tuple[int, int, int], rank: int):
    count, m, n = shape
    left = torch.randn(count, m, rank, device="cuda") * rank**-0.5
    return torch.randn(shape, device="cuda"), left, torch.randn(count, rank, n, device="cuda")


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_real_shapes_keep_exactly_the_largest(shape, rank, assert_as_accurate):
    delta, left, right = factors(shape, rank)
    # The process may allow TF32; the low-rank part is as near as fp32 all the same.
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        theirs = left[0] @ right[0]
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        low = prune_residual_(delta.clone(), left, right, 0, backend="triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    exact = torch.cat(
        [left[0, i : i + 256].double() @ right[0].double() for i in range(0, len(theirs), 256)]
    )
    assert_as_accurate(low[0], theirs, exact)
    del theirs, exact
    rest = (delta - low).abs_().flatten(1)
    for share in (0.01, 0.1, 0.9):
        keep = round(share * rest.shape[1])
        got = prune_residual_(delta.clone(), left, right, keep, backend="triton")
        again = prune_residual_(delta.clone(), left, right, keep, backend="triton")
        assert torch.equal(got, again)
        for mine, d, u, r in zip(got, delta, low, rest, strict=True):
            # given the product that the kernel made, a stable sort says which are kept
            chosen = torch.argsort(r, descending=True, stable=True)[:keep]
            wanted = u.flatten().clone()
            wanted[chosen] = d.view(-1)[chosen]
            assert torch.equal(mine.view(-1), wanted)


def test_ties_of_a_large_matrix_go_to_the_first():
    """Whole numbers are exact in TF32: thousands of ties in every tile."""
    delta = torch.randint(-3, 4, (2, 2000, 1500), device="cuda").float()
    left = torch.randint(-2, 3, (2, 2000, 3), device="cuda").float()
    right = torch.randint(-1, 2, (2, 3, 1500), device="cuda").float()
    low = left @ right
    for keep in (1, 400_000, 2_999_999):
        got = prune_residual_(delta.clone(), left, right, keep)
        for mine, d, u in zip(got, delta, low, strict=True):
            rest = (d - u).abs().view(-1)
            chosen = torch.argsort(rest, descending=True, stable=True)[:keep]
            wanted = u.flatten().clone()
            wanted[chosen] = d.view(-1)[chosen]
            assert torch.equal(mine.view(-1), wanted)


def test_pruning_takes_no_memory_of_the_matrices_size():
    delta, left, right = factors((4, 2048, 4096), 64)
    prune_residual_(delta.clone(), left, right, 800_000)
    torch.cuda.synchronize()
    work = delta.clone()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prune_residual_(work, left, right, 800_000)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 0.1 * delta.numel() * 4, used


def test_addresses_beyond_32_bits():
    """The last matrix of a batch of more than 2**31 entries, and its difference."""
    free, _ = torch.cuda.mem_get_info()
    count, m, n = 513, 2048, 2048
    if free < 5 * count * m * n:
        pytest.skip(f"needs {5 * count * m * n >> 30} GiB of GPU memory, {free >> 30} are free")
    delta = torch.zeros(count, m, n, device="cuda")
    left, right = delta.new_zeros(count, m, 1), delta.new_zeros(count, 1, n)
    theta1 = torch.randn(m, n, device="cuda").bfloat16()
    difference_(delta[-1].mT, theta1, theta1 / 2)
    wanted = theta1.float() - (theta1 / 2).float()
    assert torch.equal(delta[-1], wanted.mT)
    prune_residual_(delta, left, right, [0] * (count - 1) + [1000])
    assert int(delta[-1].count_nonzero()) == 1000
    assert delta[-1].abs()[delta[-1] != 0].min() >= wanted.abs().view(-1).topk(1000).values.min()
    assert delta[:-1].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_signs_are_the_hosts(dtype):
    where = torch.device("cuda")
    got = sign_sketch(11_008, range(64, 336), 5, dtype=dtype, device=where)
    wanted = sign_sketch(11_008, range(64, 336), 5, dtype=dtype, device=torch.device("cpu"))
    assert torch.equal(got.cpu(), wanted)


def test_a_graph_captures_the_fp32_orthonormalisation():
    columns = torch.randn(12, 3072, 80, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        cholesky_qr_float32(columns)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = cholesky_qr_float32(columns)
    columns.normal_()
    graph.replay()
    eye = torch.eye(80, device="cuda").double()
    assert ((q.double().mT @ q.double() - eye).abs() < 1e-5).all()
    r = q.double().mT @ columns.double()
    assert ((q.double() @ r - columns).abs() < 1e-4).all()


def test_denoising_an_encoder_gives_what_the_reference_gives():
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    pairs = []
    for i, shape in enumerate(shapes):
        theta0 = torch.randn(shape, device="cuda") * 0.02
        moved = torch.randn(shape[0], 40, device="cuda") @ torch.randn(40, shape[1], device="cuda")
        moved = moved * 1e-4 + torch.randn(shape, device="cuda") * 1e-4
        pairs.append((str(i), (theta0 + moved).bfloat16(), theta0.bfloat16()))
    how = Denoise(rank=32, residual=0.1)
    got = {name: value.clone() for name, value in denoised(pairs, how)}
    with backend("reference"):
        wanted = dict(denoised(pairs, how))
    for name, theta1, theta0 in pairs:
        delta = theta1.float() - theta0.float()
        mine, theirs = got[name] == delta, wanted[name] == delta
        kept = round(0.1 * delta.numel())
        for same in (mine, theirs):  # of low-rank parts one or two happen to be what was there
            assert kept <= int(same.sum()) <= kept + 5
        # of entries as near to the threshold as rounding moves them, others may be kept
        assert int((mine != theirs).sum()) <= 1e-3 * delta.numel()
        both = mine == theirs
        error = (got[name] - wanted[name])[both].norm() / wanted[name][both].norm()
        assert error < 1e-4
