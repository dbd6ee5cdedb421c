"""What a low-rank part leaves of a matrix: the difference it is taken of, and its pruned rest.

Definitions, per matrix, with ``wide`` the widest dtype among the operands, at least fp32::

    difference_         out = round(wide(theta1) - wide(theta0))
    prune_residual_     low = left @ right;  rest = |delta - low|
                        delta[i] stays at the `keep` largest of rest, ties to the lowest flat index;
                        elsewhere delta[i] = low[i]

The rest is never stored: it is recomputed, once or more to find the keep-th largest and once to
write, in blocks that stay in cache (`sparseft.ops._residual_blocks`) or in tiles on GPUs
(sparseft_kernels/residual.py). Keys are the bits of the float, whose integer order is the order of
magnitudes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseft.errors import DecompositionError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._residual_blocks import BLOCK, prune_blocks

__all__ = ["difference_", "difference_reference", "prune_residual_", "prune_residual_reference"]

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
    wide = _wide(out.dtype, theta1, theta0)
    turned = theta1.stride(0) < theta1.stride(1)
    if theta0 is None and (theta1.dtype == wide or not turned):
        out.copy_(theta1)
        return
    rows = out.shape[0] if out.device.type != "cpu" else max(1, BLOCK // max(1, out.shape[1]))
    for start in range(0, out.shape[0], rows):
        at = slice(start, start + rows)
        new, old = theta1[at], None if theta0 is None else theta0[at]
        if turned:
            # Subtracted as they lie, into contiguous memory, which torch transposes in tiles: 0.4
            # of the time of a subtraction across.
            new, old = new.mT, None if old is None else old.mT
        part = new.to(device=out.device, dtype=wide)
        if old is not None:
            part = part - old.to(device=out.device, dtype=wide)
        out[at].copy_(part.contiguous().mT if turned else part)


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

    def refuse(number: int) -> Exception:
        return DecompositionError(
            f"prune_residual_: matrix {number} of shape {tuple(target.shape[1:])}, or its low-rank "
            "part, holds NaN; a selection cannot rank it. Did a training step diverge?"
        )

    why_not = _why_not(target)
    if resolve_backend("prune_residual_", target, backend=backend, why_not=why_not) == "reference":
        prune_blocks(target, left, right, counts, refuse)
        return delta
    from sparseft_kernels.residual import NotRankable, launch_prune_residual

    try:
        launch_prune_residual(target, left, right, counts)
    except NotRankable as error:
        raise refuse(error.matrix) from None
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
    counts = tuple(keep) if isinstance(keep, Sequence) else (keep,) * count
    if len(counts) != count or not all(
        isinstance(k, int) and not isinstance(k, bool) and 0 <= k <= m * n for k in counts
    ):
        raise DecompositionError(
            f"prune_residual_: keep is {keep!r}; wanted an integer of 0 to {m * n}, or {count} of "
            "them."
        )
    return counts
