"""Follow the storages that torch operations make and drop, without asking an allocator.

A dispatch mode that sees every operation's results. It works on real tensors and above
``FakeTensorMode`` alike: a storage counts from the operation that made it until it is freed. Bytes
that operations allocate and free within themselves are invisible here; a function adds them.

The technique is that of `torch.distributed._tools.mem_tracker`, whose split by module it lacks, and
whose cost: seven billion parameters are followed through a step in about a second.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["MemoryTracker", "Moment", "local_part"]

Workspace = Callable[[Any, tuple[Any, ...], dict[str, Any]], int]


@dataclass
class Moment:
    """Bytes alive at one moment, by kind; ``inside`` is what an operation held within itself.

    ``operation`` names the one that ran; the kind of a storage nobody named is "other".
    """

    total: int = 0
    inside: int = 0
    operation: str = ""
    kinds: dict[str, int] = field(default_factory=dict)


def local_part(tensor: Tensor) -> Tensor:
    """Return what a rank holds of a tensor; the tensor itself where it is not shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MemoryTracker(TorchDispatchMode):
    """Counts bytes of storages alive, by kind, and keeps the highest moment.

    Args:
        block: storages are rounded up to multiples of so many bytes (512 on CUDA).
        workspace: (operation, arguments, keyword arguments) -> bytes that the operation allocates
            beyond its results while it runs; none by default.

    Only storages that are made while the mode is on count, and those given to `adopt`.

    Example:
        >>> import torch
        >>> with MemoryTracker() as tracker:
        ...     a = torch.zeros(100)
        ...     b = a + 1
        ...     del a
        >>> tracker.level, tracker.peak.total
        (400, 800)
    """

    def __init__(self, *, block: int = 1, workspace: Workspace | None = None) -> None:
        super().__init__()
        self.block = block
        self.level = 0
        self.kinds: dict[str, int] = {}
        self.peak = Moment()
        self._workspace = workspace
        # storage address -> (bytes, kind); the weak references keep their callbacks alive
        self._known: dict[int, tuple[int, str]] = {}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # they come back as operations on their local parts
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._see(result, "other")
        elif isinstance(result, (tuple, list)):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._see(leaf, "other")
        if self.level > self.peak.total:
            self._mark(func, 0)
        if self._workspace is not None:
            inside = self._workspace(func, args, kwargs)
            if self.level + inside > self.peak.total:
                self._mark(func, inside)
        return result

    def _mark(self, func: Any, inside: int) -> None:
        self.peak = Moment(self.level + inside, inside, str(func), dict(self.kinds))

    def __enter__(self):
        # FSDP frees a gathered weight by resizing its storage, which is no operation.
        self._resize: Any = torch.UntypedStorage.resize_
        seen = functools.partialmethod(MemoryTracker._resized, self)
        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", seen)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    @staticmethod
    def _resized(storage: Any, tracker: MemoryTracker, size: int) -> Any:
        result = tracker._resize(storage, size)
        key = storage._cdata
        if key in tracker._known:
            before, kind = tracker._known[key]
            after = tracker._rounded(size)
            tracker._known[key] = (after, kind)
            tracker._count(after - before, kind)
            if tracker.level > tracker.peak.total:
                tracker._mark("resize_", 0)
        return result

    def _rounded(self, size: int) -> int:
        return -(-size // self.block) * self.block

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = self._rounded(storage.nbytes())
        self._known[key] = (size, kind)
        self._references[key] = weakref.ref(storage, functools.partial(self._gone, key))
        self._count(size, kind)

    def _gone(self, key: int, _: Any) -> None:
        size, kind = self._known.pop(key)
        del self._references[key]
        self._count(-size, kind)

    def _count(self, size: int, kind: str) -> None:
        self.level += size
        self.kinds[kind] = self.kinds.get(kind, 0) + size

    def adopt(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count these tensors' storages as ``kind``, whether they were seen before or not."""
        for tensor in map(local_part, tensors):
            key = tensor.untyped_storage()._cdata
            self._see(tensor, kind)
            size, before = self._known[key]
            if before != kind:
                self._known[key] = (size, kind)
                self._count(-size, before)
                self._count(size, kind)

    def alive(self) -> frozenset[int]:
        """Return keys of the storages there are."""
        return frozenset(self._known)

    def adopt_rest(self, kind: str, but: frozenset[int] = frozenset()) -> None:
        """Count every storage alive that nobody named yet as ``kind``; not those ``but`` has."""
        for key, (size, before) in self._known.items():
            if before == "other" and key not in but:
                self._known[key] = (size, kind)
                self._count(-size, before)
                self._count(size, kind)

    @contextmanager
    def gradients_of(self, parameters: Iterable[nn.Parameter]):
        """Within: name each parameter's ``.grad`` a "gradients" storage when it is accumulated."""
        hooks = [
            p.register_post_accumulate_grad_hook(self._on_gradient)
            for p in parameters
            if p.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _on_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.adopt((parameter.grad,), "gradients")

    def restart(self) -> None:
        """Forget the highest moment: from here on the peak is that of what follows."""
        self.peak = Moment(self.level, 0, "start", dict(self.kinds))
