"""The sampled weight gradient on a CPU: tiles where the mask is dense, dot products where not.

Cost against torch's own dense ``dY.T @ X`` (fp32, random mask, T = 1024 tokens, processor time on
one core of an EPYC with AVX-512, best of five; s marks dot products, the rest are dense tiles):

===========  =====  =====  =====  =====  =====  =====
shape        0.1 %  1 %    3 %    5 %    10 %   20 %
===========  =====  =====  =====  =====  =====  =====
384 x 384    0.09s  0.14s  0.28s  0.39s  0.83s  0.97
1536 x 384   0.11s  0.17s  0.22s  0.41s  0.71s  1.00
384 x 1536   0.04s  0.10s  0.21s  0.33s  0.66s  1.02
768 x 768    0.03s  0.08s  0.18s  0.29s  0.53s  0.98
25000 x 384  0.06s  0.11s  0.20s  0.30s  0.55s  0.96
===========  =====  =====  =====  =====  =====  =====

On a Cascade Lake Xeon dot products cost more and GEMM less (the figures are in `_layout`): tiles
take over at about 6 % there.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from sparseft.ops._layout import TILE, Layout, layout_of

__all__ = ["sampled_grad_cpu"]

# Tokens per dot product. 384 columns x 512 tokens is 768 KiB, inside a core's L2: 62 ns per 512
# products there, against 41 ns per 256 and 136 ns per 1024.
_SLAB = 512
# Columns of grad_output transposed at a time, so that a 250,002-row head costs 4 MiB of scratch,
# not 1 GiB. With 4096 the transpose strides over pages: 92 ms more for 25,000 x 384 on an EPYC.
_PANEL = 1024

_scratch = threading.local()


def _tile_buffer(size: int, dtype: torch.dtype) -> Tensor:
    """Return ``size`` elements of this thread's tile buffer (at most TILE fp32: 4 MiB).

    Kept because a fresh buffer of megabytes is page-faulted in anew every call: 0.5 ms beside a
    GEMM of 2.3 ms.
    """
    if dtype != torch.float32:
        return torch.empty(size, dtype=dtype)
    held = getattr(_scratch, "tile", None)
    if held is None or held.numel() < size:
        held = _scratch.tile = torch.empty(size)
    return held[:size]


def transpose_slabs(x: Tensor, slab: int) -> Tensor:
    """Return (T // slab, N, slab): each slab of ``slab`` rows of (T, N), transposed.

    A channel shuffle of channels-last pixels with ``slab`` groups of N channels is exactly this,
    and it is the one transpose torch runs in vector registers: 0.19 ms against 0.57 ms for
    ``x.t().contiguous()`` at 1024 x 384 fp32.
    """
    tokens, width = x.shape
    count, pixel = tokens // slab, slab * width
    if slab <= 1 or width <= 1 or x.dtype != torch.float32:
        return x.view(count, slab, width).transpose(1, 2).contiguous()
    pixels = x.as_strided((count, pixel, 1, 1), (pixel, 1, pixel, pixel))
    return torch.channel_shuffle(pixels, slab).as_strided((count, width, slab), (pixel, slab, 1))


def _slab_length(tokens: int) -> int:
    """Return about _SLAB: the tokens in even parts, of whole cache lines so that rows align.

    The lines of a part should not be a multiple of eight: rows whose stride is a power of two share
    a few sets of the cache, and transposing 512 tokens costs 0.40 ns an element, 528 tokens 0.10.
    """
    count = max(1, round(tokens / _SLAB))
    lines = -(-tokens // count // 16)
    return min(tokens, 16 * (lines + (lines % 8 == 0)))


def sampled_grad_cpu(
    grad_output: Tensor, input: Tensor, indices: Tensor, out: Tensor, *, accumulate: bool
) -> None:
    """Write, or add, ``(grad_output.T @ input).flatten()[indices]`` to ``out``.

    Args:
        grad_output: (T, M) floating, T > 0.
        input: (T, N) floating.
        indices: (nnz,) ascending flat positions in (M, N), nnz > 0.
        out: (nnz,) fp32 or fp64: what products and sums are kept in.
        accumulate: add to ``out`` instead of overwriting it.
    """
    rows, cols = grad_output.shape[1], input.shape[1]
    layout = layout_of(indices, rows, cols)
    if layout.columns is not None:
        input = input.index_select(1, layout.columns)
    tokens = grad_output.shape[0]
    slab = _slab_length(tokens)
    runs = layout.runs(tokens, slab)
    if any(run[4] for run in runs):
        dense_a, dense_b = grad_output.to(out.dtype), input.to(out.dtype)
    for first, end, _, hi, dense in runs:
        if dense:
            _dense_run(dense_a, dense_b, indices, layout, first, end, out, accumulate)
            continue
        for panel in range(first, end, _PANEL):
            stop = min(panel + _PANEL, end)
            e0 = layout.offsets[panel // layout.block_rows]
            e1 = hi if stop == end else layout.offsets[stop // layout.block_rows]
            _dots_run(
                grad_output,
                input,
                indices[e0:e1],
                layout,
                panel,
                stop,
                slab,
                out[e0:e1],
                accumulate,
            )


def _positions(indices: Tensor, layout: Layout, first: int) -> tuple[Tensor, Tensor]:
    """Return row (counted from ``first``) and column (among the active ones) of each entry."""
    row = torch.div(indices, layout.cols, rounding_mode="trunc")
    col = indices - row * layout.cols
    if layout.columns is not None:
        col = torch.searchsorted(
            layout.columns.to(col.dtype), col, out_int32=col.dtype == torch.int32
        )
    return row.sub_(first), col


def _dense_run(
    a: Tensor,
    b: Tensor,
    indices: Tensor,
    layout: Layout,
    first: int,
    end: int,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Compute row blocks of dW in the tile buffer and gather the mask from it."""
    width = b.shape[1]
    step = max(1, TILE // width // layout.block_rows) * layout.block_rows
    buffer = _tile_buffer(min(step, end - first) * width, out.dtype)
    for row in range(first, end, step):
        stop = min(row + step, end)
        e0 = layout.offsets[row // layout.block_rows]
        e1 = layout.offsets[-(-stop // layout.block_rows)]
        if e0 == e1:
            continue
        tile = buffer[: (stop - row) * width]
        torch.mm(a[:, row:stop].t(), b, out=tile.view(stop - row, width))
        place = indices[e0:e1]
        if layout.columns is not None:
            r, c = _positions(place, layout, row)
            place = r * width + c
        elif row:
            place = place - row * width
        if accumulate:
            out[e0:e1] += tile.index_select(0, place)
        else:
            torch.index_select(tile, 0, place, out=out[e0:e1])


def _dots_run(
    grad_output: Tensor,
    input: Tensor,
    indices: Tensor,
    layout: Layout,
    first: int,
    end: int,
    slab: int,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Compute one dot product over the tokens per entry, a slab of tokens at a time.

    The gradient of ``embedding_bag`` with respect to its per-sample weights is exactly this sampled
    product (weight i multiplies row ``col[i]`` of a table into bag ``row[i]``), and calls BLAS dot:
    62 ns per entry and 512 tokens, where ``torch.sparse.sampled_addmm`` needs about 150 and
    transposes its operands more slowly.
    """
    row, col = _positions(indices, layout, first)
    one_bag = torch.zeros(1, dtype=indices.dtype)
    tokens = grad_output.shape[0]
    total = torch.zeros(0, dtype=out.dtype)
    whole = tokens // slab * slab
    # As many slabs per transpose as there are threads to share them.
    group = slab * min(torch.get_num_threads(), max(1, whole // slab))
    spans = [(t, min(t + group, whole), slab) for t in range(0, whole, group)]
    if whole < tokens:
        spans.append((whole, tokens, tokens - whole))
    for start, stop, length in spans:
        a = grad_output[start:stop, first:end].to(out.dtype).contiguous()
        b = input[start:stop].to(out.dtype).contiguous()
        for left, right in zip(transpose_slabs(a, length), transpose_slabs(b, length), strict=True):
            part = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                left, right, col, one_bag, row, 0, -1
            )
            total = total.add_(part) if total.numel() else part
    if accumulate:
        out += total
    else:
        out.copy_(total)
