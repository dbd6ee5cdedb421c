"""Exact top-k of |theta1 - theta0|, or of scores, over all tensors of a model: no concatenation, no
difference in memory, ties to the first by (tensor, flat index).

A key is the bits of the fp32 magnitude, whose integer order is the order of magnitudes. Tensors are
read in place through pointer tables, as spans: runs of blocks of one tensor, at most a few tens of
thousands in all, so that what is kept per span does not grow with the model.

1. A sample of 512 Ki keys guesses the k-th key and a floor a few standard deviations below it. It
   steers and never decides.
2. One full read counts, per span, keys from the floor up, above the guess, equal to the guess,
   and finds what cannot be ranked.
3. If the guess is the k-th key (it is wherever many entries tie with it, as differences of bf16
   weights do), one more full read writes the answer. Else, if at most 2 k + 256 Ki keys reach the
   floor, that read lists them, and a radix selection and steps 2 and 3 on the list finish.
4. Where neither holds, full reads with an exact 256-bin histogram narrow the k-th key, 8 bits each,
   until few enough keys are listed or, after the last bit, it is known exactly; then 2 and 3 again.

So there are 2 full reads, or at most 7, and the extra memory is at most 20 bytes per kept entry and
about 40 MiB, whatever the values are: a listed key takes 8 bytes, there are at most 2 k + 256 Ki,
and an index of the result takes 4. (32 bytes if a tensor has 2**31 entries: its indices take 8.)

The host waits once, for the counts of 2, which also say how many entries each tensor keeps, and
once more if there was a list; once per histogram of 4 and once for its counts.

All decisions are counts and comparisons of integers, so the bits are the same every time.

Roofline, not a measurement (nothing here was timed on a GPU): two reads of 8e9 bf16 pairs are 64
GB, 15 ms at the 4.3 TB/s of an H200's memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import TOPK
from sparseft_kernels._launch import device_guard, empty, triton_dtype

__all__ = ["Selected", "Unrankable", "launch_topk"]

INFINITY = tl.constexpr(0x7F80_0000)
LARGEST = tl.constexpr(0x7FFF_FFFF)
BINS = tl.constexpr(256)

_MOST_BLOCKS = 1023  # of a span: what a counter of 10 bits holds
_CHANGED = "top-k: a tensor changed while it was read; finish writing it first"
# Digits of the radix selection, most significant first: (lowest bit, bit above the highest).
_DIGITS = ((23, 31), (15, 23), (7, 15), (0, 7))
# Golden ratio in 32 bits: consecutive multiples spread evenly, so sampled places keep to no column.
_GOLDEN = 2_654_435_761


class Selected(NamedTuple):
    """What was selected.

    Args:
        indices: per tensor (nnz_t,) flat positions, ascending; int32 below 2**31 entries.
        zeros: how many of them have key 0.
    """

    indices: list[Tensor]
    zeros: int


class Unrankable(Exception):
    """A tensor holds NaN (or a negative score) in ``start:stop``, and no tensor before it does."""

    def __init__(self, tensor: int, start: int, stop: int) -> None:
        super().__init__(f"tensor {tensor} holds NaN or a negative score in {start}:{stop}")
        self.tensor, self.start, self.stop = tensor, start, stop


@triton.jit
def _key(x, y, DIFFERENCE: tl.constexpr, NONNEGATIVE: tl.constexpr):
    """Return the key of x - y, or of x; negative scores become a NaN's key."""
    if x.dtype == tl.int32:
        return x
    else:
        # widened right after the load: the interpreter would compute on bf16 bit patterns
        value = x.to(tl.float32)
        if DIFFERENCE:
            value = value - y.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        key = bits & LARGEST
        if NONNEGATIVE:
            key = tl.where((bits < 0) & (key != 0), LARGEST, key)
        return key


