"""Stacked weights of experts: a gradient at the mask alone, for each way in which MoE layers read.

A parameter (experts, a, b) holds one matrix per expert. Stock autograd makes a dense gradient of
the whole stack for each read of a matrix of it. While its module's forward runs, the parameter
reads as a `StackedWeight`, which stands in for the products that such layers form:

- of one expert, ``F.linear(x, W[e])`` and ``x @ W[e]``: the fused backward of a layer;
- of rows sorted by expert, ``F.grouped_mm(x, W, offs=...)``, of as many rows for each,
  ``torch.bmm(x, W)``, and of a matrix per row, ``torch.bmm(W[ids], x)``: `_ExpertsAtMask`.

Anything else sees the alias of the generic tier, one for all reads of a forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sparseft.diff import SparsePattern
from sparseft.modules.expert_products import _ExpertsAtMask, entries_of, under_fake_tensors
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.taps import (
    _autocast_input,
    alias_at_mask,
    conv1d_at_mask,
    linear_at_mask,
)

__all__ = ["FusedExperts", "StackedWeight", "is_stacked", "read_in_forward"]


class _Running(threading.local):
    """Forwards that run in this thread: id of the module -> attribute -> its `StackedWeight`."""

    def __init__(self) -> None:
        self.reads: dict[int, dict[str, Tensor]] = {}


_running = _Running()


def is_stacked(module: nn.Module, weight: Tensor | SparsePattern) -> bool:
    """Whether a module's weight (or the mask of it) looks like a matrix for each of some experts.

    Args:
        module: one that holds it. Torch's own layers with three dimensions are convolutions and
            bilinear forms.
        weight: of any shape.
    """
    torchs = type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.Conv1d)
    return not torchs and len(weight.shape) == 3 and min(weight.shape) > 1


class _OfExpert(NamedTuple):
    """One expert's part of a mask, as the fused layers take a `MaskedParameter`."""

    name: str
    leaf: Tensor
    pattern: Any
    backend: str | None


class _Where(NamedTuple):
    indices: Tensor


class _Read:
    """What the reads of one stacked weight share during one forward.

    Args:
        weight: (experts, a, b), the parameter.
        masked: its mask.
    """

    def __init__(self, weight: Tensor, masked: MaskedParameter) -> None:
        self.weight, self.masked = weight.detach(), masked
        self._pieces: tuple[Tensor, ...] | None = None

    def expert(self, number: int) -> _OfExpert:
        """Return one expert's mask; its leaf is a piece of the leaf, split once for all of them."""
        counts, local = entries_of(self.masked)
        if self._pieces is None:
            self._pieces = self.masked.leaf.split(counts)
        masked = self.masked
        where = _Where(local[number])
        return _OfExpert(masked.name, self._pieces[number], where, masked.backend)


class StackedWeight(Tensor):
    """A stacked weight as its module reads it in forward: the alias of the generic tier, which
    notices the products that have a fused backward.

    Selecting an expert (or one per row) and swapping the last two dimensions give another one.

    Attributes:
        read: what the reads of this forward share.
        chosen: None for the whole stack; one expert; or (rows,) experts.
        swapped: whether the last two dimensions are.
        made_at: `_versions` of it and ``chosen``; after in-place operations it is the alias alone.
    """

    read: _Read
    chosen: int | Tensor | None
    swapped: bool
    made_at: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            if handler is not None and torch.is_grad_enabled() and _takes(handler, args, kwargs):
                result = handler(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*args, **kwargs)


class _FakeStackedWeight(FakeTensor):
    """The same where tensors have shapes and no memory (`sparseft.profiling`)."""

    __torch_function__ = StackedWeight.__dict__["__torch_function__"]


def _stacked(
    alias: Tensor, read: _Read, chosen: int | Tensor | None = None, swapped: bool = False
) -> Any:
    """Return ``alias`` as a `StackedWeight`; itself where it is another kind of tensor already."""
    if type(alias) is Tensor:
        alias = alias.as_subclass(StackedWeight)
    elif type(alias) in (FakeTensor, _FakeStackedWeight):
        alias.__class__ = _FakeStackedWeight
    else:
        return alias  # of many devices, say: the generic tier
    found: Any = alias
    found.read, found.chosen, found.swapped = read, chosen, swapped
    found.made_at = _versions(alias, chosen)
    return found


def read_in_forward(
    module: nn.Module, attr: str, weight: Tensor, masked: MaskedParameter
) -> Tensor | None:
    """Return the `StackedWeight` of a masked attribute, one for all of a forward.

    None for other weights, outside of the module's forward, and where it would not do: under
    ``torch.compile``, in a CUDA graph (rows are counted on the host).
    """
    reads = _running.reads.get(id(module))
    if reads is None or not is_stacked(module, masked.pattern):
        return None
    if attr not in reads:
        reads[attr] = _stacked(alias_at_mask(weight, masked), _Read(weight, masked))
    return reads[attr]


