"""Optimizer steps on a compact vector, bit for bit torch.optim's, and the weight they write."""

from __future__ import annotations

import pytest
import torch

from sparseft import ops
from sparseft.diff import SparsePattern
from sparseft.errors import BackendError, DiffError

# One, an odd count, and one past the 32 Ki entries updated at a time.
LENGTHS = (1, 37, (1 << 15) + 1, 100_003)


def target(n: int, dtype: torch.dtype = torch.float32):
    """A weight with n masked entries in it, the pattern, and the base values."""
    weight = torch.randn(n + n // 2 + 3).to(dtype)
    keep = torch.zeros(weight.shape, dtype=torch.bool)
    keep[torch.randperm(weight.numel())[:n]] = True
    pattern = SparsePattern.from_mask(keep)
    return weight, pattern, ops.gather_entries(weight, pattern.indices)


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("n", LENGTHS)
def test_adamw_equals_torch_bit_for_bit(n, decay):
    weight, pattern, base = target(n)
    values, m, v = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    theirs = torch.nn.Parameter(torch.zeros(n))
    optimizer = torch.optim.AdamW(
        [theirs], lr=3e-3, betas=(0.8, 0.97), eps=1e-7, weight_decay=decay, foreach=False
    )
    for step in range(1, 12):
        grad = torch.randn(n) * 10 ** torch.randint(-4, 3, (n,))
        theirs.grad = grad.clone()
        optimizer.step()
        kept = grad.clone()
        ops.adamw_step_(
            values, grad, m, v, weight, base, pattern.indices,
            lr=3e-3, beta1=0.8, beta2=0.97, eps=1e-7, weight_decay=decay, step=step,
        )  # fmt: skip
        assert torch.equal(values, theirs.detach()), f"step {step}"
        assert torch.equal(grad, kept), "the gradient is read only"
    state = optimizer.state[theirs]
    assert torch.equal(m, state["exp_avg"])
    assert torch.equal(v, state["exp_avg_sq"])


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)],
    ids=str,
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("n", LENGTHS)
def test_sgd_equals_torch_bit_for_bit(n, decay, momentum, dampening, nesterov):
    weight, pattern, base = target(n)
    values = torch.zeros(n)
    buffer = torch.full((n,), float("nan")) if momentum else None  # `first` must not read it
    theirs = torch.nn.Parameter(torch.zeros(n))
    optimizer = torch.optim.SGD(
        [theirs], lr=3e-3, momentum=momentum, dampening=dampening, nesterov=nesterov,
        weight_decay=decay, foreach=False,
    )  # fmt: skip
    for step in range(8):
        grad = torch.randn(n)
        theirs.grad = grad.clone()
        optimizer.step()
        ops.sgd_step_(
            values, grad, buffer, weight, base, pattern.indices, lr=3e-3, momentum=momentum,
            dampening=dampening, nesterov=nesterov, weight_decay=decay, first=step == 0,
        )  # fmt: skip
        assert torch.equal(values, theirs.detach()), f"step {step}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_is_base_plus_values_rounded_once_and_the_rest_untouched(dtype):
    weight, pattern, base = target(5000, dtype)
    frozen = torch.ones(weight.shape, dtype=torch.bool)
    frozen[pattern.indices] = False
    weight[frozen.nonzero()[0]] = float("nan")
    before = bytes_of(weight[frozen])
    values, m, v = torch.zeros(5000), torch.zeros(5000), torch.zeros(5000)
    for step in range(1, 300):
        ops.adamw_step_(
            values, torch.randn(5000), m, v, weight, base, pattern.indices,
            lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=step,
        )  # fmt: skip
    assert torch.equal(weight[pattern.indices.long()], (base.float() + values).to(dtype))
    assert torch.equal(bytes_of(weight[frozen]), before)


def test_decay_pulls_the_weight_to_its_base():
    weight, pattern, base = target(100)
    values = torch.randn(100)
    m, v = torch.zeros(100), torch.zeros(100)
    for step in range(1, 2000):
        ops.adamw_step_(
            values, torch.zeros(100), m, v, weight, base, pattern.indices,
            lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.5, step=step,
        )  # fmt: skip
    assert torch.equal(weight[pattern.indices.long()], base)


def test_grad_scale_multiplies_the_gradient():
    results = []
    grad = torch.randn(50)
    for factor, scale in ((0.25, None), (1.0, 0.25)):
        torch.manual_seed(1)
        weight, pattern, base = target(50)
        values, m, v = torch.zeros(50), torch.zeros(50), torch.zeros(50)
        ops.adamw_step_(
            values, grad * factor, m, v, weight, base, pattern.indices, lr=1e-2, beta1=0.9,
            beta2=0.999, eps=1e-8, weight_decay=0.0, step=1, grad_scale=scale,
        )  # fmt: skip
        ops.sgd_step_(
            values, grad * factor, None, weight, base, pattern.indices, lr=1e-2, grad_scale=scale
        )
        results.append((values, m, v, weight))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_vector_is_a_no_op():
    weight, pattern, base = target(0)
    before = weight.clone()
    none = torch.zeros(0)
    ops.adamw_step_(
        none, none, none, none, weight, base, pattern.indices,
        lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1,
    )  # fmt: skip
    assert torch.equal(weight, before)


def test_full_density_is_dense_adamw():
    """Density 1 and a zero base: the weight follows dense AdamW bit for bit."""
    weight = torch.zeros(30, 40)
    pattern = SparsePattern.from_mask(torch.ones(30, 40, dtype=torch.bool))
    base = ops.gather_entries(weight, pattern.indices)
    values, m, v = (torch.zeros(1200) for _ in range(3))
    theirs = torch.nn.Parameter(torch.zeros(30, 40))
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(1, 20):
        theirs.grad = torch.randn(30, 40)
        optimizer.step()
        ops.adamw_step_(
            values, theirs.grad.flatten(), m, v, weight, base, pattern.indices,
            lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=step,
        )  # fmt: skip
        assert torch.equal(weight, theirs.detach())


def test_errors_name_the_vector():
    weight, pattern, base = target(10)
    z = torch.zeros(10)
    step = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    with pytest.raises(DiffError, match=r"exp_avg has shape \(9,\).*\(10,\)"):
        ops.adamw_step_(z, z, z[:9], z, weight, base, pattern.indices, **step)
    with pytest.raises(DiffError, match="grad is torch.bfloat16 but values are torch.float32"):
        ops.adamw_step_(z, z.bfloat16(), z, z, weight, base, pattern.indices, **step)
    with pytest.raises(DiffError, match="momentum=0.9 with momentum_buffer missing"):
        ops.sgd_step_(z, z, None, weight, base, pattern.indices, lr=1e-2, momentum=0.9)
    with pytest.raises(BackendError, match="adamw_step_: backend 'triton' .* lie on cpu"):
        ops.adamw_step_(z, z, z, z, weight, base, pattern.indices, backend="triton", **step)
