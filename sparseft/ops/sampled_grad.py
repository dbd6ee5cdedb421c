"""The gradient of a weight, computed only at the entries of a mask.

For ``y = x @ W.T`` the dense gradient is ``dW = dY.T @ X``; training a mask needs
``dW.flatten()[indices]`` and nothing else. Embeddings are the same thing with one-hot X, and Conv1D
(weight of shape (in, out)) swaps the two operands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseft.errors import MaskError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._common import accumulation_dtype, operator, rows_of
from sparseft.ops._sampled_cpu import sampled_grad_cpu

if TYPE_CHECKING:
    from sparseft.diff import SparsePattern

__all__ = [
    "embedding_grad_at",
    "sampled_embedding_grad",
    "sampled_weight_grad",
    "weight_grad_at",
]


# The definitions.


def sampled_weight_grad_reference(
    grad_output: Tensor, input: Tensor, indices: Tensor, transposed: bool = False
) -> Tensor:
    """``(dY.T @ X).flatten()[indices]``, or ``(X.T @ dY)`` for a weight stored (in, out)."""
    wide = accumulation_dtype(grad_output.dtype, input.dtype)
    dy, x = rows_of(grad_output).to(wide), rows_of(input).to(wide)
    dense = x.t() @ dy if transposed else dy.t() @ x
    return dense.flatten()[indices]


def sampled_embedding_grad_reference(
    grad_output: Tensor,
    token_ids: Tensor,
    indices: Tensor,
    vocab: int,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Sum of the ``grad_output`` rows of each token, at the mask; rows of ``padding_idx`` get
    nothing.
    """
    wide = accumulation_dtype(grad_output.dtype)
    dim = grad_output.shape[-1]
    dy, ids = rows_of(grad_output).to(wide), token_ids.reshape(-1)
    if padding_idx is not None:
        dy, ids = dy[ids != padding_idx], ids[ids != padding_idx]
    if scale_grad_by_freq:
        dy = dy / torch.bincount(ids, minlength=vocab)[ids, None]
    dense = torch.zeros(vocab, dim, dtype=wide, device=dy.device).index_add(0, ids, dy)
    return dense.flatten()[indices]


# Registration: dispatch, fake, autograd.


def _why_no_kernel(indices: Tensor, *operands: Tensor) -> str | None:
    """Return what keeps the kernels from these tensors. Operands may have any strides."""
    for x in operands:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"an operand is {x.dtype} and the kernels sum in float32"
    return None if indices.is_contiguous() else "the indices are not contiguous"


def _run(grad_output, input, indices, transposed, backend, out, accumulate) -> None:
    a, b = (input, grad_output) if transposed else (grad_output, input)
    tensors = (grad_output, input, indices, out)
    why_not = _why_no_kernel(indices, grad_output, input)
    if why_not is None and not out.is_contiguous():
        why_not = "out is not contiguous"
    chosen = resolve_backend("sampled_weight_grad", *tensors, backend=backend, why_not=why_not)
    if indices.numel() == 0:
        return
    a, b = rows_of(a), rows_of(b)
    if a.shape[0] == 0:
        if not accumulate:
            out.zero_()
    elif chosen == "triton":
        from sparseft.ops._sampled_gpu import sampled_grad_triton

        sampled_grad_triton(a, b, indices, out, accumulate=accumulate)
    elif a.device.type == "cpu":
        sampled_grad_cpu(a, b, indices, out, accumulate=accumulate)
    else:
        values = sampled_weight_grad_reference(a, b, indices)
        out.add_(values) if accumulate else out.copy_(values)


@operator(
    "sampled_weight_grad(Tensor grad_output, Tensor input, Tensor indices, bool transposed=False, "
    "str backend='') -> Tensor"
)
def _sampled_weight_grad(grad_output, input, indices, transposed=False, backend=""):
    wide = accumulation_dtype(grad_output.dtype, input.dtype)
    out = torch.empty(indices.shape, dtype=wide, device=indices.device)
    _run(grad_output, input, indices, transposed, backend, out, accumulate=False)
    return out


@operator(
    "sampled_weight_grad_(Tensor(a!) out, Tensor grad_output, Tensor input, Tensor indices, "
    "bool transposed=False, str backend='') -> ()"
)
def _sampled_weight_grad_(out, grad_output, input, indices, transposed=False, backend=""):
    _run(grad_output, input, indices, transposed, backend, out, accumulate=True)