class FusedExperts(nn.Module):
    """In front of a module that has stacked weights: says while its forward runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        ):
            return super().forward(*args, **kwargs)
        reads, key = _running.reads, id(self)
        outer = reads.get(key)
        reads[key] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            if outer is None:
                del reads[key]
            else:
                reads[key] = outer


# What stands in for which function. Arguments as those take them; NotImplemented: the alias's turn.


def _takes(handler: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a handler has parameters for a call: not for ``out=``, say."""
    count, names = handler.__code__.co_argcount, handler.__code__.co_varnames
    return len(args) <= count and all(name in names[len(args) : count] for name in kwargs)


def _is_read(w: Any) -> bool:
    mine = isinstance(w, StackedWeight | _FakeStackedWeight)
    return mine and w.made_at == _versions(w, w.chosen)


def _versions(*tensors: Any) -> int:
    """Return a number that in-place operations on any of these raise."""
    return sum(t._version for t in tensors if isinstance(t, Tensor))


def _watched(w: Any, hook: Any = None) -> Any:
    w.made_at = -1  # it wants the dense gradient
    return NotImplemented


def _getitem(w: Any, index: Any) -> Any:
    if not _is_read(w) or w.chosen is not None or w.swapped:
        return NotImplemented
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32):
            return NotImplemented
        if index.ndim == 1:
            return _stacked(Tensor.__getitem__(w, index), w.read, index)
        if index.ndim:
            return NotImplemented
        index = 0 if under_fake_tensors() else int(index)
    if type(index) is not int:
        return NotImplemented
    return _stacked(w.select(0, index), w.read, index % w.shape[0])


def _swap(w: Any, dim0: int = -2, dim1: int = -1) -> Any:
    if not _is_read(w) or {dim0 % w.ndim, dim1 % w.ndim} != {w.ndim - 2, w.ndim - 1}:
        return NotImplemented
    return _stacked(w.transpose(-2, -1), w.read, w.chosen, not w.swapped)


def _transposed(w: Any) -> Any:
    return _swap(w) if w.ndim == 2 else NotImplemented


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    w = weight
    if not _is_read(w) or type(w.chosen) is not int:
        return NotImplemented
    layer = conv1d_at_mask if w.swapped else linear_at_mask
    if w.swapped and bias is not None:
        return NotImplemented
    masked: Any = w.read.expert(w.chosen)
    return layer(input, w.read.weight[w.chosen], bias, masked)


def _matmul(input: Any, other: Any) -> Any:
    w = other
    if _is_read(w) and type(w.chosen) is int:
        layer = linear_at_mask if w.swapped else conv1d_at_mask
        masked: Any = w.read.expert(w.chosen)
        return layer(input, w.read.weight[w.chosen], None, masked)
    return _bmm(input, w)


def _mm(input: Any, mat2: Any) -> Any:
    return _matmul(input, mat2)


def _right_matmul(w: Any, x: Any) -> Any:
    return _matmul(x, w)


def _bmm(input: Any, mat2: Any) -> Any:
    a, b = input, mat2
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0]:  # matmul broadcasts
        return NotImplemented
    if _is_read(b) and b.chosen is None:
        return _apply(a, b, None, "blocks", not b.swapped)
    if _is_read(b) and isinstance(b.chosen, Tensor) and a.shape[1] == 1:
        return _apply(a.squeeze(1), b, b.chosen, "pairs", not b.swapped).flatten(1).unsqueeze(1)
    if _is_read(a) and isinstance(a.chosen, Tensor) and b.shape[2] == 1:
        return _apply(b.squeeze(-1), a, a.chosen, "pairs", a.swapped).flatten(1).unsqueeze(-1)
    return NotImplemented


def _grouped_mm(x: Any, w: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    fits = _is_read(w) and w.chosen is None and x.ndim == 2 and offs is not None
    if not fits or bias is not None or out_dtype is not None:
        return NotImplemented
    return _apply(x, w, offs, "groups", not w.swapped)


def _apply(x: Tensor, w: StackedWeight, whose: Tensor | None, how: str, transposed: bool) -> Any:
    gathered = None
    if how != "groups":  # which autocast leaves alone
        x = _autocast_input(x)
    if how == "pairs":
        gathered = w.detach()
        if w.swapped:
            gathered = gathered.transpose(-2, -1)
        gathered = gathered.to(x.dtype)
    read = w.read
    masked = read.masked
    return _ExpertsAtMask.apply(
        x, read.weight, masked.leaf, whose, gathered, how, transposed, masked
    )


_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    torch.transpose: _swap,
    Tensor.transpose: _swap,
    Tensor.t: _transposed,
    Tensor.T.__get__: _transposed,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _swap,  # type: ignore[attr-defined]
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _right_matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch._grouped_mm: _grouped_mm,  # what F.grouped_mm is
    Tensor.register_hook: _watched,
    Tensor.retain_grad: _watched,
}
