"""Write a composition over many tensors at once; and the same for one tensor with gradients.

``weight.flatten()[union] = rn(base + combined)``: the rules of :mod:`sparseft.ops.combine`, one
rounding at the end. `capture_many`, `compose_many_` and `restore_many_` work on many weights by one
launch per call; they run where the Triton kernels do (`runs_packed`). `compose_diffs` returns a new
weight and is differentiable in the weight, the values and the coefficients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparseft.diff import SparseDiff
from sparseft.errors import DiffError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._common import accumulation_dtype, operator
from sparseft.ops.apply_diff import gather_entries, write_entries_
from sparseft.ops.combine import Rule
from sparseft.ops.packed import EntryTable, PackedTerm, PackedUnion

__all__ = [
    "STATE",
    "capture_many",
    "compose_diffs",
    "compose_many_",
    "pack_diffs",
    "restore_many_",
    "runs_packed",
]

# What the kernel reports: whether it ran, and whether a finite base met a sum out of range.
STATE = ("started", "overflowed")


def runs_packed(weights: Sequence[Tensor]) -> bool:
    """Tell whether these weights, of one device and dtype, are written by the Triton kernels."""
    return bool(weights) and resolve_backend("compose_many_", *weights) == "triton"


def capture_many(weights: Sequence[Tensor], table: EntryTable) -> Tensor:
    """Return (P,) entries of several contiguous weights, bit for bit, in one launch."""
    from sparseft_kernels.compose import launch_capture_many

    saved = table.empty(weights[0].dtype)
    launch_capture_many(weights, table.indices, table.block_tensor, saved)
    return saved


def restore_many_(weights: Sequence[Tensor], table: EntryTable, saved: Tensor) -> None:
    """Overwrite entries of several contiguous weights with ``saved`` (P,), in one launch."""
    from sparseft_kernels.compose import launch_restore_many

    launch_restore_many(weights, table.indices, table.block_tensor, saved)


def compose_many_(
    weights: Sequence[Tensor],
    union: PackedUnion,
    coeffs: Sequence[float],
    rule: Rule,
    *,
    saved: Tensor,
    base: Tensor | None,
    state: Tensor,
) -> None:
    """Write ``rn(base + combined)`` over the union's entries of several weights, in one launch.

    Args:
        weights: contiguous, of one dtype and device; as many as the union has tensors.
        union: their entries and the adapters' values.
        coeffs: by ordinal; 0 leaves an adapter out.
        rule: how values combine.
        saved: (P,) in the weights' dtype; gets what the weights held if ``base`` is None.
        base: (P,) what to add to, of any floating dtype; None: what the weights hold.
        state: (2,) int32 zeros on the device, see `STATE`.

    Numerics: as `combine`, and one rounding to the weights' dtype; entries to which nothing is
    added keep their base.
    """
    from sparseft_kernels.compose import launch_compose

    launch_compose(
        weights, union.indices, union.counts, union.values, union.ordinals, union.block_tensor,
        union.block_entry, base, saved, coeffs, state,
        kind=rule.kind, vote=rule.vote, mean=rule.mean, least=rule.least, strength=rule.strength,
    )  # fmt: skip


# The differentiable sum: its definition.


def compose_entries_reference(
    weight: Tensor,
    indices: Tensor,
    values: Tensor,
    ordinals: Tensor,
    places: Tensor,
    coeffs: Tensor,
) -> Tensor:
    """``out.flatten()[indices] = rn(weight.flatten()[indices] + sum_i rn(coeff_i * value_i))``."""
    wide = accumulation_dtype(weight.dtype, values.dtype, coeffs.dtype)
    size = int((indices >= 0).sum()) if indices.numel() else 0
    union = indices[:size]
    total = torch.full((size,), -0.0, dtype=wide, device=weight.device)
    for i in range(coeffs.numel()):
        if coeffs[i] != 0:
            own = ordinals == i
            total.index_add_(0, places[own], values[own].to(wide) * coeffs[i].to(wide))
    out = weight.clone(memory_format=torch.contiguous_format)
    base = gather_entries(out, union, backend="reference").to(wide)
    write_entries_(out, union, (base + total).to(weight.dtype), backend="reference")
    return out


def compose_entries_grad_reference(
    grad: Tensor, indices: Tensor, values: Tensor, ordinals: Tensor, places: Tensor, coeffs: Tensor
) -> tuple[Tensor, Tensor]:
    """``d value = coeff * grad[index]``, ``d coeff_i = sum over i's entries of grad[index] *
    value``.
    """
    wide = accumulation_dtype(grad.dtype, values.dtype, coeffs.dtype)
    at = indices.index_select(0, places)
    picked = gather_entries(grad.contiguous(), at, backend="reference").to(wide)
    grad_values = (picked * coeffs.to(wide)[ordinals.long()]).to(values.dtype)
    share = picked * values.to(wide)
    sums = [share[ordinals == i].sum() for i in range(coeffs.numel())]
    return grad_values, torch.stack(sums) if sums else coeffs.new_zeros(0, dtype=wide)


# Registration: dispatch, fake, autograd.


@operator(
    "compose_entries(Tensor weight, Tensor indices, Tensor counts, Tensor values, Tensor ordinals, "
    "Tensor places, Tensor block_entry, Tensor coeffs, str backend='') -> Tensor"
)
def _compose_entries(
    weight: Tensor,
    indices: Tensor,
    counts: Tensor,
    values: Tensor,
    ordinals: Tensor,
    places: Tensor,
    block_entry: Tensor,
    coeffs: Tensor,
    backend: str = "",
) -> Tensor:
    weight, values, coeffs = weight.detach(), values.detach(), coeffs.detach()
    if resolve_backend("compose_entries", values, coeffs, backend=backend) != "triton":
        return compose_entries_reference(weight, indices, values, ordinals, places, coeffs)
    from sparseft_kernels.compose import launch_compose

    out = weight.clone(memory_format=torch.contiguous_format)
    blocks = torch.zeros(block_entry.shape, dtype=torch.int32, device=out.device)
    state = torch.zeros(len(STATE), dtype=torch.int32, device=out.device)
    saved = torch.empty(indices.shape, dtype=out.dtype, device=out.device)
    rule = Rule("sum")
    launch_compose(
        [out], indices, counts, values, ordinals, blocks, block_entry, None, saved, coeffs, state,
        kind=rule.kind, vote=rule.vote, mean=rule.mean, least=rule.least, strength=rule.strength,
    )  # fmt: skip
    return out


@operator(
    "compose_entries_grad(Tensor grad, Tensor indices, Tensor values, Tensor ordinals, "
    "Tensor places, Tensor coeffs, str backend='') -> (Tensor, Tensor)"
)
def _compose_entries_grad(
    grad: Tensor,
    indices: Tensor,
    values: Tensor,
    ordinals: Tensor,
    places: Tensor,
    coeffs: Tensor,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    if resolve_backend("compose_entries_grad", values, coeffs, backend=backend) != "triton":
        return compose_entries_grad_reference(grad, indices, values, ordinals, places, coeffs)
    from sparseft_kernels.compose import launch_compose_grad

    return launch_compose_grad(grad.contiguous(), indices, places, values, ordinals, coeffs)


@torch.library.register_fake("sparseft::compose_entries")
def _(weight, indices, counts, values, ordinals, places, block_entry, coeffs, backend=""):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.register_fake("sparseft::compose_entries_grad")
def _(grad, indices, values, ordinals, places, coeffs, backend=""):
    wide = accumulation_dtype(grad.dtype, values.dtype, coeffs.dtype)
    return torch.empty_like(values), coeffs.new_empty(coeffs.shape, dtype=wide)


def _setup(ctx, inputs, output):
    _, indices, _, values, ordinals, places, _, coeffs, ctx.backend = inputs
    ctx.save_for_backward(indices, values, ordinals, places, coeffs)


def _backward(ctx, grad):
    indices, values, ordinals, places, coeffs = ctx.saved_tensors
    d_values = d_coeffs = None
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[7]:
        d_values, d_coeffs = torch.ops.sparseft.compose_entries_grad.default(
            grad, indices, values, ordinals, places, coeffs, ctx.backend
        )
        d_coeffs = d_coeffs.to(coeffs.dtype)
    return grad, None, None, d_values, None, None, None, d_coeffs, None


def _no_second_derivative(ctx, *grads):
    raise DiffError(
        "compose_diffs is differentiable once; its gradient has no derivative. For second "
        "derivatives add diff.to_dense() by torch operations."
    )


torch.library.register_autograd("sparseft::compose_entries", _backward, setup_context=_setup)
torch.library.register_autograd("sparseft::compose_entries_grad", _no_second_derivative)


# Public functions.


def pack_diffs(diffs: Iterable[SparseDiff]) -> PackedUnion:
    """Return the union of several diffs of one tensor, for `compose_diffs`; built once per set.

    Args:
        diffs: "add" diffs of one shape on one device, in the order in which they are summed.

    Raises:
        DiffError: none, different shapes or devices, or a "set" diff (it has no gradient in its
            coefficient).
    """
    from sparseft.ops.union import union_of

    diffs = list(diffs)
    if not diffs:
        raise DiffError("pack_diffs: no diff was given; wanted at least one.")
    for i, diff in enumerate(diffs):
        if diff.shape != diffs[0].shape or diff.device != diffs[0].device:
            raise DiffError(
                f"pack_diffs: diff {i} has shape {tuple(diff.shape)} on {diff.device}, the first "
                f"{tuple(diffs[0].shape)} on {diffs[0].device}; they must change one tensor."
            )
        if diff.mode != "add":
            raise DiffError(
                f"pack_diffs: diff {i} has mode {diff.mode!r}; only 'add' diffs have coefficients."
            )
    union, places = union_of([d.indices for d in diffs])
    terms = [PackedTerm(i, d.values, p) for i, (d, p) in enumerate(zip(diffs, places, strict=True))]
    packed = PackedUnion.pack([union], [terms], len(diffs))
    return replace(packed, lists=tuple(d.indices for d in diffs))


def compose_diffs(
    weight: Tensor,
    diffs: Iterable[SparseDiff],
    coeffs: Tensor | Sequence[float | Tensor],
    *,
    packed: PackedUnion | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``weight + sum_i coeffs[i] * diffs[i]`` as a new weight, for learning what to add.

    Args:
        weight: the diffs' shape, floating.
        diffs: "add" diffs, in the order in which they are summed; their values may require grad.
        coeffs: (len(diffs),) floating, or numbers and 0-d tensors; may require grad.
        packed: `pack_diffs` of the same diffs, to build the union once for many calls.
        backend: as in :func:`sparseft.ops.gather_entries`.

    Returns:
        The composed weight, contiguous. Gradients: of the weight the incoming one, of value e of
        diff i ``coeffs[i] * grad[index e]``, of ``coeffs[i]`` the sum over its entries of
        ``grad[index] * value``. Differentiable once.

    Raises:
        DiffError: shapes, devices or numbers of coefficients that do not belong together.
        BackendError: ``"triton"`` cannot run here.

    Numerics: products and sums are rounded one by one in fp32 (fp64 if anything is), in order, then
    once to the weight's dtype; entries of coefficients 0 add nothing.
    """
    diffs = list(diffs)
    packed = pack_diffs(diffs) if packed is None else packed
    if len(packed.lists) != len(diffs) or not all(
        at is diff.indices or torch.equal(at, diff.indices)
        for at, diff in zip(packed.lists, diffs, strict=True)
    ):
        raise DiffError(
            f"compose_diffs: packed was made of {len(packed.lists)} diffs with other entries, or "
            "in another order; pass pack_diffs of these diffs."
        )
    for i, diff in enumerate(diffs):
        if diff.mode != "add" or diff.device != weight.device:
            raise DiffError(
                f"compose_diffs: diff {i} has mode {diff.mode!r} and lies on {diff.device}; wanted "
                f"mode 'add' (others have no coefficient) on the weight's device, {weight.device}."
            )
    if tuple(weight.shape) != tuple(diffs[0].shape):
        raise DiffError(
            f"compose_diffs: weight has shape {tuple(weight.shape)} but the diffs have "
            f"{tuple(diffs[0].shape)}."
        )
    if not isinstance(coeffs, Tensor):
        given = [
            torch.as_tensor(c, dtype=None if isinstance(c, Tensor) else torch.float32)
            for c in coeffs
        ]
        coeffs = torch.stack([c.to(weight.device) for c in given]) if given else weight.new_empty(0)
    if coeffs.shape != (len(diffs),) or not coeffs.is_floating_point():
        raise DiffError(
            f"compose_diffs: coeffs has shape {tuple(coeffs.shape)} and dtype {coeffs.dtype}; "
            f"wanted ({len(diffs)},) floating, one per diff."
        )
    joined = torch.cat([d.values.to(packed.values.dtype) for d in diffs])
    values = joined.index_select(0, packed.order)
    return _compose_entries(
        weight, packed.indices, packed.counts, values, packed.ordinals, packed.places,
        packed.block_entry, coeffs.to(weight.device), backend or "",
    )  # fmt: skip
