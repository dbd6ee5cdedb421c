"""Peak memory of a training step, predicted without running it and without its memory.

The real code runs, model, `attach`, forward, backward and optimizer, on fake tensors, which have
shapes and no bytes; `tracker` follows their storages. So what the prediction says of layers,
autograd and optimizers is what torch and transformers do, in the versions at hand. Only what
operations allocate within themselves is reckoned, by `workspace`.

Assumed on ``"cuda"`` (which needs no GPU; fake CPU tensors stand for CUDA ones):
blocks are rounded to 512 bytes, as torch's caching allocator does; attention runs fused
(``scaled_dot_product_attention``'s flash or memory-efficient form, dropout inside the kernel); our
ops run as Triton kernels with the plans of an H200; cuBLAS holds its workspace. Allocated bytes are
meant: what the allocator reserves, the CUDA context and kernels' code come on top.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from sparseft.errors import OptionError
from sparseft.profiling.communication import Communication, Counter
from sparseft.profiling.memory import MemoryUse, split
from sparseft.profiling.models import LABELLED
from sparseft.profiling.quantised import build_quantised
from sparseft.profiling.sharding import (
    assumed_of,
    check_ranks,
    ddp_buckets,
    ddp_communication,
    fake_ranks,
    sharder,
)
from sparseft.profiling.sides import Built, build
from sparseft.profiling.tracker import MemoryTracker, Moment
from sparseft.profiling.trained import added_by, state_of
from sparseft.profiling.valueless import without_values
from sparseft.profiling.workload import Way, Workload
from sparseft.profiling.workspace import Workspace

__all__ = ["Prediction", "predict"]

# torch's caching allocator hands out multiples of this (c10/core/CachingDeviceAllocator.h,
# kMinBlockSize).
_CUDA_BLOCK = 512


@dataclass(frozen=True)
class Prediction:
    """What a step is going to take on one rank.

    Attributes:
        use: bytes at its peak, by part.
        trainable: numbers that train.
        communication: bytes that a rank exchanges in a step.
        at: the operation during which the peak occurs.
        assumed: what the figures rest on besides the code that ran.
    """

    use: MemoryUse
    trainable: int
    communication: Communication = Communication()
    at: str = ""
    assumed: tuple[str, ...] = ()


def predict(
    workload: Workload,
    way: Way,
    device: str = "cpu",
    world_size: int = 1,
    sharding: str = "fsdp",
) -> Prediction:
    """Return the peak memory of a steady training step, by part, and what ranks exchange in it.

    Args:
        workload: the step; its model may be any transformers config, and larger than this machine.
        way: how it trains.
        device: ``"cpu"`` or ``"cuda"``; neither has to be there.
        world_size: ranks that share the step; the figures are of one.
        sharding: how, ``"fsdp"`` or ``"ddp"``: see the module of that name.

    Raises:
        OptionError: another device or way to share, no rank; FSDP where torch.distributed is
            initialised; task, length or dtype that do not fit the model.
        DataError: the model is not found.
        Unavailable: fake tensors cannot run this way.

    Example:
        >>> workload = Workload(model="tiny-encoder", batch=2, length=16)
        >>> found = predict(workload, Way("attached", 0.01))
        >>> found.use.optimizer < found.use.weights / 20
        True
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise OptionError(f"{device=}; memory is predicted for 'cpu' or 'cuda'.")
    check_ranks(world_size, sharding)
    # A CPU's operations hold more the more threads share them.
    threads = torch.get_num_threads()
    if world_size == 1:
        return _predict(workload, way, kind, 1, threads)[0]
    if sharding == "fsdp":
        found = _predict(workload, way, kind, world_size, threads)[0]
    else:
        found = _replicated(*_predict(workload, way, kind, 1, threads))
    notes = assumed_of(way, world_size, sharding, workload.base)
    return replace(found, assumed=(*found.assumed, *notes))


def _replicated(alone: Prediction, sent: Communication, buckets: int) -> Prediction:
    """Return what each of several ranks takes under DDP: its buckets are there all along."""
    use = replace(alone.use, gradients=alone.use.gradients + buckets)
    return replace(alone, use=use, communication=sent)