@operator(
    "sampled_embedding_grad(Tensor grad_output, Tensor token_ids, Tensor indices, int vocab, "
    "int padding_idx=-1, bool scale_grad_by_freq=False, str backend='') -> Tensor"
)
def _sampled_embedding_grad(
    grad_output, token_ids, indices, vocab, padding_idx=-1, scale_grad_by_freq=False, backend=""
):
    chosen = resolve_backend(
        "sampled_embedding_grad", grad_output, token_ids, indices,
        backend=backend, why_not=_why_no_kernel(indices, grad_output),
    )  # fmt: skip
    wide = accumulation_dtype(grad_output.dtype)
    dim = grad_output.shape[-1]
    dy, ids = rows_of(grad_output), token_ids.reshape(-1)
    if indices.numel() == 0 or ids.numel() == 0:
        return torch.zeros(indices.shape, dtype=wide, device=indices.device)
    if chosen == "triton":
        from sparseft.ops._sampled_gpu import sampled_embedding_triton

        return sampled_embedding_triton(
            dy, ids, indices, vocab, padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq
        )
    out = torch.zeros(indices.shape, dtype=wide, device=indices.device)
    tokens, inverse, scale = _active_tokens(ids, padding_idx, scale_grad_by_freq)
    sums = torch.ops.aten.embedding_dense_backward(dy.to(wide), inverse, tokens.numel(), -1, False)
    if scale is not None:
        sums = sums * scale[:, None]
    position, token, col = _entries_of_tokens(indices, tokens, dim)
    out[position] = sums[token, col]
    return out


def _active_tokens(
    ids: Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the distinct token ids, each position's place among them, and a factor per token (0
    for padding).
    """
    tokens, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    scale = counts.reciprocal() if scale_grad_by_freq else None
    if padding_idx >= 0:
        keep = (tokens != padding_idx).to(torch.float32)
        scale = keep if scale is None else scale * keep
    return tokens, inverse, scale


def _entries_of_tokens(indices: Tensor, tokens: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for every masked entry in a row of ``tokens``: its position, its token's place, its
    column.
    """
    edges = torch.stack((tokens * dim, (tokens + 1) * dim - 1)).to(indices.dtype)
    first = torch.searchsorted(indices, edges[0])
    last = torch.searchsorted(indices, edges[1], right=True)
    counts = last - first
    token = torch.repeat_interleave(counts)
    within = torch.arange(token.numel(), device=indices.device)
    position = within + (first - (counts.cumsum(0) - counts))[token]
    col = indices[position] - edges[0][token]
    return position, token, col


@torch.library.register_fake("sparseft::sampled_weight_grad")
def _(grad_output, input, indices, transposed=False, backend=""):
    wide = accumulation_dtype(grad_output.dtype, input.dtype)
    return grad_output.new_empty(indices.shape, dtype=wide)


@torch.library.register_fake("sparseft::sampled_weight_grad_")
def _(out, grad_output, input, indices, transposed=False, backend=""):
    return None


@torch.library.register_fake("sparseft::sampled_embedding_grad")
def _(grad_output, token_ids, indices, vocab, padding_idx=-1, scale_grad_by_freq=False, backend=""):
    return grad_output.new_empty(indices.shape, dtype=accumulation_dtype(grad_output.dtype))


