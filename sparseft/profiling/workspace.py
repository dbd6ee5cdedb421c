"""Bytes that operations allocate within themselves, reckoned from shapes.

A dispatch mode sees what an operation returns, not what it makes and drops on the way. Here is one
function per operation where that counts; each names the code it follows, and is tested against what
the profiler sees that code allocate. Everything is in bytes beyond the operation's results.

`Workspace` puts them together: the function that `tracker.MemoryTracker` asks, with the plans of a
CPU or of the Triton kernels on an H200. What our operations keep beside a mask from call to call
(tile codes, compressed rows, the CPU's tile buffer) adds up in ``kept``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseft.ops._common import CHUNK
from sparseft.ops._layout import _BLOCK_ROWS, TILE, Layout
from sparseft.ops._moments import QUANTUM
from sparseft.ops._sampled_cpu import _PANEL, _slab_length
from sparseft.ops.live_rows import _WORTH
from sparseft.ops.sparse_step import _CHUNK as STEP_CHUNK

__all__ = ["Workspace"]

# cuBLAS on an H200 (aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize, sm_90).
CUBLAS = 32 << 20
FP32 = 4


class Bytes(NamedTuple):
    """What one operation holds while it runs, and what it keeps for the next call."""

    inside: int
    kept: int = 0


# ---- our operations on a CPU


@functools.lru_cache(maxsize=4096)
def sampled_grad_on_cpu(
    tokens: int, rows: int, cols: int, nnz: int, itemsize: int, index: int, threads: int
) -> Bytes:
    """`ops/_sampled_cpu.py`, with the plan of `ops/_layout.py` for entries spread evenly.

    Args:
        tokens: T.
        rows, cols: of the gradient: columns of both operands.
        nnz: of the mask.
        itemsize: bytes of an operand's element; below four both are widened.
        index: bytes of an index.
        threads: that share the slabs of a transpose.

    ``kept`` is the tile buffer, of which a thread has one for all masks.
    """
    if nnz == 0 or tokens == 0:
        return Bytes(0)
    layout, packed = _even_layout(rows, cols, nnz)
    width = cols if packed is None else packed
    taken = 0 if packed is None else tokens * width * itemsize  # the active columns' copy
    slab = _slab_length(tokens)
    runs = layout.runs(tokens, slab)
    widened = itemsize < FP32
    wide = FP32 * tokens * (rows + width) if widened and any(run[4] for run in runs) else 0
    inside = kept = 0
    for first, end, lo, hi, dense in runs:
        if dense:
            step = max(1, TILE // width // layout.block_rows) * layout.block_rows
            kept = max(kept, FP32 * min(step, end - first) * width)
            entries = -(-(hi - lo) * min(step, end - first) // (end - first))
            if packed is not None:
                inside = max(inside, entries * index * 4)
            elif first or step < end - first:  # the first rows' positions are taken as they are
                inside = max(inside, entries * index)
            continue
        panel = min(_PANEL, end - first)
        entries = -(-(hi - lo) * panel // (end - first))
        dots = _dots_on_cpu(tokens, slab, panel, rows, width, threads, widened)
        inside = max(inside, dots + entries * (2 * index + FP32), entries * (2 * index + 2 * FP32))
    return Bytes(taken + wide + inside, kept)


def _dots_on_cpu(
    tokens: int, slab: int, panel: int, rows: int, width: int, threads: int, widened: bool
) -> int:
    """`_dots_run`: slabs of both operands and their transposes; those of the slab before go when
    the next ones are there.
    """
    whole = tokens // slab * slab
    group = slab * min(threads, max(1, whole // slab))
    spans = [min(group, whole - t) for t in range(0, whole, group)]
    if whole < tokens:
        spans.append(tokens - whole)
    copied_left = panel if widened or panel < rows else 0  # all columns of fp32: no copy
    copied_right = width if widened else 0
    most = 0
    for before, now in zip([0, *spans[:-1]], spans, strict=True):
        here = now * (panel + width + copied_left + copied_right)
        most = max(most, here + before * (panel + width))
    return FP32 * most


def _even_layout(rows: int, cols: int, nnz: int) -> tuple[Layout, int | None]:
    """Return the layout of a mask of evenly spread entries, and how many columns are active where
    fewer than half are.
    """
    block = max(1, min(_BLOCK_ROWS, TILE // max(1, cols)))
    blocks = -(-rows // block)
    offsets = [min(nnz, round(nnz * b * block / rows)) for b in range(blocks)]
    active = round(cols * (1 - (1 - nnz / (rows * cols)) ** rows))
    packed = max(active, 1) if active * 2 < cols else None
    # The plan asks only for how many there are.
    columns = None if packed is None else torch.empty(packed, dtype=torch.int64, device="meta")
    return Layout(rows, cols, block, [*offsets, nnz], columns, 0), packed


def sampled_embedding_on_cpu(
    tokens: int, vocab: int, dim: int, nnz: int, itemsize: int, scaled: bool
) -> Bytes:
    """`ops/sampled_grad.py`, ``_sampled_embedding_grad``, for tokens drawn evenly.

    Args:
        tokens: T.
        vocab, dim: of the table.
        nnz: of the mask.
        itemsize: of the gradient's element.
        scaled: there is a padding token or scaling by frequency: one more product.
    """
    distinct = vocab * (1 - (1 - 1 / vocab) ** tokens)
    sums = FP32 * dim * distinct
    wide = FP32 * tokens * dim if itemsize < FP32 else 0
    entries = nnz * distinct / vocab
    # position, token, column; the gathered sums; int64 and their intermediates
    listed = entries * 40
    return Bytes(int(sums + max(wide, sums if scaled else 0, listed) + 24 * tokens))


def write_sum_on_cpu(nnz: int, itemsize: int) -> Bytes:
    """`ops/apply_diff.py`, ``write_sum_reference_``: addresses of two chunks, or of one and its
    sums.
    """
    first, second = min(nnz, CHUNK), min(max(nnz - CHUNK, 0), CHUNK)
    widened = 0 if itemsize >= FP32 else FP32
    return Bytes(max(8 * (first + second), (8 + FP32 + widened) * first))


def sparse_step_on_cpu(nnz: int, itemsize: int, masked: bool, eight_bit: bool) -> Bytes:
    """`ops/sparse_step.py`, ``step_reference_``: one chunk of one tensor."""
    n = min(nnz, STEP_CHUNK)
    whole = n if masked or eight_bit else nnz
    if eight_bit:
        n = -(-n // QUANTUM) * QUANTUM
        update = 6 * FP32 * n
    else:
        update = FP32 * whole
    write = n * (8 + (FP32 if itemsize >= FP32 else 2 * FP32 + itemsize)) if masked else 0
    return Bytes(max(update, write))


def spmm_on_cpu(tokens: int, inputs: int, outputs: int, nnz: int, transposed: bool) -> Bytes:
    """`ops/_spmm_cpu.py` and `ops/_csr.py`: a slab of tokens each way; rows (and, for the product's
    gradient, columns) compressed are kept.
    """
    slab, panel = min(tokens, 256), min(outputs, 512)
    arranged = FP32 * nnz if transposed else 0
    inside = FP32 * slab * (2 * inputs + 3 * panel) + arranged
    return Bytes(inside, 4 * nnz * (2 if transposed else 1) + 4 * (outputs + 1))


# ---- our operations as Triton kernels


@functools.lru_cache(maxsize=4096)
def sampled_grad_on_cuda(
    tokens: int, rows: int, cols: int, nnz: int, itemsize: int, index: int
) -> Bytes:
    """`ops/_sampled_gpu.py` with the plan of `sparseft_kernels/_configs.py`: vectors of the parts
    that tokens are split into, or two transposed slabs; codes and tables of the tiles are kept.
    """
    from sparseft_kernels._configs import DOTS, Target, plan_sampled_grad
    from sparseft_kernels._configs import TILE as SIDE

    if nnz == 0 or tokens == 0:
        return Bytes(0)
    target = Target("cuda", (9, 0), 132)
    down, across = -(-rows // SIDE), -(-cols // SIDE)
    density = nnz / (rows * cols)
    programs = {
        width: max(1, round(down * -(-across // width) * (1 - (1 - density) ** (SIDE**2 * width))))
        for width in (1, 2)
    }
    precision = "half" if itemsize == 2 else "ieee"
    config, split = plan_sampled_grad(
        tokens, (rows, cols), nnz, programs, itemsize, precision, target
    )
    tables = 24 * sum(programs.values())  # six int32 a program, both widths
    if config is None:
        block = DOTS.block_t
        pitch = max(DOTS.slab_bytes // ((rows + cols) * itemsize) // block, 1)
        pitch = min(pitch, -(-tokens // block)) * block
        return Bytes(pitch * (rows + cols) * itemsize, tables)
    most = nnz / down  # entries of a row of tiles; codes are of 32 bits while 2**18 suffice
    codes = nnz * (4 if most <= 1 << 18 else 8)
    return Bytes(split * nnz * FP32 if split > 1 else 0, tables + codes)


def sampled_embedding_on_cuda(tokens: int, index: int) -> Bytes:
    """`sparseft_kernels/sampled_grad.py`, ``launch_embedding_grad``: sorted tokens and the ends of
    their runs and rows; torch's sort takes as much again.
    """
    return Bytes(tokens * (3 * 8 + 4 * index + 2 * 8))


def spmm_on_cuda(tokens: int, inputs: int, outputs: int, nnz: int, itemsize: int, flip: bool):
    """`sparseft_kernels/spmm.py`, ``launch_spmm``: a transposed copy of the input; `ops/_csr.py`
    keeps rows, and columns with their order.
    """
    return Bytes(
        tokens * inputs * itemsize + (FP32 * nnz if flip else 0),
        4 * nnz * (2 if flip else 1) + 4 * (outputs + 1),
    )


# ---- torch's operations


def safe_softmax_on_cpu(numel: int, width: int) -> Bytes:
    """aten/src/ATen/native/transformers/attention.cpp, ``_safe_softmax``: where the input is -inf,
    and whether all of a row is.
    """
    return Bytes(numel + 2 * (numel // max(width, 1)))


def attention_backward_on_cuda(batch: int, heads: int, tokens: int, width: int) -> Bytes:
    """FlashAttention-2 (mha_bwd in flash_api.cpp): dQ summed in fp32, rows rounded to 128, and the
    row sums of dO * O. The memory-efficient form takes less.
    """
    padded = -(-tokens // 128) * 128
    return Bytes(FP32 * batch * heads * padded * (-(-width // 32) * 32 + 1))


class Workspace:
    """What `MemoryTracker` asks after each operation; it is called with fake tensors.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: of torch, on a CPU; None: what this process has.

    Attributes:
        assumed: what the figures rest on, in words.
        live: rows of gradients that are not zero, where known: a classifier reads one position of a
            sequence, a masked language model the labelled ones, so until the backward pass has gone
            through an attention only theirs are. (A CPU leaves the others out:
            `ops/live_rows.py`.)
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        self.device = device
        self.threads = torch.get_num_threads() if threads is None else threads
        self._kept: dict[Any, int] = {}
        self.live: int | None = None
        self._masks: list[Tensor] = []  # alive, so that ids stay theirs
        self.assumed: tuple[str, ...] = ()
        if device == "cuda":
            self.assumed = (
                "CUDA: fused attention, Triton kernels with the plans of an H200, "
                "32 MiB of cuBLAS workspace",
            )
        rules: dict[str, Callable[..., Bytes]] = {
            "sparseft::sampled_weight_grad": self._sampled,
            "sparseft::sampled_embedding_grad": self._embedding,
            "sparseft::write_sum_": self._write,
            "sparseft::sparse_step_": self._step,
            "sparseft::segment_spmm": self._spmm,
            "aten::_safe_softmax": self._softmax,
            "aten::bmm": self._mix,
            "aten::_scaled_dot_product_flash_attention_for_cpu_backward": self._attention,
            "c10d::_allgather_base_": self._gather,
            "c10d::_reduce_scatter_base_": self._scatter,
        }
        self._rules = rules
        self._known: dict[Any, Callable[..., Bytes] | None] = {}

    @property
    def kept(self) -> int:
        """Bytes that our operations keep from call to call."""
        return sum(self._kept.values())

    @property
    def standing(self) -> int:
        """Bytes that libraries hold through torch's allocator from the first step on."""
        return CUBLAS if self.device == "cuda" else 0

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if func not in self._known:
            self._known[func] = self._rules.get(func.name().split(".")[0])
        rule = self._known[func]
        return 0 if rule is None else rule(*args, **kwargs).inside

    def _keep(self, key: Any, size: int) -> None:
        self._kept[key] = max(size, self._kept.get(key, 0))

    def _keep_for(self, mask: Tensor, what: str, size: int) -> None:
        if (id(mask), what) not in self._kept:
            self._masks.append(mask)
        self._keep((id(mask), what), size)

    def _sampled(self, grad, input, indices, transposed=False, backend="") -> Bytes:
        a, b = (input, grad) if transposed else (grad, input)
        tokens, nnz = a.numel() // max(a.shape[-1], 1), indices.numel()
        size, index = min(a.element_size(), b.element_size()), indices.element_size()
        shape = (tokens, a.shape[-1], b.shape[-1], nnz, size, index)
        if self.device == "cuda":
            found = sampled_grad_on_cuda(*shape)
            self._keep_for(indices, "tiles", found.kept)
        else:
            worth = _WORTH * tokens * sum(1 / max(n, 1) for n in shape[1:3])
            if self.live is not None and tokens - self.live >= worth:
                shape = (self.live, *shape[1:])
            found = sampled_grad_on_cpu(*shape, self.threads)
            self._keep("tile buffer", found.kept)
        return found

    def _embedding(
        self, grad, ids, indices, vocab, padding_idx=-1, scale_grad_by_freq=False, backend=""
    ) -> Bytes:
        if self.device == "cuda":
            return sampled_embedding_on_cuda(ids.numel(), indices.element_size())
        scaled = padding_idx >= 0 or scale_grad_by_freq
        return sampled_embedding_on_cpu(
            ids.numel(), vocab, grad.shape[-1], indices.numel(), grad.element_size(), scaled
        )

    def _write(self, weight, indices, *_: Any) -> Bytes:
        if self.device == "cuda":
            return Bytes(0)
        return write_sum_on_cpu(indices.numel(), weight.element_size())

    def _step(self, rule, values, grads, firsts, seconds, scales, *rest: Any, **_: Any) -> Bytes:
        if self.device == "cuda":
            return Bytes(0)
        weights = rest[1]
        most = Bytes(0)
        for i, value in enumerate(values):
            size = weights[i].element_size() if weights else FP32
            found = sparse_step_on_cpu(value.numel(), size, bool(weights), bool(scales))
            most = max(most, found)
        return most

    def _spmm(self, x, add_to, values, indices, biases, order, ends, rows, cols, transposed, *_):
        tokens = x.numel() // max(x.shape[-1], 1)
        inputs, outputs = (rows, cols) if transposed else (cols, rows)
        most = Bytes(0)
        for mask in indices:
            shape = (tokens, inputs, outputs, mask.numel())
            if self.device == "cuda":
                found = spmm_on_cuda(*shape, x.element_size(), transposed)
            else:
                found = spmm_on_cpu(*shape, transposed)
            self._keep_for(mask, f"csr {transposed}", found.kept)
            most = max(most, found)
        return most

    def _softmax(self, x, *_: Any, **__: Any) -> Bytes:
        return Bytes(0) if self.device == "cuda" else safe_softmax_on_cpu(x.numel(), x.shape[-1])

    def _mix(self, *_: Any, **__: Any) -> Bytes:
        self.live = None  # an attention's product: from here on every position has a gradient
        return Bytes(0)

    def _attention(self, grad, query, *_: Any, **__: Any) -> Bytes:
        self.live = None
        if self.device == "cpu":
            return Bytes(0)
        batch, heads, tokens, width = query.shape
        return attention_backward_on_cuda(batch, heads, tokens, width)

    # gloo (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp) gathers into a buffer of its own and
    # copies it out, and makes an all-reduce of a copy of what it scatters; NCCL works in place.

    def _gather(self, output: Tensor, *_: Any, **__: Any) -> Bytes:
        return Bytes(0 if self.device == "cuda" else output.numel() * output.element_size())

    def _scatter(self, output: Tensor, input: Tensor, *_: Any, **__: Any) -> Bytes:
        return Bytes(0 if self.device == "cuda" else input.numel() * input.element_size())