@functools.lru_cache(maxsize=64)
def _predict(
    workload: Workload, way: Way, device: str, world_size: int, threads: int
) -> tuple[Prediction, Communication, int]:
    """Return what FSDP's ranks take, or one alone, and of that one what DDP would add."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    workspace, counter = Workspace(device, threads), Counter()
    block = _CUDA_BLOCK if device == "cuda" else 1

    def seen(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        counter.see(func, args)
        return workspace(func, args, kwargs)

    with contextlib.ExitStack() as around:
        mesh = around.enter_context(fake_ranks(world_size)) if world_size > 1 else None
        around.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        around.enter_context(without_values())
        around.enter_context(_as_on(device))
        tracker = around.enter_context(MemoryTracker(block=block, workspace=seen))
        make = build_quantised if workload.base else build
        built = make(workload, way, "cpu", shard=None if mesh is None else sharder(mesh))
        if device == "cuda":
            _choose_multi_tensor(built.optimizer)
        counter.found.clear()
        moment, held = _steady_step(built, tracker, workspace)
        sent, buckets = ddp_communication(built), ddp_buckets(built)
        trainable = built.trainable
        del built  # while its tensors can still be asked
    found = Prediction(
        use=_parts(moment, held, workspace),
        trainable=trainable,
        communication=counter.total(),
        at=moment.operation,
        assumed=workspace.assumed,
    )
    return found, sent, buckets


def _parts(moment: Moment, held: Moment, workspace: Workspace) -> MemoryUse:
    """Return a moment's bytes by part; what operations keep is in neither moment."""
    kept, standing = workspace.kept, workspace.standing
    before = sum(held.kinds.get(kind, 0) for kind in ("weights", "diff", "optimizer", "gradients"))
    return split(
        moment.total + kept + standing,
        weights=moment.kinds.get("weights", 0),
        diff=moment.kinds.get("diff", 0) + kept,
        gradients=moment.kinds.get("gradients", 0),
        optimizer=moment.kinds.get("optimizer", 0),
        held_for_backward=held.total - before + standing,
    )


def _steady_step(
    built: Built, tracker: MemoryTracker, workspace: Workspace
) -> tuple[Moment, Moment]:
    """Return the highest moment of a steady step, and the end of its forward pass.

    One pass each way, and two steps of the optimizer: the first makes its state, which a steady
    step has all along, so it is added to the moments before.
    """
    ends: list[Moment] = []

    def forward_ended(*_: Any) -> None:
        ends.append(Moment(tracker.level, kinds=dict(tracker.kinds)))
        workspace.live = _live_positions(built)

    _name_parts(built, tracker)
    hook = built.model.register_forward_hook(forward_ended)
    try:
        with tracker.gradients_of(built.model.parameters()):
            tracker.restart()
            built.backward(built.forward())
        # Shards of gradients are set by FSDP, and nothing says when.
        tracker.adopt((p.grad for p in built.model.parameters() if p.grad is not None), "gradients")
    finally:
        hook.remove()
    passes, held = tracker.peak, ends[0]
    if built.optimizer is None:
        return passes, held
    there = tracker.alive()
    before = tracker.kinds.get("diff", 0)
    built.optimizer.step()
    tracker.adopt(state_of(built.optimizer), "optimizer")
    # What else stays: where a rank's own entries are.
    tracker.adopt_rest("diff", but=there)
    state, more = tracker.kinds.get("optimizer", 0), tracker.kinds.get("diff", 0) - before
    for moment in (passes, held):
        moment.total += state + more
        moment.kinds["optimizer"] = state
        moment.kinds["diff"] = moment.kinds.get("diff", 0) + more
    tracker.restart()
    built.optimizer.step()
    return max(passes, tracker.peak, key=lambda moment: moment.total), held


def _live_positions(built: Built) -> int | None:
    """Return how many positions the loss reads, where it is not all of them."""
    kind, work = type(built.model).__name__, built.workload
    if "SequenceClassification" in kind:
        return work.batch
    if "MaskedLM" in kind:
        return round(LABELLED * work.batch * work.length)
    return None


def _name_parts(built: Built, tracker: MemoryTracker) -> None:
    """Say of everything that is there between two steps which part it is."""
    added = {id(parameter) for parameter in added_by(built.model, built.attachment)}
    tracker.adopt_rest("diff")
    everything = [*built.model.parameters(), *built.model.buffers()]
    tracker.adopt((t for t in everything if id(t) not in added), "weights")
    tracker.adopt(built.inputs.values(), "inputs")


@contextlib.contextmanager
def _as_on(device: str) -> Iterator[None]:
    """Make torch choose on fake CPU tensors what it would choose on the device."""
    if device == "cpu":
        yield
        return
    attention = torch.nn.functional.scaled_dot_product_attention

    @functools.wraps(attention)
    def fused(query, key, value, attn_mask=None, dropout_p=0.0, **rest):
        # Dropout happens within CUDA's kernels; a CPU's fused one has none and would be left.
        return attention(query, key, value, attn_mask=attn_mask, dropout_p=0.0, **rest)

    def dropout(input, p=0.5, training=True, inplace=False):
        # CUDA keeps a bool mask; a CPU keeps one of the input's dtype.
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", fused),
        mock.patch.object(functional, "dropout", dropout),
    ):
        yield


def _choose_multi_tensor(optimizer: torch.optim.Optimizer | None) -> None:
    """Let an optimizer of torch's that was left to choose take what it takes on CUDA: foreach."""
    for group in [] if optimizer is None else optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