@triton.jit
def _block_keys(
    theta1, theta0, left, BLOCK: tl.constexpr, DIFFERENCE: tl.constexpr, NONNEGATIVE: tl.constexpr
):
    """Return the keys of the block that begins at ``theta1``, -1 from entry ``left`` on."""
    lane = tl.arange(0, BLOCK)  # [BLOCK], int32: 64-bit addresses are formed from a scalar base
    if left >= BLOCK:  # without a mask the loads are 16 bytes wide
        x = tl.load(theta1 + lane)
        y = tl.load(theta0 + lane) if DIFFERENCE else x
        key = _key(x, y, DIFFERENCE, NONNEGATIVE)
    else:
        in_bounds = lane < left
        x = tl.load(theta1 + lane, mask=in_bounds, other=0)
        y = tl.load(theta0 + lane, mask=in_bounds, other=0) if DIFFERENCE else x
        key = tl.where(in_bounds, _key(x, y, DIFFERENCE, NONNEGATIVE), -1)
    return key


@triton.jit
def _open_span(
    theta1_ptr, theta0_ptr, numel_ptr, span_tensor_ptr, span_start_ptr, span_ids_ptr,
    BLOCK: tl.constexpr, DTYPE1: tl.constexpr, DTYPE0: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Return the program's span: its number, tensor, first entry, and the tensor's parts."""
    span = tl.load(span_ids_ptr + tl.program_id(0))
    tensor = tl.load(span_tensor_ptr + span)
    start = tl.multiple_of(tl.load(span_start_ptr + span), BLOCK)
    numel = tl.load(numel_ptr + tensor)
    theta1 = tl.multiple_of(tl.load(theta1_ptr + tensor).to(tl.pointer_type(DTYPE1)), ALIGN)
    theta0 = tl.multiple_of(tl.load(theta0_ptr + tensor).to(tl.pointer_type(DTYPE0)), ALIGN)
    return span, tensor, start, numel, theta1, theta0


@triton.jit(do_not_specialize=["kind", "lanes"])
def _sample_kernel(
    theta1_ptr, theta0_ptr, tensor_ptr, index_ptr, kind_ptr, keys_ptr, kind, lanes,
    BLOCK: tl.constexpr, DTYPE1: tl.constexpr, DTYPE0: tl.constexpr,
    DIFFERENCE: tl.constexpr, NONNEGATIVE: tl.constexpr,
):  # fmt: skip
    """keys[j] = key of entry index[j] of tensor[j], for tensors of one kind of dtypes."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_bounds = lane < lanes
    tensor = tl.load(tensor_ptr + lane, mask=in_bounds, other=0)
    mine = in_bounds & (tl.load(kind_ptr + tensor, mask=in_bounds, other=-1) == kind)
    offs = tl.load(index_ptr + lane, mask=mine, other=0)
    theta1 = tl.load(theta1_ptr + tensor, mask=mine, other=0).to(tl.pointer_type(DTYPE1))
    x = tl.load(theta1 + offs, mask=mine, other=0)
    if DIFFERENCE:
        theta0 = tl.load(theta0_ptr + tensor, mask=mine, other=0).to(tl.pointer_type(DTYPE0))
        y = tl.load(theta0 + offs, mask=mine, other=0)
    else:
        y = x
    tl.store(keys_ptr + lane, _key(x, y, DIFFERENCE, NONNEGATIVE), mask=mine)


@triton.jit(do_not_specialize=["spans", "blocks"])
def _count_kernel(
    theta1_ptr, theta0_ptr, numel_ptr, span_tensor_ptr, span_start_ptr, span_ids_ptr,
    bracket_ptr, counts_ptr, spans, blocks,
    BLOCK: tl.constexpr, DTYPE1: tl.constexpr, DTYPE0: tl.constexpr, ALIGN: tl.constexpr,
    DIFFERENCE: tl.constexpr, NONNEGATIVE: tl.constexpr,
):  # fmt: skip
    """counts[:, span] = keys >= floor, == guess, > guess, and the largest key, for
    bracket = [floor, guess].
    """
    span, tensor, start, numel, theta1, theta0 = _open_span(
        theta1_ptr, theta0_ptr, numel_ptr, span_tensor_ptr, span_start_ptr, span_ids_ptr,
        BLOCK, DTYPE1, DTYPE0, ALIGN,
    )  # fmt: skip
    floor = tl.load(bracket_ptr)
    guess = tl.load(bracket_ptr + 1)
    # Three counters of 10 bits in one register: each grows by at most 1 a block. Reduced once.
    packed = tl.zeros((BLOCK,), tl.int32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for block in range(blocks):
        first = start + block * BLOCK
        if first < numel:
            key = _block_keys(
                theta1 + first, theta0 + first, numel - first, BLOCK, DIFFERENCE, NONNEGATIVE
            )
            packed += (key >= floor).to(tl.int32)
            packed += (key == guess).to(tl.int32) << 10
            packed += (key > guess).to(tl.int32) << 20
            largest = tl.maximum(largest, key)
    tl.store(counts_ptr + span, tl.sum(packed & 0x3FF, 0))
    tl.store(counts_ptr + spans + span, tl.sum((packed >> 10) & 0x3FF, 0))
    tl.store(counts_ptr + 2 * spans + span, tl.sum(packed >> 20, 0))
    tl.store(counts_ptr + 3 * spans + span, tl.max(largest, 0))


@triton.jit(do_not_specialize=["blocks", "low", "high"])
def _histogram_kernel(
    theta1_ptr, theta0_ptr, numel_ptr, span_tensor_ptr, span_start_ptr, span_ids_ptr,
    state_ptr, histogram_ptr, blocks, low, high,
    BLOCK: tl.constexpr, DTYPE1: tl.constexpr, DTYPE0: tl.constexpr, ALIGN: tl.constexpr,
    DIFFERENCE: tl.constexpr, NONNEGATIVE: tl.constexpr,
):  # fmt: skip
    """histogram[d] += keys with digit d in bits low:high and the bits of state[0] above them."""
    span, tensor, start, numel, theta1, theta0 = _open_span(
        theta1_ptr, theta0_ptr, numel_ptr, span_tensor_ptr, span_start_ptr, span_ids_ptr,
        BLOCK, DTYPE1, DTYPE0, ALIGN,
    )  # fmt: skip
    prefix = tl.load(state_ptr).to(tl.int32) >> high
    digits = (1 << (high - low)) - 1
    counts = tl.zeros((BINS,), tl.int32)
    for block in range(blocks):
        first = start + block * BLOCK
        if first < numel:
            key = _block_keys(
                theta1 + first, theta0 + first, numel - first, BLOCK, DIFFERENCE, NONNEGATIVE
            )
            # -1 past the end stays -1 when shifted, and no prefix is
            counts += tl.histogram((key >> low) & digits, BINS, mask=(key >> high) == prefix)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["low"])
def _digit_kernel(histogram_ptr, state_ptr, low):
    """Move state = [prefix, entries still to find under it, keys under it] one digit down, and
    clear the histogram. One program.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + (BINS - 1 - bins))  # from the largest digit
    need = tl.load(state_ptr + 1)
    place = tl.sum((tl.cumsum(counts, 0) < need).to(tl.int64), 0)
    prefix = tl.load(state_ptr) | ((BINS - 1 - place) << low)
    above = tl.sum(tl.where(bins < place, counts, 0), 0)
    among = tl.sum(tl.where(bins == place, counts, 0), 0)
    tl.store(state_ptr, prefix)
    tl.store(state_ptr + 1, need - above)
    tl.store(state_ptr + 2, among)
    tl.store(histogram_ptr + bins, tl.zeros((BINS,), tl.int64))


@triton.jit(do_not_specialize=["blocks"])
def _collect_kernel(
    theta1_ptr, theta0_ptr, numel_ptr, span_tensor_ptr, span_start_ptr, span_ids_ptr,
    begin_ptr, listed_ptr, cut_ptr, above_ptr, above_end_ptr, tied_ptr, tied_end_ptr,
    indices_ptr, keys_ptr, blocks,
    BLOCK: tl.constexpr, DTYPE1: tl.constexpr, DTYPE0: tl.constexpr, ALIGN: tl.constexpr,
    DIFFERENCE: tl.constexpr, NONNEGATIVE: tl.constexpr,
    FROM_LIST: tl.constexpr, WITH_KEYS: tl.constexpr,
):  # fmt: skip
    """Write, tensor after tensor, the flat indices of keys above cut[0] and of the first cut[1]
    equal to it.

    `above` and `tied` are counts per span, `above_end` and `tied_end` their running sums. From a
    list the indices are what stands in the list beside the keys.
    """
    span, tensor, start, numel, theta1, theta0 = _open_span(
        theta1_ptr, theta0_ptr, numel_ptr, span_tensor_ptr, span_start_ptr, span_ids_ptr,
        BLOCK, DTYPE1, DTYPE0, ALIGN,
    )  # fmt: skip
    begin = tl.load(begin_ptr + tensor)
    threshold = tl.load(cut_ptr).to(tl.int32)
    room = tl.load(cut_ptr + 1)
    above = tl.load(above_ptr + span)
    tied = tl.load(tied_ptr + span)
    above_before = tl.load(above_end_ptr + span) - above
    tied_before = tl.load(tied_end_ptr + span) - tied
    # A span without an entry to keep is not read again: clustered changes leave many.
    wanted = above + tl.where(tied_before < room, tied, 0)
    lane = tl.arange(0, BLOCK)
    for block in range(blocks):
        first = start + block * BLOCK
        if (first < numel) & (wanted > 0):
            key = _block_keys(
                theta1 + first, theta0 + first, numel - first, BLOCK, DIFFERENCE, NONNEGATIVE
            )
            is_above = key > threshold
            is_tied = key == threshold
            # one scan for both ranks: neither passes BLOCK, which is under 2**15
            packed = is_above.to(tl.int32) + (is_tied.to(tl.int32) << 16)
            total = tl.sum(packed, 0)
            if total > 0:
                before = tl.cumsum(packed, 0) - packed
                rank = before >> 16  # among the block's ties
                left = tl.minimum(tl.maximum(room - tied_before, 0), BLOCK).to(tl.int32)
                keep = is_above | (is_tied & (rank < left))
                dst = (before & 0xFFFF) + tl.minimum(rank, left)
                out = above_before + tl.minimum(tied_before, room)
                if FROM_LIST:
                    index = tl.load(listed_ptr + begin + first + lane, mask=keep, other=0)
                else:
                    # narrowed before the sum: 64-bit only where a tensor passes 2**31
                    index = first.to(indices_ptr.dtype.element_ty) + lane
                tl.store(indices_ptr + out + dst, index, mask=keep)
                if WITH_KEYS:
                    tl.store(keys_ptr + out + dst, key, mask=keep)
                above_before += total & 0xFFFF
                tied_before += total >> 16


class _Kind(NamedTuple):
    """Spans whose tensors share dtypes and alignment: one launch."""

    number: int
    spans: Tensor
    types: dict[str, Any]  # compile-time arguments


class _Source(NamedTuple):
    """Tensors to read keys from, as the kernels see them: int64 tables on the tensors' device."""

    total: int
    numels: list[int]
    theta1: Tensor
    theta0: Tensor
    numel: Tensor
    begin: Tensor  # place of each tensor's first entry among all entries
    kind: Tensor
    span_end: Tensor  # number of spans up to and with each tensor
    span_tensor: Tensor
    span_start: Tensor
    kinds: list[_Kind]
    blocks: int  # of a span


def _source(
    theta1: Sequence[Tensor], theta0: Sequence[Tensor] | None, nonnegative: bool = False
) -> _Source:
    """Build the tables of contiguous tensors on one device; one upload, not waited for."""
    block, most_spans = TOPK.block, TOPK.spans
    device = theta1[0].device
    others = theta1 if theta0 is None else theta0
    numel = torch.tensor([t.numel() for t in theta1])
    ends = numel.cumsum(0)
    total = int(ends[-1])
    blocks = min(max(1, -(-total // (block * most_spans))), _MOST_BLOCKS)
    spans = -(-numel // (block * blocks))
    span_tensor = torch.repeat_interleave(torch.arange(len(theta1)), spans)
    span_start = torch.arange(len(span_tensor)) - (spans.cumsum(0) - spans)[span_tensor]
    span_start *= block * blocks
    types: dict[tuple[Any, ...], int] = {}
    kind = torch.tensor(
        [
            types.setdefault((x.dtype, y.dtype, _aligned(x) and _aligned(y)), len(types))
            for x, y in zip(theta1, others, strict=True)
        ]
    )
    ids = [(kind[span_tensor] == number).nonzero().view(-1) for number in range(len(types))]
    columns = [
        torch.tensor([t.data_ptr() for t in theta1]),
        torch.tensor([t.data_ptr() for t in others]),
        numel, ends - numel, kind, spans.cumsum(0), span_tensor, span_start, *ids,
    ]  # fmt: skip
    table = torch.cat(columns)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    parts = table.split([len(c) for c in columns])
    kinds = [
        _Kind(
            number,
            parts[8 + number],
            {
                "DTYPE1": _TYPE.get(x) or triton_dtype(x),
                "DTYPE0": _TYPE.get(y) or triton_dtype(y),
                "DIFFERENCE": theta0 is not None,
                "NONNEGATIVE": nonnegative,
                "aligned": aligned,
            },
        )
        for (x, y, aligned), number in types.items()
    ]
    return _Source(total, numel.tolist(), *parts[:8], kinds, blocks)


_TYPE = {torch.int32: tl.int32}  # the list's keys


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0


def _read(kernel: Any, source: _Source, *args: Any, **meta: Any) -> None:
    """Launch a kernel over all spans, once per kind of tensors."""
    with device_guard(source.numel.device):
        for kind in source.kinds:
            types = dict(kind.types)
            align = 16 if types.pop("aligned") else 1
            if kind.spans.numel():
                kernel[(kind.spans.numel(),)](
                    source.theta1, source.theta0, source.numel, source.span_tensor,
                    source.span_start, kind.spans, *args,
                    BLOCK=TOPK.block, ALIGN=align, num_warps=TOPK.num_warps, num_stages=1,
                    enable_fp_fusion=False, **types, **meta,
                )  # fmt: skip


def _bracket(source: _Source, k: int) -> Tensor:
    """Return int32 [floor, guess] on the device: the k-th key by a sample, and a key that it is
    hardly ever below.
    """
    device, total = source.numel.device, source.total
    if k in (0, total):
        # nothing, or everything: entries with key 0 are still to be told from the others
        return torch.full((2,), INFINITY.value if k == 0 else 0, dtype=torch.int32, device=device)
    step = -(-total // TOPK.sample)
    lanes = total // step
    lane = torch.arange(lanes, device=device)
    position = lane * step + (((lane * _GOLDEN) & 0xFFFF_FFFF) * step >> 32)
    tensor = torch.searchsorted(source.begin + source.numel, position, right=True)
    index = position - source.begin[tensor]
    keys = empty(lanes, lane, torch.int32)
    with device_guard(device):
        for kind in source.kinds:
            types = {n: v for n, v in kind.types.items() if n != "aligned"}
            _sample_kernel[(triton.cdiv(lanes, TOPK.block),)](
                source.theta1, source.theta0, tensor, index, source.kind, keys, kind.number, lanes,
                BLOCK=TOPK.block, num_warps=TOPK.num_warps, num_stages=1,
                enable_fp_fusion=False, **types,
            )  # fmt: skip
    del lane, position, tensor, index  # 16 MiB, before the sort takes as much
    ranked = keys.sort(descending=True).values
    rank = max(1, k * lanes // total)
    # The rank of the k-th key among independent samples has a standard deviation of sqrt(rank).
    margin = 0 if step == 1 else 4 * math.isqrt(rank) + 4
    floor = ranked[rank + margin - 1] if rank + margin <= lanes else torch.zeros_like(ranked[0])
    return torch.stack([floor, ranked[rank - 1]])


class _Counts(NamedTuple):
    """What one full read found. Rows: keys at least the floor, equal to the guess, above it."""

    spans: Tensor  # int32 (3, spans)
    running: Tensor  # int64 (3, spans): sums up to and with each span
    tensors: list[list[int]]  # 3 rows of sums up to and with each tensor
    floor: int
    guess: int


def _count(source: _Source, bracket: Tensor) -> _Counts:
    """Count keys against a bracket. Waits for the device.

    Raises:
        Unrankable: some key is a NaN's.
    """
    width, many = source.span_tensor.numel(), source.numel.numel()
    table = empty(4 * width, bracket).view(4, width)
    _read(_count_kernel, source, bracket, table, width, source.blocks)
    running = table[:3].cumsum(1)
    sums = torch.nn.functional.pad(running, (1, 0))[:, source.span_end]
    largest = table[3].max().view(1)
    *flat, most, floor, guess = torch.cat([sums.view(-1), largest, bracket]).tolist()
    if most > INFINITY.value:
        span = int((table[3] > INFINITY.value).to(torch.uint8).argmax())
        tensor, start = int(source.span_tensor[span]), int(source.span_start[span])
        stop = min(start + TOPK.block * source.blocks, source.numels[tensor])
        raise Unrankable(tensor, start, stop)
    rows = [flat[i : i + many] for i in range(0, 3 * many, many)]
    return _Counts(table[:3], running, rows, floor, guess)


def _radix(source: _Source, k: int, limit: int | None = None) -> Tensor:
    """Return int32 [key]: the k-th largest.

    Without a limit nothing is waited for. With one the search waits for each digit, and ends with
    the lower bits 0 as soon as at most ``limit`` keys are that large.
    """
    state = torch.zeros(3, dtype=torch.int64, device=source.numel.device)
    state[1] = k
    histogram = torch.zeros(BINS.value, dtype=torch.int64, device=state.device)
    for low, high in _DIGITS:
        _read(_histogram_kernel, source, state, histogram, source.blocks, low, high)
        with device_guard(state.device):
            _digit_kernel[(1,)](histogram, state, low, num_warps=4)
        if limit is not None:
            _, need, among = state.tolist()
            if k - need + among <= limit:
                break
    return state[:1].to(torch.int32)


def _collect(
    source: _Source,
    counts: _Counts,
    threshold: int,
    room: int,
    above: int,
    size: int,
    *,
    listed: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Return (size,) flat indices, tensor after tensor, of keys above the threshold (counted in
    row ``above``) and of the first ``room`` equal to it (row 1); ``keys`` receives their keys.
    """
    wide = max(source.numels) >= 2**31 if listed is None else listed.dtype == torch.int64
    indices = empty(size, source.numel, torch.int64 if wide else torch.int32)
    cut = empty(2, source.numel)
    cut[0], cut[1] = threshold, room  # fills, which nothing waits for
    _read(
        _collect_kernel, source,
        source.begin, indices if listed is None else listed, cut,
        counts.spans[above], counts.running[above], counts.spans[1], counts.running[1],
        indices, indices if keys is None else keys, source.blocks,
        FROM_LIST=listed is not None, WITH_KEYS=keys is not None,
    )  # fmt: skip
    return indices


def _finish(
    source: _Source, k: int, counts: _Counts, listed: Tensor | None = None
) -> tuple[list[Tensor], int] | None:
    """Return the indices of the best k by tensor, and how many of their keys are 0; None if the
    counts do not tell which they are.
    """
    floors, ties, aboves = counts.tensors
    if aboves[-1] < k <= aboves[-1] + ties[-1]:
        threshold, room, row = counts.guess, k - aboves[-1], 2
        ends = [a + min(t, room) for a, t in zip(aboves, ties, strict=True)]
        zeros = room if threshold == 0 else 0
    elif floors[-1] == k:
        # All from the floor up, so all above the key below it. A floor of 0 is that of k = total,
        # whose guess is 0 too.
        threshold, room, row, ends = counts.floor - 1, 0, 0, floors
        zeros = ties[-1] if counts.floor == 0 else 0
    else:
        return None
    indices = _collect(source, counts, threshold, room, row, k, listed=listed)
    return [indices[a:b] for a, b in zip([0, *ends], ends, strict=False)], zeros


def _from_list(source: _Source, k: int, counts: _Counts) -> tuple[list[Tensor], int]:
    """List all keys from the floor up, by tensor, and choose the best k of them."""
    ends = counts.tensors[0]
    keys = empty(ends[-1], counts.spans)
    listed = _collect(source, counts, counts.floor - 1, 0, 0, ends[-1], keys=keys)
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    short = _source(keys.split(sizes), None)
    found = _finish(short, k, _count(short, _radix(short, k).repeat(2)), listed)
    if found is None:
        raise RuntimeError(_CHANGED)
    return found


def _choose(source: _Source, k: int) -> tuple[list[Tensor], int]:
    limit = 2 * k + TOPK.spare
    counts = _count(source, _bracket(source, k))
    if k == 0:
        return [empty(0, source.numel)] * len(source.numels), 0
    found = _settle(source, k, counts, limit)
    if found is None:
        # Now few enough keys reach the floor, or the floor is the k-th key.
        counts = _count(source, _radix(source, k, limit).repeat(2))
        found = _settle(source, k, counts, limit)
    if found is None:
        raise RuntimeError(_CHANGED)
    return found


def _settle(
    source: _Source, k: int, counts: _Counts, limit: int
) -> tuple[list[Tensor], int] | None:
    found = _finish(source, k, counts)
    if found is None and k < counts.tensors[0][-1] <= limit:
        return _from_list(source, k, counts)
    return found


def launch_topk(
    theta1: Sequence[Tensor],
    theta0: Sequence[Tensor] | None,
    k: int,
    *,
    nonnegative: bool = False,
) -> Selected:
    """Return the k entries with the largest ``|theta1 - theta0|``, or ``|theta1|``, over all
    tensors; ties to the first by (order of tensors, flat index).

    Args:
        theta1: contiguous fp32, bf16 or fp16 tensors of any shape, dtypes mixed, on one device.
        theta0: as many, of the same numbers of entries, there too; None: rank ``theta1`` itself.
        k: 0 to the number of entries.
        nonnegative: take negative entries of ``theta1`` for errors, not for magnitudes.

    Raises:
        Unrankable: a NaN (also inf - inf), or a negative score if ``nonnegative``.

    Differences are taken in fp32, with subnormals kept: the keys are torch's, bit for bit.
    """
    if any(t.numel() for t in theta1):
        found, zeros = _choose(_source(theta1, theta0, nonnegative), k)
    else:
        found, zeros = [empty(0, t, torch.int32) for t in theta1], 0
    # Copies: views would keep the indices of all tensors alive as long as those of any.
    widths = [torch.int32 if t.numel() < 2**31 else torch.int64 for t in theta1]
    return Selected([i.to(w, copy=True) for i, w in zip(found, widths, strict=True)], zeros)