@operator(
    "spmm(Tensor x, Tensor values, Tensor indices, SymInt rows, SymInt cols, bool transposed=False)"
    " -> Tensor"
)
def _spmm(x, values, indices, rows, cols, transposed=False):
    """``x @ S`` or ``x @ S.T``, with S the (rows, cols) matrix holding ``values`` at the mask."""
    places = torch.stack((indices // cols, indices % cols)).long()
    sparse = torch.sparse_coo_tensor(
        places, values, (rows, cols), is_coalesced=True, check_invariants=False
    )
    flat = rows_of(x).to(values.dtype)
    product = torch.sparse.mm(sparse if transposed else sparse.t(), flat.t()).t()
    return product.reshape(*x.shape[:-1], product.shape[-1]).contiguous().to(x.dtype)


@torch.library.register_fake("sparseft::spmm")
def _(x, values, indices, rows, cols, transposed=False):
    return x.new_empty((*x.shape[:-1], rows if transposed else cols))


def _setup_weight(ctx, inputs, output):
    grad_output, input, indices, ctx.transposed, ctx.backend = inputs
    ctx.save_for_backward(grad_output, input, indices)


def _weight_backward(ctx, grad):
    """With S holding ``grad`` at the mask: d(dY) = X @ S.T and dX = dY @ S."""
    grad_output, input, indices = ctx.saved_tensors
    swap = ctx.transposed
    a, b = (input, grad_output) if swap else (grad_output, input)
    spmm, shape = torch.ops.sparseft.spmm.default, (a.shape[-1], b.shape[-1])
    needs_a, needs_b = ctx.needs_input_grad[int(swap)], ctx.needs_input_grad[1 - int(swap)]
    grad_a = spmm(b, grad, indices, *shape, True).to(a.dtype) if needs_a else None
    grad_b = spmm(a, grad, indices, *shape, False).to(b.dtype) if needs_b else None
    return *((grad_b, grad_a) if swap else (grad_a, grad_b)), None, None, None


def _setup_spmm(ctx, inputs, output):
    x, values, indices, ctx.rows, ctx.cols, ctx.transposed = inputs
    ctx.save_for_backward(x, values, indices)


def _spmm_backward(ctx, grad):
    x, values, indices = ctx.saved_tensors
    dx = dvalues = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.sparseft.spmm.default(
            grad, values, indices, ctx.rows, ctx.cols, not ctx.transposed
        ).to(x.dtype)
    if ctx.needs_input_grad[1]:
        a, b = (grad, x) if ctx.transposed else (x, grad)
        dvalues = torch.ops.sparseft.sampled_weight_grad.default(a, b, indices).to(values.dtype)
    return dx, dvalues, None, None, None, None


torch.library.register_autograd(
    "sparseft::sampled_weight_grad", _weight_backward, setup_context=_setup_weight
)
torch.library.register_autograd("sparseft::spmm", _spmm_backward, setup_context=_setup_spmm)


def _setup_embedding(ctx, inputs, output):
    grad_output, token_ids, indices, _, ctx.padding_idx, ctx.scale_grad_by_freq, _ = inputs
    ctx.like = (grad_output.shape, grad_output.dtype)
    ctx.save_for_backward(token_ids, indices)


def _embedding_backward(ctx, grad):
    token_ids, indices = ctx.saved_tensors
    shape, dtype = ctx.like
    ids = token_ids.reshape(-1)
    if ids.numel() == 0:
        return grad.new_zeros(shape, dtype=dtype), None, None, None, None, None, None
    tokens, inverse, scale = _active_tokens(ids, ctx.padding_idx, ctx.scale_grad_by_freq)
    position, token, col = _entries_of_tokens(indices, tokens, shape[-1])
    rows = grad.new_zeros(tokens.numel(), shape[-1])
    rows[token, col] = grad[position]
    if scale is not None:
        rows = rows * scale[:, None]
    return rows[inverse].reshape(shape).to(dtype), None, None, None, None, None, None


torch.library.register_autograd(
    "sparseft::sampled_embedding_grad", _embedding_backward, setup_context=_setup_embedding
)


# Public functions.

# The ops as autograd Functions call them: flat indices instead of a pattern, nothing checked.
weight_grad_at = _sampled_weight_grad
embedding_grad_at = _sampled_embedding_grad


def sampled_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    pattern: SparsePattern,
    *,
    transposed: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the gradient of a linear layer's weight at the entries of a mask.

    ``values[i] = (dY.T @ X).flatten()[indices[i]]``, summed over all leading dimensions; no dense
    gradient is formed.

    Args:
        grad_output: (..., M) floating, gradient of the layer's output.
        input: (..., N) floating, the layer's input, same leading dimensions.
        pattern: of shape (M, N), or (N, M) with ``transposed`` (Conv1D keeps its weight as (in,
            out)).
        transposed: the weight's orientation.
        out: (nnz,) fp32 (fp64 for fp64 operands) to accumulate into; no gradient is recorded then.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``; None takes the context's or the
            environment's.

    Returns:
        (nnz,) fp32, or fp64 when an operand is fp64; ``out`` if given. Differentiable in both
        operands without ``out``.

    Raises:
        MaskError: shapes that do not fit the pattern.
        BackendError: ``"triton"`` was asked for and cannot run here, or an operand is fp64.

    Numerics: products and sums in fp32 (fp64) whatever the operands' dtype; on GPUs, fp32 products
    in tf32 where torch's own matmul may (``torch.backends.cuda.matmul.fp32_precision``).
    Deterministic for fixed shapes and threads or device.

    Triton takes operands of any strides as they lie (leading dimensions that do not collapse into
    one are copied, as ``reshape`` does), except that a misaligned matrix that many tiles read is
    copied with padded rows. The first call with a pattern lays it out for the kernels and waits for
    the device; later ones do not.
    """
    m, n = grad_output.shape[-1], input.shape[-1]
    expected = (n, m) if transposed else (m, n)
    if tuple(pattern.shape) != expected:
        raise MaskError(
            f"sampled_weight_grad: the pattern has shape {tuple(pattern.shape)} but grad_output "
            f"{tuple(grad_output.shape)} "
            f"and input {tuple(input.shape)} give a weight of shape {expected} "
            f"(transposed={transposed}); a weight "
            "stored (in, out), as Conv1D does, needs transposed=True"
        )
    if grad_output.shape[:-1] != input.shape[:-1]:
        raise MaskError(
            f"sampled_weight_grad: grad_output {tuple(grad_output.shape)} and input "
            f"{tuple(input.shape)} "
            "should agree in all but the last dimension"
        )
    if out is None:
        return _sampled_weight_grad(grad_output, input, pattern.indices, transposed, backend or "")
    wide = accumulation_dtype(grad_output.dtype, input.dtype)
    if out.shape != pattern.indices.shape or out.dtype != wide:
        raise MaskError(
            f"sampled_weight_grad: out is {out.dtype} {tuple(out.shape)}; it should be {wide} "
            f"({pattern.nnz},)"
        )
    _sampled_weight_grad_(
        out.detach(),
        grad_output.detach(),
        input.detach(),
        pattern.indices,
        transposed,
        backend or "",
    )
    return out


def sampled_embedding_grad(
    grad_output: Tensor,
    token_ids: Tensor,
    pattern: SparsePattern,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return the gradient of an embedding table at the entries of a mask.

    ``values[i] = sum of dY[t, col(i)] over tokens t with token_ids[t] == row(i)``; memory grows
    with tokens and nnz, never with vocabulary x width.

    Args:
        grad_output: (..., d) floating, gradient of the embedding's output.
        token_ids: (...) integer.
        pattern: of shape (vocab, d).
        padding_idx: row that gets no gradient; None for none. Negative counts from the end, as in
            ``nn.Embedding``.
        scale_grad_by_freq: divide each row's gradient by how often its token occurs in
            ``token_ids``.
        backend: as in :func:`sampled_weight_grad`.

    Returns:
        (nnz,) fp32, or fp64 for fp64 ``grad_output``. Differentiable in ``grad_output``.

    Raises:
        MaskError: shapes that do not fit the pattern.
        BackendError: ``"triton"`` was asked for and cannot run here, or ``grad_output`` is fp64.

    Numerics: fp32 sums in a fixed order of positions; deterministic.
    """
    dim = grad_output.shape[-1]
    if len(pattern.shape) != 2 or pattern.shape[1] != dim:
        raise MaskError(
            f"sampled_embedding_grad: the pattern has shape {tuple(pattern.shape)}; grad_output "
            f"{tuple(grad_output.shape)} "
            f"needs (vocab, {dim})"
        )
    if grad_output.shape[:-1] != token_ids.shape:
        raise MaskError(
            f"sampled_embedding_grad: grad_output {tuple(grad_output.shape)} should be token_ids "
            f"{tuple(token_ids.shape)} plus one dimension"
        )
    vocab = pattern.shape[0]
    if padding_idx is None:
        padding = -1
    else:
        padding = padding_idx + vocab if padding_idx < 0 else padding_idx
    return _sampled_embedding_grad(
        grad_output, token_ids, pattern.indices, vocab, padding, scale_grad_by_freq, backend or ""
    )
