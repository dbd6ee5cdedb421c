"""`attach`: put masks on a model, in place, and the handle that trains, saves and removes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparseft.adapter import Adapter
from sparseft.diff import MaskLike, SparsePattern
from sparseft.errors import AttachError, StackOrderError
from sparseft.modules import agreement
from sparseft.modules._collective import Group, KeptGroup
from sparseft.modules.adapter_values import load_values_
from sparseft.modules.class_swap import (
    check_class,
    mask_attribute,
    masked_attributes,
    unmask_attribute,
)
from sparseft.modules.compact import (
    ATTACHMENTS,
    start_compact_state_dict,
    stop_compact_state_dict,
)
from sparseft.modules.ddp_guard import guard_wrapping, refuse_wrapped
from sparseft.modules.dequantise import keep_all_trainable
from sparseft.modules.fingerprint import verify_fingerprint
from sparseft.modules.full_params import FullParameter
from sparseft.modules.input_grads import (
    InputGrads,
    hook_input_embeddings,
    unhook_input_embeddings,
)
from sparseft.modules.leaf_reduction import LeafReduction
from sparseft.modules.learned import learned_adapter
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.mask_plan import check_roles, resolve_masks, warn_if_dense
from sparseft.modules.mask_report import MaskReport
from sparseft.modules.merged_export import MergedExport
from sparseft.modules.names import ParameterIndex
from sparseft.modules.placement import Misplaced, Placement
from sparseft.modules.refusals import check_masks, check_ties
from sparseft.modules.regroup import regroup_
from sparseft.modules.repattern import repattern_, resolve_changes
from sparseft.modules.resizing import guard_resizing, unguard_resizing
from sparseft.modules.riders import listen, unlisten
from sparseft.modules.running_stats import RunningStatistics
from sparseft.modules.separate_mask import make_masked, refuse_keeping
from sparseft.modules.sharding import Sharding
from sparseft.modules.trained import Trained
from sparseft.modules.transplant import check_optimizer

__all__ = ["Attachment", "MaskReport", "attach", "attachments_of"]

logger = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    masks: Mapping[str, MaskLike] | Adapter,
    *,
    full_params: Sequence[str] = (),
    optimizer: Optimizer | None = None,
    compact_state_dict: bool = False,
    input_grads: InputGrads = "auto",
    backend: str | None = None,
    group: Group = None,
) -> Attachment:
    """Make a model trainable at masks only, in place.

    Each masked weight W keeps its place and its forward; its module gets one leaf ``diff_{attr}``
    (nnz numbers) and ``W[indices] = rn(base + leaf)`` after every optimizer step. Everything else
    is frozen, except ``full_params``. A weight quantised by bitsandbytes or torchao is left as it
    is: its layer gives ``W(x) + x @ S.T``, S the diff in the leaf.

    Args:
        model: any module, on any device; may be wrapped.
        masks: parameter name -> bool mask of its shape (True = trainable) or `SparsePattern`;
            names of tied weights are interchangeable. An `Adapter` gives its masks and its values
            to start from, and its dense tensors as full parameters.
        full_params: globs of parameters to train densely (heads).
        optimizer: one that holds the model's parameters already; its groups are rewritten.
        compact_state_dict: ``model.state_dict()`` holds only leaves, full parameters and buffers,
            with a digest of each base that ``load_state_dict(strict=False)`` verifies.
        input_grads: make embedding outputs require grad, which reentrant activation checkpointing
            needs; ``"auto"`` does it while a transformers model uses that.
        backend: of the ops, ``"auto"``, ``"reference"`` or ``"triton"``; None: the ambient choice.
        group: processes that train together, all of which attach, load and move masks at the same
            point: one small all-reduce compares them. None: the default group, where
            torch.distributed is initialised; False: this process alone.

    Returns:
        The handle: parameters for an optimizer, `Attachment.adapter`, `Attachment.detach`.

    Raises:
        UnknownNameError: a parameter or glob that does not exist, with the nearest names.
        MaskError: a mask of another shape or type, or no entry kept at all.
        AttachError: a complex, lazy or meta weight, or quantised in an unknown way; a mask there
            already; two names of one weight; a declared tie of two dtypes; masks that are neither a
            mapping nor an `Adapter`; no optimizer; ranks with other masks, bases or values.
        BaseMismatchError: an `Adapter` made on another base.

    Numerics: forward and input gradients are the stock ones. A leaf's gradient is summed in fp32
    (fp64 for fp64 operands) at the mask. Weight decay acts on the leaf: it pulls W to its base.
    Beside a quantised weight product and sum are in fp32, rounded once to the layer's output dtype.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> sparse = attach(model, {"weight": torch.eye(3, 4) > 0})
        >>> sparse.nnz, [name for name, _ in sparse.named_parameters()]
        (3, ['diff_weight'])
        >>> _ = sparse.detach()
    """
    with agreement.failing_together("attach", group):
        check_masks(masks)
        if optimizer is not None:
            check_optimizer(optimizer)
        refuse_wrapped(model)
        sharding = Sharding(model)
        sharding.check_group(group)
    start = masks if isinstance(masks, Adapter) else None
    if sharding.found:  # whose fingerprint is a collective: all have one to verify, or none
        agreement.check_adapter(start, "attach", group)
    with agreement.failing_together("attach", group):
        index = ParameterIndex(model)
        dense = {index.resolve(n) for n in start.dense} if start is not None else set()
        if start is not None and start.metadata.fingerprint is not None:
            verify_fingerprint(model, start.metadata.fingerprint)
        patterns = resolve_masks(index, masks)
        chosen = set(index.match(full_params, what="full_params")) if full_params else set()
        full = [n for n in index.names if n in chosen | dense]
        check_roles(index, patterns, full)
        check_ties(model, index, patterns)
        sharding.check({name: index.get(name) for name in patterns})
    agreement.check_masks(patterns, full, group)

    attachment = Attachment(
        model,
        index,
        patterns,
        full,
        compact_state_dict=compact_state_dict,
        input_grads=input_grads,
        backend=backend,
        group=group,
        sharding=sharding,
    )
    attachment._at_detach += guard_wrapping(model, group)
    try:
        agreement.check_bases(attachment._masked.values(), group)
        if sharding.found:
            agreement.check_heads(attachment.full_params, group)
        else:
            agreement.check_adapter(start, "attach", group)
        if start is not None:
            load_values_(start, index, attachment._masked, attachment.full_params)
            attachment.sync_()
        if optimizer is not None:
            masked = attachment._masked.values()
            regroup_(optimizer, masked, [f.parameter for f in attachment._full])
    except BaseException:
        attachment.detach(restore=True)
        raise
    warn_if_dense(patterns, {name: index.get(name) for name in patterns})
    return attachment


def attachments_of(model: nn.Module) -> list[Attachment]:
    """Return the attachments made on this very module, the oldest first.

    A deep copy of an attached model has its own: ``attachments_of(copy)[-1]`` drives the copy.
    """
    return list(model.__dict__.get(ATTACHMENTS, ()))


class Attachment(Trained, MergedExport):
    """Handle of the masks on a model. Made by `attach`.

    Also a context manager that detaches with ``restore=True`` on exit.

    Attributes:
        model: the model given to `attach`.
        reduction: what averages gradients of leaves over processes where the model is sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        index: ParameterIndex,
        patterns: Mapping[str, SparsePattern],
        full: Sequence[str],
        *,
        compact_state_dict: bool,
        input_grads: InputGrads,
        backend: str | None,
        group: Group,
        sharding: Sharding,
    ) -> None:
        self.model = model
        self.compact_state_dict = compact_state_dict
        self._active = True
        self._kept_group = KeptGroup(group)
        self._masked: dict[str, MaskedParameter] = {}
        self._owners = {name: index.owners(name) for name in patterns}
        self._flags = [(p, p.requires_grad) for _, p in index.items()]
        self._full: list[FullParameter] = []
        self._placement: Placement | None = None
        self._hooks: list[tuple[nn.Module, int]] = []
        self._at_detach: list[Callable[[], None]] = []
        self._statistics = RunningStatistics(model)
        self.reduction: LeafReduction | None = None
        model.__dict__.setdefault(ATTACHMENTS, []).append(self)
        try:
            self._at_detach += keep_all_trainable(model)
            for name, pattern in patterns.items():
                masked = make_masked(
                    index, name, pattern,
                    backend=backend, compact=compact_state_dict, sharding=sharding,
                )  # fmt: skip
                self._masked[name] = masked
                for i, (module, attr) in enumerate(self._owners[name]):
                    mask_attribute(module, attr, masked, owner=i == 0)
            for name in full:
                parameter = index.get(name)
                self._full.append(FullParameter(name, parameter, sharding.of(parameter)))
                self._owners[name] = index.owners(name)
            self._placement = Placement(model, self._masked, self._full, self._owners)
            # Gradients left over from dense training would let an optimizer move frozen entries.
            trained = {id(f.parameter) for f in self._full}
            for parameter, _ in self._flags:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in trained)
            self._hooks = hook_input_embeddings(model, input_grads)
            self.reduction = sharding.reduction(self.leaves.values(), self.full_params.values())
            start_compact_state_dict(model)
            listen(model)
            guard_resizing(model)
        except BaseException:
            self.detach(restore=True)
            raise

    @property
    def _group(self) -> Group:
        return self._kept_group.group

    # Values.

    def sync_(self) -> None:
        """Write ``W[indices] = rn(base + leaf)`` for every mask.

        For code that changes leaves other than through a ``torch.optim`` step or
        ``load_state_dict``, after which this has been done.

        Raises:
            StackOrderError: something was applied on top of a masked weight since.
            AttachError: a masked weight was replaced since.
        """
        self._check_active("sync_")
        if self._placement is not None:
            self._placement.check()
        for masked in self._masked.values():
            masked.require_top("write the trained diff into")
        for masked in self._masked.values():
            masked.write_()

    def adapter(
        self,
        name: str = "adapter",
        *,
        base_name: str | None = None,
        method: str = "",
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Adapter:
        """Return what was learned, copied to the CPU: diffs and the full parameters' values.

        Where something replaced a trained weight since `attach`, a warning names it; what was
        trained until then is returned all the same. On a sharded model a collective: every process
        calls it and gets the same adapter, which one of them saves.

        Args:
            name: of the adapter.
            base_name: of the base model; default: ``model.config._name_or_path`` where there is
                one.
            method: how the masks were chosen.
            seed: of the run.
            extra: anything JSON can hold.

        Raises:
            DiffError: a value is NaN or infinite.
        """
        self._check_active("adapter")
        self._statistics.warn_if_moved()
        wrong, place = self._misplaced()
        if wrong:
            logger.warning("adapter(): %s", place.describe(wrong))
        return learned_adapter(
            self.model, self._masked, self._full, name=name, base_name=base_name,
            fingerprint=place.fingerprint(wrong), method=method, seed=seed, extra=extra,
        )  # fmt: skip

    def load_adapter_(self, adapter: Adapter) -> None:
        """Set leaves and full parameters from an adapter; masked tensors it lacks go to zero.

        Its entries may be fewer than the masks', never others. Optimizer state is not touched.

        Raises:
            UnknownNameError: a tensor that is not masked (or, dense, not in full_params) here.
            MaskError: an entry outside the mask.
            BaseMismatchError: it was made on another base.
            AttachError: another one on another rank.
        """
        self._check_active("load_adapter_")
        agreement.check_adapter(adapter, "load_adapter_", self._group)
        if adapter.metadata.fingerprint is not None:
            verify_fingerprint(self.model, adapter.metadata.fingerprint)
        load_values_(adapter, ParameterIndex(self.model), self._masked, self.full_params)
        self.sync_()

    def reselect_(
        self, masks: Mapping[str, MaskLike], *, optimizer: Optimizer | Sequence[Optimizer] | None
    ) -> int:
        """Move masks in training; between a backward and the next forward, not inside a step.

        Dropped entries get their base back, bit for bit. Kept ones keep diff, gradient and
        optimizer state; grown ones start at zero. Leaves stay the same parameters.

        Args:
            masks: masked parameter name -> its new mask, of any count; others stay.
            optimizer: the one (or all) that trains the leaves; None before there is one. Of others,
                state of those that have stepped a leaf moves, too; none that was only loaded.

        Returns:
            How many entries are new.

        Raises:
            UnknownNameError: a parameter that does not exist or is not masked.
            MaskError: a mask of another shape, or without an entry.
            AttachError: no optimizer, one without these leaves or with other state than entry-wise;
                a count that changes while several processes train together; ranks that differ.
            StackOrderError: something was applied on top of a masked weight since.

        Numerics: step counts stay per tensor, so grown entries enter AdamW without bias
            correction of their own, see `sparseft.training.Reselection`. A CUDA graph captured
            before has to be captured again.
        """
        self._check_active("reselect_")
        with agreement.failing_together("moving masks", self._group):
            changes = resolve_changes(ParameterIndex(self.model), self._masked, masks)
        agreement.check_moves({masked.name: pattern for masked, pattern in changes}, self._group)
        return repattern_(changes, optimizer, self._group)

    # Leaving.

    def detach(self, restore: bool = True) -> nn.Module:
        """Take the masks off: stock classes, no leaves, the ``requires_grad`` flags of before.

        Args:
            restore: put the base back, bit for bit, full parameters and running statistics of
                norm layers included. False keeps the trained values (a stock model to export).

        What replaced a trained weight since `attach` is left as it is, and a warning names it.

        Returns:
            The model.

        Raises:
            StackOrderError: something was applied, or attached to this model, since.
            AttachError: the class of a masked module was extended since (a parametrization);
                ``restore=False`` with masks beside quantised weights, which names the ways out.
        """
        if not self._active:
            return self.model
        self._check_last()
        if not restore:
            refuse_keeping(self._masked.values())
        for masked in self._masked.values():
            masked.require_top("detach")
        for f in self._full:
            f.require_top("detach")
        for name in self._masked:
            for module, _ in self._owners[name]:
                check_class(module, name)
        wrong, place = self._misplaced()
        if self.reduction is not None:
            self.reduction.close()
        while self._at_detach:
            self._at_detach.pop()()
        for name, masked in self._masked.items():
            for module, attr in reversed(self._owners[name]):
                if attr in masked_attributes(module):
                    unmask_attribute(module, attr)
            foreign = name in wrong and wrong[name].foreign
            masked.release_(restore=restore and not foreign)
        for f in self._full:
            f.release_(restore=restore)
        if restore:
            self._statistics.restore_()
        torch.clear_autocast_cache()  # it keeps casts of weights that require grad
        for parameter, flag in self._flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
        unhook_input_embeddings(self._hooks)
        self._forget()
        place.close()
        for name, what in ((n, w.what) for n, w in wrong.items() if not w.there):
            logger.warning(
                "detach(): %r has changed since attach: %s. What took its place was left as it "
                "is and may hold trained values; load the base again if you want that.", name, what,
            )  # fmt: skip
        return self.model

    def _misplaced(self) -> tuple[dict[str, Misplaced], Placement]:
        """Return what is no longer where `attach` found it; nothing while attaching fails."""
        if self._placement is None:
            return {}, Placement(self.model, {}, (), {})
        return self._placement.misplaced(), self._placement

    def _check_active(self, what: str) -> None:
        if not self._active:
            raise AttachError(f"{what}: these masks were detached; attach again.")

    def _check_last(self) -> None:
        last = self.model.__dict__[ATTACHMENTS][-1]
        if last is not self:
            raise StackOrderError(
                f"cannot detach: masks on {last.names[0]!r} and {len(last.names) - 1} more were "
                "attached to this model since. Detach those first."
            )

    def _forget(self) -> None:
        self._active = False
        self.model.__dict__[ATTACHMENTS].remove(self)
        if not self.model.__dict__[ATTACHMENTS]:
            del self.model.__dict__[ATTACHMENTS]
            stop_compact_state_dict(self.model)
            unlisten(self.model)
            unguard_resizing(self.model)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach(restore=True)

    def __repr__(self) -> str:
        state = "" if self._active else ", detached"
        return (
            f"Attachment({len(self._masked)} masks, nnz={self.nnz:,} ({self.density:.3%}), "
            f"full_params={len(self._full)}{state})"
        )
