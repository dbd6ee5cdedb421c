"""Products with a sparse matrix on a CPU.

A row of ``S @ x.T`` is a weighted sum of rows of ``x.T``, one per entry: what ``embedding_bag``
computes, in vector registers along the tokens, every token by itself and in the entries' order. So
a token's bits depend on no other token.

Against ``F.linear`` on the dense weight (fp32, random mask, one core of an EPYC with AVX-512,
processor time in ms, best of five, both transposes and the addition included):

============  ======  ========  =====  =====  =====
weight        tokens  F.linear  1 %    3 %    10 %
============  ======  ========  =====  =====  =====
768 x 768     1         0.08     0.13   0.12   0.16
768 x 768     8         0.14     0.11   0.12   0.17
768 x 768     64        0.80     0.16   0.18   0.26
768 x 768     512       6.3      0.64   0.78   1.3
3072 x 768    64        3.5      0.57   0.50   0.89
3072 x 768    2048    102        9.8   12     20
768 x 3072    64        3.7      0.24   0.28   0.53
768 x 3072    2048     98        5.7    9.5   24
============  ======  ========  =====  =====  =====

Without the transposes, ``torch.sparse`` CSR products took 0.05 ms at 768 x 768, 10 %, 8 tokens
where bags took 0.07, but 0.34 against 0.15 at 64 tokens and 3.1 against 1.7 at 512.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.ops._csr import Csr
from sparseft.ops._sampled_cpu import transpose_slabs

__all__ = ["embedding_diff_cpu_", "spmm_cpu"]

# Tokens per slab: 768 columns of 256 tokens are 768 KiB, inside a core's L2.
_SLAB = 256
# Outputs per bag call, so that the product (512 KiB) is still in L2 when it is added.
_PANEL = 512
# embedding_bag has no vector code for one or two tokens: 0.80 ms for 3072 x 768 at 10 %, where
# eight take 0.38.
_LEAST = 8


def _product(xt: Tensor, matrix: Csr, values: Tensor, first: int, last: int) -> Tensor:
    """Return rows ``first:last`` of ``S @ xt``; xt (inputs, tokens) contiguous."""
    edges = matrix.offsets[[first, last]].tolist()
    entries = slice(*edges)
    offsets = matrix.offsets[first : last + 1]
    if edges[0]:
        offsets = offsets - edges[0]
    if edges[0] == edges[1]:
        return xt.new_zeros(last - first, xt.shape[1])
    summed, *_ = torch.ops.aten._embedding_bag_forward_only(
        xt, matrix.inputs[entries], offsets, False, 0, False, values[entries], True
    )
    return summed


def spmm_cpu(
    x: Tensor, matrix: Csr, values: Tensor, bias: Tensor | None, add_to: Tensor | None, out: Tensor
) -> None:
    """Write ``rn(add_to + x @ S.T + bias)`` to ``out``, summed in the dtype of ``values``.

    Args:
        x: (T, inputs) floating.
        matrix: by outputs.
        values: (nnz,) fp32 or fp64, in the matrix's order.
        bias: (outputs,) floating, or None.
        add_to: (T, outputs) floating, or None for zeros.
        out: (T, outputs) floating; may be ``add_to``.
    """
    tokens, width = out.shape
    for start in range(0, tokens, _SLAB):
        stop = min(start + _SLAB, tokens)
        held = x[start:stop].to(values.dtype)
        if stop - start < _LEAST:
            padded = held.new_zeros(_LEAST, held.shape[1])
            padded[: stop - start] = held
            held = padded
        xt = transpose_slabs(held.contiguous(), held.shape[0])[0]
        for first in range(0, width, _PANEL):
            last = min(first + _PANEL, width)
            summed = _product(xt, matrix, values, first, last)
            total = transpose_slabs(summed, summed.shape[0])[0][: stop - start]
            if bias is not None:
                total = total + bias[first:last].to(total.dtype)
            if add_to is not None:
                total = total + add_to[start:stop, first:last]
            out[start:stop, first:last] = total


def embedding_diff_cpu_(out: Tensor, ids: Tensor, matrix: Csr, values: Tensor) -> None:
    """Add each token's row of the diff to ``out``, in place, with one rounding.

    Args:
        out: (T, dim) floating, contiguous.
        ids: (T,) integers.
        matrix: by rows of the (vocab, dim) table.
        values: (nnz,) fp32 or fp64.
    """
    first = matrix.offsets[ids].long()
    counts = matrix.offsets[ids + 1].long() - first
    token = torch.repeat_interleave(counts)
    if token.numel() == 0:
        return
    within = torch.arange(token.numel()) - (counts.cumsum(0) - counts)[token]
    entry = first[token] + within
    # A row's columns are unique, so every address is here once.
    address = token * out.shape[1] + matrix.inputs[entry]
    flat = out.view(-1)
    flat[address] = (flat[address].to(values.dtype) + values[entry]).to(out.dtype)
