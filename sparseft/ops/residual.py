"""What a low-rank part leaves of a matrix: the difference it is taken of, and its pruned rest.

Definitions, per matrix, with ``wide`` the widest dtype among the operands, at least fp32::

    difference_         out = round(wide(theta1) - wide(theta0))
    prune_residual_     low = left @ right;  rest = |delta - low|
                        delta[i] stays at the `keep` largest of rest, ties to the lowest flat index;
                        elsewhere delta[i] = low[i]

The rest is never stored: it is recomputed, a block of rows at a time, once to find the keep-th
largest and once to write. Keys are the bits of the float, whose integer order is the order of
magnitudes. On CPUs a sample of rows brackets the keep-th key; the first pass counts the keys above
the bracket and lists those inside it, so that what is kept is a few percent of a matrix; where the
sample misled (it steers and never decides), the pass runs again without it. On GPUs Triton kernels
find it by histograms (sparseft_kernels/residual.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sparseft.errors import DecompositionError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._svd_problem import full_precision

__all__ = ["difference_", "difference_reference", "prune_residual_", "prune_residual_reference"]

# Entries of a block: with its low-rank part and its keys 3 MiB in fp32, which a core's L2 holds.
_BLOCK = 1 << 18
# One row in so many is sampled, at least so many rows.
_SAMPLED, _LEAST_ROWS = 16, 16

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ---- definitions


def difference_reference(theta1: Tensor, theta0: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The definition of `difference_`, in new memory."""
    wide = _wide(dtype, theta1, theta0)
    out = theta1.to(wide)
    return (out if theta0 is None else out - theta0.to(wide)).to(dtype)


def prune_residual_reference(
    delta: Tensor, left: Tensor, right: Tensor, keep: int | Sequence[int]
) -> Tensor:
    """The definition of `prune_residual_`, by sorting, in new memory."""
    out = left.to(delta.dtype) @ right.to(delta.dtype)
    for i, k in enumerate(_counts(delta, keep)):
        rest = (delta[i] - out[i]).abs().flatten()
        chosen = torch.argsort(rest, descending=True, stable=True)[:k]
        out[i].view(-1)[chosen] = delta[i].flatten()[chosen]
    return out


# ---- difference


