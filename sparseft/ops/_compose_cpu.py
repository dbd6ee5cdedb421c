"""Composition by the rule "sum" on a CPU: capture, add up and write in blocks that stay in cache.

The definition (`combine`, `write_sum_`) makes whole passes: total, base, sum, addresses. Here a
block of `BLOCK` union entries is captured, summed and written before the next is touched, so that
a weight's cache lines cross the memory bus once and no temporary does. The bits are the same:
products and sums are rounded one by one in the order of the shares, starting at -0.0.

XLM-R base shapes in fp32 (197 tensors, 277 M weights), 7.66 M entries per adapter (2.76 %), one
thread of an AMD EPYC with AVX-512 (family 26, 1 MiB of L2 a core), medians of nine on a machine
with other work, milliseconds; beside it ``param += coo`` per adapter, then ``-=``:

========  =======  =====  ============  =======  ==================
adapters  entries  apply  apply, kept   restore  coo, there and back
========  =======  =====  ============  =======  ==================
2         15.1 M   133    102           49       661
8         55.7 M   284    145           74       2729
========  =======  =====  ============  =======  ==================

"Kept" finds the totals of the same coefficients still in the layout; all with ``out``, without it 2
adapters take 20 ms longer and 8 take 100. Blocks of 4 Ki entries cost half as much again (Python),
16 Ki to 256 Ki differ by a tenth for 2 adapters, and for 8 the larger win (32 Ki 361, 64 Ki 313,
256 Ki 233). In L2, an entry: int64 ``index_select`` 0.4 ns, ``scatter_`` 0.5, ``scatter_add_`` 0.6,
``index_add_`` 0.9, ``index_copy_`` 1.3, ``put_`` 1.5, ``index_put_`` 2.0; boolean masks 9 and more.
Two Python threads gained nothing: a call lasts tens of microseconds.

Memory: nothing per entry beside the union's indices, the adapters' values and positions; with
``keep`` 4 bytes per union entry; about 4 MiB of scratch a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparseft.ops._common import accumulation_dtype, bits
from sparseft.ops.apply_diff import gather_entries, write_entries_, write_sum_
from sparseft.ops.combine import Rule, Term, combine

__all__ = ["BLOCK", "CpuLayout", "apply", "restore", "rewrite", "suits"]

# Union entries at a time. Each touches a cache line of the weight at most.
BLOCK = 1 << 17

_SUM = Rule("sum")


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}


_SCRATCH = _Scratch()


@dataclass
class CpuLayout:
    """The shares of some adapters in one tensor, cut into blocks of the union; made by `of`.

    Attributes:
        indices: (size,) union of the entries, ascending.
        shares: per adapter, in canonical order, (values, positions or None).
        cuts: per share, where in it each block begins and the last one ends; None: as the union.
        peaks: per share, its largest magnitude; NaN or inf where a value is.
        keep: whether totals are kept for the next time.
        kept: coefficients and the (size,) totals of them, if any are.
    """

    indices: Tensor
    shares: tuple[tuple[Tensor, Tensor | None], ...]
    cuts: tuple[list[int] | None, ...]
    peaks: tuple[float, ...]
    keep: bool = False
    kept: tuple[tuple[float, ...], Tensor] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        indices: Tensor,
        shares: Sequence[tuple[Tensor, Tensor | None]],
        *,
        keep: bool = False,
    ) -> CpuLayout:
        """Cut the shares into blocks.

        Args:
            indices: (size,) int32 or int64 on the CPU, ascending, unique.
            shares: per adapter, in canonical order, (nnz,) floating values of mode "add" and (nnz,)
                int32 or int64 positions in the union, ascending and unique; None: all of it.
            keep: hold on to the totals of the last coefficients, 4 bytes per union entry: applying
                them again adds nothing up.
        """
        starts = torch.arange(0, indices.numel() + BLOCK, BLOCK).clamp_(max=indices.numel())
        own = tuple((values.detach(), positions) for values, positions in shares)
        return cls(
            indices,
            own,
            tuple(
                None if at is None else torch.searchsorted(at, starts.to(at.dtype)).tolist()
                for _, at in own
            ),
            tuple(_peak(values) for values, _ in own),
            keep,
        )

    def dtype(self, coeffs: Sequence[float]) -> torch.dtype:
        """Return what totals are added up in: of the shares that take part, as in `combine`."""
        used = (v.dtype for c, (v, _) in zip(coeffs, self.shares, strict=True) if c)
        return accumulation_dtype(*used)

    def surely_finite(self, coeffs: Sequence[float]) -> bool:
        """Tell whether no total can overflow; if not, look at them: ``isfinite(...).all()`` costs
        1.6 ns an entry, more than adding up.
        """
        most = torch.finfo(self.dtype(coeffs)).max / 2  # half of it: roundings are upward too
        sizes = [(abs(c), peak) for c, peak in zip(coeffs, self.peaks, strict=True) if c]
        return all(c < most for c, _ in sizes) and sum(c * peak for c, peak in sizes) < most

    def total(self, coeffs: Sequence[float]) -> Tensor | None:
        """Return the (size,) totals if they are kept."""
        if self.kept is not None and self.kept[0] == tuple(coeffs):
            return self.kept[1]
        return None


def suits(weight: Tensor, rule: object) -> bool:
    """Tell whether the fast path is for this weight and rule; shares must be of mode "add"."""
    return (
        rule == _SUM
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.is_floating_point()
    )


def apply(
    weight: Tensor,
    layout: CpuLayout,
    coeffs: Sequence[float],
    *,
    out: Tensor | None = None,
    done: list[int] | None = None,
) -> Tensor:
    """Write ``rn(weight[idx] + sum_i coeff_i * value_i)`` and return what it overwrote.

    Args:
        weight: any shape, floating, on the CPU; changed in place. Not contiguous: it goes through
            the definition.
        layout: of its union.
        coeffs: one per share; those with 0 are left out. All 0: nothing is written.
        out: (size,) in the weight's dtype, to hold the saved entries; None: new. Memory that was
            used before spares the page faults of new memory, a fifth of the time.
        done: its one number becomes that of the entries captured so far, before any of them is
            written: whoever gives it restores those after an exception. None: done here.

    Returns:
        (size,) saved entries in the weight's dtype, for `restore` and `rewrite`.

    An exception in the middle (Ctrl-C) leaves the weight as it was, unless ``done`` is given.
    """
    weight = weight.detach()
    if not weight.is_contiguous():
        saved = gather_entries(weight, layout.indices, backend="reference")
        saved = saved if out is None else out.copy_(saved)
        if done is not None:
            done[0] = saved.numel()
        rewrite(weight, layout, saved, coeffs)
        return saved
    saved = weight.new_empty(layout.indices.shape) if out is None else out
    captured = [0] if done is None else done
    try:
        _write(weight, layout, saved, coeffs, captured)
    except BaseException:
        if done is None:
            restore(weight, layout.indices[: captured[0]], saved[: captured[0]])
        raise
    return saved


def rewrite(weight: Tensor, layout: CpuLayout, saved: Tensor, coeffs: Sequence[float]) -> None:
    """Write ``rn(saved + sum_i coeff_i * value_i)``: other coefficients on the same saved entries.

    Arguments as in `apply`; coefficients that are all 0 put the saved entries back.
    """
    weight = weight.detach()
    if not any(coeffs):
        restore(weight, layout.indices, saved)
    elif weight.is_contiguous():
        _write(weight, layout, saved, coeffs, None)
    else:
        terms = [
            Term(c, values, at) for c, (values, at) in zip(coeffs, layout.shares, strict=True) if c
        ]
        total = combine(terms, layout.indices.numel(), _SUM)
        write_sum_(weight, layout.indices, saved, total, backend="reference")


def restore(weight: Tensor, indices: Tensor, saved: Tensor) -> None:
    """Write the saved entries back, bit for bit."""
    weight = weight.detach()
    if not weight.is_contiguous():
        return write_entries_(weight, indices, saved, backend="reference")
    flat, moved = bits(weight).view(-1), bits(saved)
    wide = _scratch("address", torch.int64)
    for begin in range(0, indices.numel(), BLOCK):
        address = _address(indices[begin : begin + BLOCK], wide)
        flat.scatter_(0, address, moved[begin : begin + BLOCK])


def _write(
    weight: Tensor,
    layout: CpuLayout,
    saved: Tensor,
    coeffs: Sequence[float],
    done: list[int] | None,
) -> None:
    """Write all blocks; with ``done``, capture each before, and count the entries captured."""
    flat, held, size = bits(weight).view(-1), bits(saved), layout.indices.numel()
    dtype, kept, keeping = layout.dtype(coeffs), layout.total(coeffs), None
    if kept is None and layout.keep and any(coeffs):
        layout.kept = None  # before as much again is allocated
        keeping = torch.empty(size, dtype=dtype)
    wide = _scratch("address", torch.int64)
    result = _scratch("result", weight.dtype)
    for number, begin in enumerate(range(0, size, BLOCK)):
        block = slice(begin, min(begin + BLOCK, size))
        address = _address(layout.indices[block], wide)
        if done is not None:
            torch.index_select(flat, 0, address, out=held[block])
            done[0] = block.stop
            if not any(coeffs):
                continue
        if kept is not None:
            total = kept[block]
        elif keeping is not None:
            total = keeping[block]
            _add_up(total, layout, coeffs, number, begin)
        else:
            total = _scratch("total", dtype)[: address.numel()]
            _add_up(total, layout, coeffs, number, begin)
        written = result[: address.numel()]
        # One addition in the wider dtype of the two, one rounding to the weight's.
        torch.add(saved[block], total, out=written)
        flat.scatter_(0, address, bits(written))
    if keeping is not None:
        layout.kept = (tuple(coeffs), keeping)


def _add_up(
    total: Tensor, layout: CpuLayout, coeffs: Sequence[float], number: int, begin: int
) -> None:
    """Fill one block of totals, as `combine` does."""
    total.fill_(-0.0)
    local = _scratch("local", torch.int64)
    weighted = _scratch("weighted", total.dtype)
    for coeff, (values, positions), cuts in zip(coeffs, layout.shares, layout.cuts, strict=True):
        if not coeff:
            continue
        if positions is None or cuts is None:
            own = values[begin : begin + total.numel()]
        else:
            own = values[cuts[number] : cuts[number + 1]]
        if own.dtype != total.dtype:
            own = weighted[: own.numel()].copy_(own)
        if coeff != 1:
            own = torch.mul(own, coeff, out=weighted[: own.numel()])
        if positions is None or cuts is None:
            total += own
        else:  # unique within a share, so this is one addition per entry
            at = local[: own.numel()]
            torch.sub(positions[cuts[number] : cuts[number + 1]], begin, out=at)
            total.scatter_add_(0, at, own)


def _address(indices: Tensor, wide: Tensor) -> Tensor:
    """Return int64 addresses, those of int32 indices in ``wide``."""
    return indices if indices.dtype == torch.int64 else wide[: indices.numel()].copy_(indices)


def _peak(values: Tensor) -> float:
    if not values.numel():
        return 0.0
    least, most = torch.aminmax(values)
    return float(torch.maximum(least.abs(), most.abs()))


def _scratch(role: str, dtype: torch.dtype) -> Tensor:
    """Return this thread's BLOCK elements for one role: a fresh buffer is page-faulted in anew
    every call.
    """
    key = (role, dtype)
    buffer = _SCRATCH.held.get(key)
    if buffer is None or buffer.numel() < BLOCK:
        with torch.inference_mode(False):  # it is kept, and written to outside as well
            buffer = _SCRATCH.held[key] = torch.empty(BLOCK, dtype=dtype)
    return buffer
