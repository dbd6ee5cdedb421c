"""The mean of compact gradients over the processes that train together, at the end of a backward.

What DistributedDataParallel does for leaves, for models whose base is sharded (`fully_shard`
reduces only what it shards, and leaves are not): nnz numbers a tensor, whatever the weight's size.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from sparseft.modules._collective import Group
from sparseft.modules.ranks import processes

__all__ = ["BUCKET_BYTES", "LeafReduction"]

logger = logging.getLogger(__name__)

# What DDP takes: large enough for full bandwidth, small enough that two of them cost no memory.
BUCKET_BYTES = 25 * 2**20


class LeafReduction:
    """Gives parameters the mean of their gradients over all processes after each backward.

    Every process makes one, with parameters of the same sizes in the same order, and runs equally
    many backwards. The mean of what is equal already is itself, so that accumulation over several
    backwards needs nothing; `no_sync` and FSDP's ``set_requires_gradient_sync(False)`` save the
    traffic of all but the last.

    Args:
        parameters: leaves and full parameters, plain tensors; those that do not require grad are
            passed over.
        group: the processes, see `Group`; with one alone nothing is done.
        model: where backward begins: its outputs. With it a process whose backward reaches none of
            the parameters takes part, too, and FSDP's switches are obeyed.

    Attributes:
        bytes_reduced: of the last reduction, what each process gave: all gradients and one number
            for each parameter, in the parameters' dtypes (4 nnz + 4 for a leaf).
        reductions: how many there were.

    A parameter that no process's backward reached keeps the gradient it had, or None.

    Numerics: each process divides by their number first, then sums in the gradient's dtype, as DDP
        does; afterwards the bits are the same on all. Gradients under ``create_graph`` lose their
        graph, with a warning, as under DDP.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: Group = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        self.bytes_reduced = 0
        self.reductions = 0
        self._group = group or None
        self._size = 1 if group is False else processes(self._group)
        self._parameters = list(parameters)
        self._reached: set[int] = set()  # positions, since the last reduction
        self._queued: set[int] = set()  # graph tasks that end with `_end`
        self._waiting: list[Any] = []  # handles on nodes of outer backwards
        self._held = 0
        self._warned = False
        self._model = None if model is None else weakref.ref(model)
        self._handles: list[Any] = []
        if self._size == 1:
            return
        # Weakly: a parameter must not keep its reduction, and with it all the others.
        own = weakref.ref(self)
        for position, parameter in enumerate(self._parameters):
            hook = functools.partial(_accumulated, own, position)
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
            else:  # torch takes no hook yet
                parameter.requires_grad_(True)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
                parameter.requires_grad_(False)
        if model is not None:
            self._handles.append(model.register_forward_hook(functools.partial(_forwarded, own)))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients of backwards in here to the first reduction after it."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def close(self) -> None:
        """Take all hooks off; gradients stay as they are."""
        for handle in (*self._handles, *self._waiting):
            handle.remove()
        self._handles, self._waiting, self._parameters = [], [], []
        self._reached.clear()

    # -- when ---

    def _queue(self) -> None:
        """Have `_end` called once when the running backward has ended.

        What torch's own DDP and FSDP call; there is no public form. A backward that raises forgets
        its callbacks; numbers of graph tasks never come again.
        """
        task = torch._C._current_graph_task_id()
        if task != -1 and task not in self._queued:
            self._queued.add(task)
            engine: Any = Variable._execution_engine
            engine.queue_callback(self._end)

    def _end(self) -> None:
        node = torch._C._current_autograd_node()
        if node is None:
            self._queued.clear()
            self._drop_waiting()
            if self._parameters and not self._held and self._syncs():
                self._reduce()
            return
        # Reentrant checkpointing: this backward runs inside a node of another, on whose end all
        # waits. That one's callbacks can be queued while it runs its next nodes, not from here.
        self._queued.discard(torch._C._current_graph_task_id())
        for following, _ in node.next_functions:
            if following is not None:
                self._waiting.append(following.register_prehook(self._in_outer))

    def _in_outer(self, grads: Any) -> None:
        self._queue()

    def _drop_waiting(self) -> None:
        while self._waiting:
            self._waiting.pop().remove()

    def _syncs(self) -> bool:
        """Whether FSDP would reduce gradients now."""
        model = self._model() if self._model is not None else None
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if model is None or fsdp is None:
            return True
        states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
        groups = [g for state in states for g in _param_groups(state)]
        return not groups or any(getattr(group, "reduce_grads", True) for group in groups)

    # -- what ---

    def _buckets(self) -> Iterator[list[int]]:
        """Yield positions whose gradients are sent together, the same ones on every process."""
        open_: dict[Any, list[int]] = {}
        sizes: dict[Any, int] = {}
        for position, parameter in enumerate(self._parameters):
            if not parameter.requires_grad:
                continue
            key = parameter.device, parameter.dtype
            open_.setdefault(key, []).append(position)
            sizes[key] = sizes.get(key, 0) + parameter.numel() * parameter.element_size()
            if sizes[key] >= BUCKET_BYTES:
                yield open_.pop(key)
                del sizes[key]
        yield from open_.values()

    @torch.no_grad()
    def _reduce(self) -> None:
        self.bytes_reduced = 0
        self.reductions += 1
        sent: tuple[list[int], Tensor, Any] | None = None
        with torch.autograd.profiler.record_function("sparseft::reduce_leaves"):
            for bucket in self._buckets():
                flat = self._pack(bucket)
                self.bytes_reduced += flat.numel() * flat.element_size()
                work = dist.all_reduce(flat, group=self._group, async_op=True)
                if sent is not None:
                    self._unpack(*sent)  # while the next is on its way
                sent = bucket, flat, work
            if sent is not None:
                self._unpack(*sent)
        self._reached.clear()

    def _pack(self, bucket: list[int]) -> Tensor:
        """Return this process's share of the means, and one flag for each: was it reached."""
        parts, flags = [], []
        for position in bucket:
            parameter = self._parameters[position]
            grad = parameter.grad
            if grad is not None and grad.layout != torch.strided:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {tuple(parameter.shape)} is "
                    f"{grad.layout}, wanted torch.strided: embeddings trained in full beside a "
                    "sharded base need sparse=False."
                )
            parts.append(torch.zeros_like(parameter) if grad is None else grad.to(parameter.dtype))
            flags.append(float(position in self._reached and grad is not None))
        like = self._parameters[bucket[0]]
        flat = torch.cat([part.reshape(-1) for part in parts] + [like.new_tensor(flags)])
        flat[: -len(bucket)].div_(self._size)
        return flat

    def _unpack(self, bucket: list[int], flat: Tensor, work: Any) -> None:
        work.wait()
        flags = flat[-len(bucket) :]
        lacking = any(self._parameters[position].grad is None for position in bucket)
        # Reading them makes a GPU wait, which only a parameter without a gradient here is worth.
        known = flags.tolist() if lacking else []
        start = 0
        for place, position in enumerate(bucket):
            parameter = self._parameters[position]
            mean = flat[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
            grad = parameter.grad
            if grad is None:
                if known[place]:
                    parameter.grad = mean.clone()
            elif grad.requires_grad:
                self._warn_of_graph()
                parameter.grad = mean.clone()
            elif position in self._reached:
                grad.copy_(mean)
            else:  # equal on all already, or reached elsewhere
                grad.copy_(torch.where(flags[place] > 0, mean, grad))

    def _warn_of_graph(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "backward(create_graph=True) beside a sharded base: gradients are replaced by "
                "their means over the processes, which have no graph. Take derivatives of "
                "gradients with torch.autograd.grad(..., create_graph=True) inside the loss."
            )


def _accumulated(own: weakref.ref[LeafReduction], position: int, parameter: Tensor) -> None:
    reduction = own()
    if reduction is not None:
        reduction._reached.add(position)
        reduction._queue()


def _forwarded(own: weakref.ref[LeafReduction], module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the model: backward through any of its outputs ends with a reduction."""
    if torch.compiler.is_compiling() or own() is None:
        return
    from torch.utils._pytree import tree_leaves

    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(functools.partial(_began, own))


def _began(own: weakref.ref[LeafReduction], grad: Tensor) -> None:
    reduction = own()
    engine: Any = Variable._execution_engine
    # torch.autograd.grad, and backward(inputs=...), may reach no parameter on any process.
    if reduction is not None and engine.is_checkpoint_valid():
        reduction._queue()


def _param_groups(state: Any) -> list[Any]:
    """Return the parameter groups of one FSDP state; torch 2.11 has one, later ones several."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        group = state._fsdp_param_group
        return [] if group is None else [group]
    return list(groups)