def difference_(
    out: Tensor, theta1: Tensor, theta0: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Write ``theta1 - theta0``, or ``theta1`` alone, widened.

    Args:
        out: (m, n) float32 or float64, of any strides: ``buffer.mT`` writes the transpose.
        theta1: (m, n), any floating dtype and strides.
        theta0: the same; None: cast only.
        backend: of the op.

    Returns:
        ``out``.

    Raises:
        DecompositionError: shapes or dtypes that do not fit.

    Numerics: one subtraction in the widest of the dtypes, one rounding to ``out``'s; the same bits
    on every backend.

    Example:
        >>> out = torch.empty(2, 1)
        >>> difference_(out, torch.tensor([[3.0], [1.0]]).half(), torch.ones(2, 1)).tolist()
        [[2.0], [0.0]]
    """
    for name, x in (("theta1", theta1), ("theta0", theta0)):
        if x is not None and (x.shape != out.shape or x.dtype not in _FLOATING):
            raise DecompositionError(
                f"difference_: {name} is {x.dtype} {tuple(x.shape)}, out {tuple(out.shape)}; "
                "wanted one shape and floating dtypes."
            )
    if out.ndim != 2 or out.dtype not in (torch.float32, torch.float64):
        raise DecompositionError(
            f"difference_: out is {out.dtype} {tuple(out.shape)}; wanted float32 or float64 (m, n)."
        )
    new, old = theta1.detach(), None if theta0 is None else theta0.detach()
    tensors = [x for x in (out, new, old) if x is not None]
    if resolve_backend("difference_", *tensors, backend=backend) == "triton":
        from sparseft_kernels.svd import launch_difference

        launch_difference(out.detach(), new, old, _wide(out.dtype, new, old))
    else:
        _difference_blocks(out.detach(), new, old)
    return out


def _wide(dtype: torch.dtype, *operands: Tensor | None) -> torch.dtype:
    double = torch.float64 in (dtype, *(x.dtype for x in operands if x is not None))
    return torch.float64 if double else torch.float32


def _difference_blocks(out: Tensor, theta1: Tensor, theta0: Tensor | None) -> None:
    """Write row blocks of the output's memory, so that temporaries stay in cache."""
    if out.stride(0) < out.stride(1):
        out, theta1, theta0 = out.mT, theta1.mT, None if theta0 is None else theta0.mT
    if theta0 is None:
        out.copy_(theta1)
        return
    wide = _wide(out.dtype, theta1, theta0)
    rows = out.shape[0] if out.device.type != "cpu" else max(1, _BLOCK // max(1, out.shape[1]))
    for start in range(0, out.shape[0], rows):
        at = slice(start, start + rows)
        old = theta0[at].to(device=out.device, dtype=wide)
        if wide == out.dtype:
            out[at].copy_(theta1[at]).sub_(old)
        else:
            out[at].copy_(theta1[at].to(device=out.device, dtype=wide).sub_(old))


# ---- pruning


def prune_residual_(
    delta: Tensor,
    left: Tensor,
    right: Tensor,
    keep: int | Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    """Replace matrices by their low-rank parts, except where they differ most from them.

    Args:
        delta: (B, m, n) float32 or float64, contiguous; overwritten.
        left: (B, m, r) floating: ``U * S``, columns beyond a matrix's rank zero.
        right: (B, r, n) floating: ``Vh``.
        keep: how many entries of a matrix stay as they are, 0 to ``m * n``; one number or B of
            them.
        backend: of the op.

    Returns:
        ``delta``: exactly ``keep`` entries with the largest ``|delta - left @ right|`` unchanged,
        ties to the lowest flat index, all others those of ``left @ right``.

    Raises:
        DecompositionError: shapes, dtypes or counts that do not fit; a NaN where entries are to be
            ranked, which names the matrix. ``delta`` is then as it was.

    Numerics: products are summed in delta's dtype, fp32 without TF32; their order, and so the last
    bits of the low-rank part and which of two nearly equal entries is kept, is the backend's. The
    count is exact on each.

    Memory: a few MiB and a few percent of one matrix.

    Example:
        >>> delta = torch.tensor([[[4.0, 1.0], [2.0, 0.0]]])
        >>> low = torch.tensor([[[4.0], [1.0]]]), torch.tensor([[[1.0, 0.5]]])
        >>> prune_residual_(delta, *low, keep=1).tolist()
        [[[4.0, 1.0], [1.0, 0.5]]]
    """
    counts = _checked(delta, left, right, keep)
    target = delta.detach()
    left, right = (x.detach().to(delta.dtype) for x in (left, right))
    why_not = _why_not(target)
    if resolve_backend("prune_residual_", target, backend=backend, why_not=why_not) == "reference":
        _prune_blocks(target, left, right, counts)
        return delta
    from sparseft_kernels.residual import NotRankable, launch_prune_residual

    try:
        launch_prune_residual(target, left.contiguous(), right.contiguous(), counts)
    except NotRankable as error:
        raise DecompositionError(_nan(f"matrix {error.matrix}", target[0])) from None
    return delta


def _why_not(delta: Tensor) -> str | None:
    """Return what keeps the kernels from these matrices."""
    if delta.dtype != torch.float32:
        return f"delta has dtype {delta.dtype}, the kernels take float32"
    if delta.shape[0] >= 2**16 or delta.shape[2] >= 2**25 - 1:
        return (
            f"delta has shape {tuple(delta.shape)}, the kernels take fewer than 65536 matrices of "
            "fewer than 33554431 columns"
        )
    return None


def _nan(name: str, delta: Tensor) -> str:
    return (
        f"prune_residual_: {name} of shape {tuple(delta.shape)} or its low-rank part holds NaN; a "
        "selection cannot rank it. Did a training step diverge?"
    )


def _checked(
    delta: Tensor, left: Tensor, right: Tensor, keep: int | Sequence[int]
) -> tuple[int, ...]:
    if delta.ndim != 3 or delta.dtype not in (torch.float32, torch.float64):
        raise DecompositionError(
            f"prune_residual_: delta is {delta.dtype} {tuple(delta.shape)}; wanted float32 or "
            "float64 (B, m, n)."
        )
    if not delta.is_contiguous():
        raise DecompositionError(
            f"prune_residual_: delta of shape {tuple(delta.shape)} has strides {delta.stride()}; "
            "it is written in place, so wanted contiguous."
        )
    count, m, n = delta.shape
    r = left.shape[-1]
    for name, x, wanted in (("left", left, (count, m, r)), ("right", right, (count, r, n))):
        if tuple(x.shape) != wanted or x.dtype not in _FLOATING or x.device != delta.device:
            raise DecompositionError(
                f"prune_residual_: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; wanted "
                f"floating {wanted} on {delta.device}, for a delta of {tuple(delta.shape)}."
            )
    return _counts(delta, keep)


def _counts(delta: Tensor, keep: int | Sequence[int]) -> tuple[int, ...]:
    count, m, n = delta.shape
    counts = (keep,) * count if isinstance(keep, int) else tuple(keep)
    if len(counts) != count or not all(
        isinstance(k, int) and not isinstance(k, bool) and 0 <= k <= m * n for k in counts
    ):
        raise DecompositionError(
            f"prune_residual_: keep is {keep!r}; wanted an integer of 0 to {m * n}, or {count} of "
            "them."
        )
    return counts


def _prune_blocks(delta: Tensor, left: Tensor, right: Tensor, counts: Sequence[int]) -> None:
    with torch.autocast(delta.device.type, enabled=False), full_precision(delta.device):
        # All before any is written: a NaN leaves every matrix as it was.
        cuts = [
            _cut(delta[i], left[i], right[i], k, f"matrix {i}")
            if 0 < k < delta[i].numel()
            else None
            for i, k in enumerate(counts)
        ]
        for i, (k, cut) in enumerate(zip(counts, cuts, strict=True)):
            if k < delta[i].numel():
                _write(delta[i], left[i], right[i], cut)


def _blocks(delta: Tensor) -> Iterator[slice]:
    m, n = delta.shape
    rows = m if delta.device.type != "cpu" else max(1, _BLOCK // n)
    for start in range(0, m, rows):
        yield slice(start, min(start + rows, m))


def _keys(delta: Tensor, low: Tensor) -> Tensor:
    """Return the magnitude bits of ``delta - low``, flat: int32, or int64 of float64."""
    rest = (delta - low).view(-1)
    if rest.dtype == torch.float64:
        return rest.view(torch.int64).bitwise_and_(0x7FFF_FFFF_FFFF_FFFF)
    return rest.view(torch.int32).bitwise_and_(0x7FFF_FFFF)


def _infinity(keys: Tensor) -> int:
    return 0x7FF0_0000_0000_0000 if keys.dtype == torch.int64 else 0x7F80_0000


def _above(keys: Tensor, threshold: int) -> Tensor:
    """Return int64 positions of keys above the threshold, ascending."""
    if keys.device.type == "cpu":
        # 0.13 ms with the gather for 256 Ki, a tenth of them above, against 0.57 by torch's mask
        return torch.from_numpy(np.flatnonzero(keys.numpy() > threshold))
    return (keys > threshold).nonzero().view(-1)


def _largest(keys: Tensor, ranks: Sequence[int]) -> list[int]:
    """Return the keys of these ranks, 1 the largest."""
    places = [keys.numel() - r for r in ranks]
    if keys.device.type == "cpu":
        ranked = np.partition(keys.numpy(), places)  # 29 times faster than torch.topk
        return [int(ranked[p]) for p in places]
    ranked = keys.sort().values
    return [int(ranked[p]) for p in places]


def _cut(delta: Tensor, left: Tensor, right: Tensor, keep: int, name: str) -> tuple[int, int]:
    """Return the keep-th largest key and how many keys equal to it are kept."""
    m = len(left)
    step = max(1, min(_SAMPLED, m // _LEAST_ROWS))
    sample = _keys(delta[::step], left[::step] @ right)
    size = sample.numel()
    rank = max(1, keep * size // delta.numel())
    # Entries of a row are no independent samples: more than their standard deviation.
    margin = 4 * math.isqrt(rank) + size // 64 + 4
    high, low = _largest(sample, (max(1, rank - margin), min(size, rank + margin)))
    del sample
    found = _between(delta, left, right, keep, low - 1, high, name)
    return found or _between(delta, left, right, keep, -1, None, name) or (0, 0)


def _between(
    delta: Tensor, left: Tensor, right: Tensor, keep: int, low: int, high: int | None, name: str
) -> tuple[int, int] | None:
    """Return `_cut`, or None if the key sought is not in ``low < key <= high``."""
    above, listed, held = 0, [], 0
    for at in _blocks(delta):
        keys = _keys(delta[at], left[at] @ right)
        top = _infinity(keys)
        found = keys[_above(keys, low)]
        if found.numel() and int(found.max()) > top:
            raise DecompositionError(_nan(name, delta))
        if high is not None:
            inside = found[found <= high]
            above += found.numel() - inside.numel()
            found = inside
        if above >= keep:
            return None
        listed.append(found)
        held += found.numel()
        if held > 2 * keep + _BLOCK:  # only a misled, or no, bracket comes here
            everything = torch.cat(listed)
            (low,) = _largest(everything, (keep - above,))
            kept = everything[everything > low]
            ties = keep - above - kept.numel()
            listed = [kept, kept.new_full((ties,), low)]
            held = keep - above
    keys = torch.cat(listed)
    if keys.numel() < keep - above:
        return None
    (threshold,) = _largest(keys, (keep - above,))
    return threshold, keep - above - int((keys > threshold).sum())


def _write(delta: Tensor, left: Tensor, right: Tensor, cut: tuple[int, int] | None) -> None:
    """Replace by the low-rank part what is below the cut, or everything."""
    if cut is None:
        torch.matmul(left, right, out=delta)
        return
    threshold, room = cut
    for at in _blocks(delta):
        low = left[at] @ right
        keys, flat = _keys(delta[at], low), delta[at].view(-1)
        kept = _above(keys, threshold - 1)
        tied = (keys[kept] == threshold).nonzero().view(-1)
        if tied.numel() > room:
            stay = torch.ones(kept.numel(), dtype=torch.bool, device=kept.device)
            stay[tied[room:]] = False
            kept = kept[stay]
        room = max(0, room - tied.numel())
        # scattered into the low-rank part: a quarter of the time of torch.where
        low.view(-1)[kept] = flat[kept]
        flat.copy_(low.view(-1))
