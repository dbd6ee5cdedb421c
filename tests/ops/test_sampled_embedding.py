"""sampled_embedding_grad against nn.Embedding's own gradient."""

from __future__ import annotations

import pytest
import torch

from sparseft import ops
from sparseft.diff import SparsePattern
from sparseft.errors import MaskError
from sparseft.ops.sampled_grad import sampled_embedding_grad_reference

VOCAB, DIM = 50, 16


def case(density: float = 0.2, tokens: tuple[int, ...] = (3, 40)):
    pattern = SparsePattern.from_mask(torch.rand(VOCAB, DIM) < density)
    return torch.randn(*tokens, DIM), torch.randint(0, VOCAB, tokens), pattern


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("padding", [None, 3, -1])
def test_equals_nn_embedding_at_the_mask(padding, scale, assert_as_accurate):
    dy, ids, pattern = case()
    ids[0, :5] = 3
    ids[1, :5] = VOCAB - 1
    layer = torch.nn.Embedding(VOCAB, DIM, padding_idx=padding, scale_grad_by_freq=scale)
    layer(ids).backward(dy)
    theirs = layer.weight.grad.flatten()[pattern.indices]
    got = ops.sampled_embedding_grad(
        dy, ids, pattern, padding_idx=padding, scale_grad_by_freq=scale
    )
    row = None if padding is None else padding % VOCAB
    exact = sampled_embedding_grad_reference(dy.double(), ids, pattern.indices, VOCAB, row, scale)
    assert_as_accurate(got, theirs, exact)


def test_padding_row_gets_zero():
    dy, ids, pattern = case(density=1.0)
    ids[0, :5] = 7
    got = ops.sampled_embedding_grad(dy, ids, pattern, padding_idx=7).view(VOCAB, DIM)
    assert torch.equal(got[7], torch.zeros(DIM))
    without = ops.sampled_embedding_grad(dy, ids, pattern).view(VOCAB, DIM)
    assert without[7].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    dy, ids, pattern = case()
    dy = dy.to(dtype)
    got = ops.sampled_embedding_grad(dy, ids, pattern)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == wide
    torch.testing.assert_close(
        got, sampled_embedding_grad_reference(dy, ids, pattern.indices, VOCAB)
    )


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_token_dtypes_and_strides(ids_dtype):
    dy, ids, pattern = case()
    expected = ops.sampled_embedding_grad(dy, ids, pattern)
    assert torch.equal(ops.sampled_embedding_grad(dy, ids.to(ids_dtype), pattern), expected)
    strided = dy.transpose(0, 1).contiguous().transpose(0, 1)
    other = ids.t().contiguous().t()
    assert torch.equal(ops.sampled_embedding_grad(strided, other, pattern), expected)


@pytest.mark.parametrize(
    ("density", "tokens"), [(0.0, (3, 4)), (0.3, (0,)), (1.0, (1,)), (0.3, (2, 0))], ids=str
)
def test_edges(density, tokens):
    dy, ids, pattern = case(density, tokens)
    got = ops.sampled_embedding_grad(dy, ids, pattern)
    torch.testing.assert_close(
        got, sampled_embedding_grad_reference(dy, ids, pattern.indices, VOCAB)
    )


def test_tokens_without_masked_rows():
    keep = torch.zeros(VOCAB, DIM, dtype=torch.bool)
    keep[10] = True
    pattern = SparsePattern.from_mask(keep)
    ids = torch.tensor([0, 9, 11, 49])
    got = ops.sampled_embedding_grad(torch.randn(4, DIM), ids, pattern)
    assert torch.equal(got, torch.zeros(DIM))


def test_repeats_to_the_bit():
    dy, ids, pattern = case(tokens=(4000,))
    first = ops.sampled_embedding_grad(dy, ids, pattern)
    for _ in range(3):
        assert torch.equal(ops.sampled_embedding_grad(dy, ids, pattern), first)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
def test_gradcheck(padding, scale):
    ids = torch.tensor([[0, 2, 2], [4, 0, 1]])
    pattern = SparsePattern.from_mask(torch.rand(5, 4) < 0.6)
    dy = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda g: ops.sampled_embedding_grad(
            g, ids, pattern, padding_idx=padding, scale_grad_by_freq=scale
        ),
        (dy,),
    )


def test_a_huge_vocabulary_costs_only_its_tokens():
    """A dense [vocab, d] gradient would be 4 TiB here."""
    vocab, dim = 1 << 30, 1024
    at = torch.tensor([5 * dim + 1, 5 * dim + 7, (vocab - 1) * dim + 3])
    pattern = SparsePattern.from_indices(at, (vocab, dim))
    dy, ids = torch.randn(3, dim), torch.tensor([5, vocab - 1, 5])
    got = ops.sampled_embedding_grad(dy, ids, pattern)
    torch.testing.assert_close(
        got, torch.stack((dy[0, 1] + dy[2, 1], dy[0, 7] + dy[2, 7], dy[1, 3]))
    )


def test_errors_name_the_shapes():
    dy, ids, pattern = case()
    with pytest.raises(MaskError, match=r"\(50, 16\).*\(vocab, 8\)"):
        ops.sampled_embedding_grad(dy[..., :8], ids, pattern)
    with pytest.raises(MaskError, match="plus one dimension"):
        ops.sampled_embedding_grad(dy, ids[0], pattern)
