"""Memory and time of a training step as it runs, in the parts that `memory` defines."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparseft.benchmarking.rotation import spread
from sparseft.errors import OptionError
from sparseft.modules.weight_storage import is_sharded
from sparseft.ops import _sampled_cpu
from sparseft.profiling.allocations import Allocations, RecordLostError, Stretch, how_measured
from sparseft.profiling.communication import Communication
from sparseft.profiling.memory import MemoryUse, split
from sparseft.profiling.sides import Built, build
from sparseft.profiling.tracker import local_part
from sparseft.profiling.trained import added_by, state_of
from sparseft.profiling.worker import call_apart
from sparseft.profiling.workload import Way, Workload

__all__ = [
    "WARMUP",
    "Before",
    "Measurement",
    "measure",
    "measure_here",
    "recorded",
    "standing",
    "there_before",
]

# The first step makes the optimizer's state, the second what is made once that is there.
WARMUP = 2
_RECORDS = 2
_TRIES = 6


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a step took.

    Args:
        use: bytes at its peak, by part.
        trainable: numbers that train.
        seconds: of a step without the record: ``median``, ``quartile1``, ``quartile3``, ``min``;
            none of several ranks, whose time on one machine says nothing.
        steps: how many were timed.
        tokens_per_second: batch times length over the median.
        how: where the bytes come from.
        communication: bytes that a rank exchanged in a step.
    """

    use: MemoryUse
    trainable: int
    seconds: Mapping[str, float]
    steps: int
    tokens_per_second: float
    how: str
    communication: Communication = Communication()

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """Return what `to_json` wrote."""
        parts = {
            "use": MemoryUse(**data["use"]),
            "communication": Communication(**data["communication"]),
        }
        return cls(**{**data, **parts})


def measure(
    workload: Workload,
    way: Way,
    device: torch.device | str = "cpu",
    *,
    steps: int = 5,
    threads: int | None = None,
) -> Measurement:
    """Run a step in a process of its own and return what it took.

    Args:
        workload: what to train.
        way: how.
        device: ``"cpu"`` or a CUDA device.
        steps: timed steps, at least 2.
        threads: torch's, in that process; None: what this process has.

    Raises:
        NotMeasuredError: the process ran out of memory, was killed or failed; says which.
        OptionError: fewer than two steps, or a base of 4 or 8 bits.
    """
    _check(workload, steps)
    request = {
        "workload": asdict(workload),
        "way": asdict(way),
        "device": str(device),
        "steps": steps,
    }
    answer = call_apart(request, threads=torch.get_num_threads() if threads is None else threads)
    return Measurement.from_json(answer)


def measure_here(
    workload: Workload, way: Way, device: torch.device | str = "cpu", *, steps: int = 5
) -> Measurement:
    """Run a step in this process and return what it took: `measure` without its process.

    Raises:
        RecordLostError: the machine is so busy that the profiler lost its events six times.
        OptionError: as `measure`.
    """
    _check(workload, steps)
    where = torch.device(device)
    before = there_before(where)
    built = build(workload, way, where)
    for _ in range(WARMUP):
        built.step()
    use = _peak(built, where, before)
    seconds = _times(built.step, where, steps)
    tokens = workload.batch * workload.length
    return Measurement(
        use=use,
        trainable=built.trainable,
        seconds=spread(seconds),
        steps=steps,
        tokens_per_second=tokens / spread(seconds)["median"],
        how=how_measured(where),
    )


def _check(workload: Workload, steps: int) -> None:
    if steps < 2:
        raise OptionError(f"{steps=}: a spread of times needs at least 2 steps.")
    if workload.base:
        raise OptionError(f"a base of {workload.base} is predicted only; measure with base=''.")


@dataclass(frozen=True)
class Before:
    """What a device held before anything was built: storages by address; bytes on CUDA."""

    storages: Mapping[int, int]
    allocated: int


def there_before(device: torch.device) -> Before:
    """Return what is on a device now; what the CPU ops keep for any mask is dropped first."""
    # The reused tile belongs to what attached masks keep, whoever made it before.
    vars(_sampled_cpu._scratch).clear()
    gc.collect()
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return Before(_alive(device), allocated)


def _alive(device: torch.device) -> dict[int, int]:
    """Return the bytes of every storage on a device that some tensor holds, by its address."""
    # Not isinstance: it would ask lazy modules for their class, and so import them.
    kinds = ((each, type(each)) for each in gc.get_objects())
    tensors = (t for t, kind in kinds if issubclass(kind, Tensor) and kind is not FakeTensor)
    return _storages(t for t in tensors if t.device.type == device.type)


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Return the bytes of tensors' storages by address: shared ones once, empty ones not."""
    # Sparse tensors have no storage of their own: their indices and values are tensors, too.
    local = (local_part(t) for t in tensors if isinstance(t, Tensor))
    strided = (t for t in local if t.layout == torch.strided)
    storages = [t.untyped_storage() for t in strided]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def _peak(built: Built, device: torch.device, before: Before) -> MemoryUse:
    """Return the bytes of the heavier of two steps, by part."""
    gc.collect()
    stands = standing(built, device, before)
    uses: list[MemoryUse] = []
    for _ in range(_TRIES):
        use = recorded(built, device, before, stands)
        if use is None:
            continue
        uses.append(use)
        if len(uses) == _RECORDS:
            return max(uses, key=lambda use: use.peak)
    raise RecordLostError(
        f"the profiler recorded allocations in {len(uses)} of {_TRIES} steps; wanted {_RECORDS}. "
        "The machine is too busy: try again."
    )


def recorded(
    built: Built, device: torch.device, before: Before, stands: Mapping[str, int]
) -> MemoryUse | None:
    """Take a step and return its bytes by part; None where the profiler lost events."""
    for p in built.model.parameters():
        p.grad = None
    above = sum(stands.values())
    if device.type == "cuda":  # what the allocator says: rounding, and the libraries' buffers
        above = torch.cuda.memory_allocated(device) - before.allocated
    with Allocations(device) as record, _marked(built, record) as gradients:
        built.step()
    return _split(record.stretches, gradients, stands, above) if record.complete else None


def standing(
    built: Built, device: torch.device, before: Before, buckets: Mapping[int, int] | None = None
) -> dict[str, int]:
    """Return the bytes that are there between two steps: weights, diff, optimizer, inputs, buckets.

    ``buckets`` are DDP's, by address, for only DDP knows which they are.
    """
    buckets = buckets or {}

    def here(tensors: Iterable[Any]) -> dict[int, int]:
        return _storages(
            t for t in tensors if isinstance(t, Tensor) and t.device.type == device.type
        )

    added = here(added_by(built.model, built.attachment))
    model = here([*built.model.parameters(), *built.model.buffers()])
    kinds = {"optimizer": here(state_of(built.optimizer)), "inputs": here(built.inputs.values())}
    gradients = here(p.grad for p in built.model.parameters())
    weights = {key: size for key, size in model.items() if key not in added}
    known = {*weights, *gradients, *buckets, *kinds["optimizer"], *kinds["inputs"]}
    # Whatever else is there now and was not before: indices, bases, plans, masks, row tables.
    fresh = {k: n for k, n in _alive(device).items() if k not in before.storages}
    diff = {key: size for key, size in (fresh | added).items() if key not in known}
    kinds |= {"weights": weights, "diff": diff, "buckets": dict(buckets)}
    return {name: sum(found.values()) for name, found in kinds.items()}


@contextmanager
def _marked(built: Built, record: Allocations) -> Iterator[dict[str, int]]:
    """Mark where the forward pass, each gradient, the backward pass and the step end.

    Gives the bytes of gradients by the name of their mark. Shards of gradients are set by FSDP, and
    nothing says when: they count as gradients from the end of the backward pass on.
    """
    gradients: dict[str, int] = {}
    seen: set[int] = set()

    def accumulated(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        storage = local_part(parameter.grad).untyped_storage()
        if storage.data_ptr() in seen:
            return
        seen.add(storage.data_ptr())
        name = f"gradient {len(gradients)}"
        gradients[name] = storage.nbytes()
        record.mark(name)

    sharded = any(is_sharded(p) for p in built.model.parameters())
    hooks: list[Any] = [
        p.register_post_accumulate_grad_hook(accumulated)
        for p in built.model.parameters()
        if p.requires_grad
    ]
    hooks.append(built.model.register_forward_hook(lambda *_: record.mark("forward")))

    with _then(built, accumulated) if sharded else nullcontext():
        try:
            yield gradients
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _then(built: Built, accumulated: Callable[[Tensor], None]) -> Iterator[None]:
    """Within: after each backward pass show every parameter to ``accumulated``."""
    backward = built.backward

    def both(loss: Tensor) -> None:
        backward(loss)
        for p in built.model.parameters():
            accumulated(p)

    with mock.patch.object(built, "backward", both):
        yield


def _split(
    stretches: list[Stretch],
    gradients: Mapping[str, int],
    stands: Mapping[str, int],
    above: int,
) -> MemoryUse:
    """Return the parts at the highest moment.

    Args:
        stretches: of one step, from its beginning.
        gradients: bytes by mark.
        stands: bytes of what was there, by part.
        above: what the levels of the stretches are counted from.
    """
    top = max(range(len(stretches)), key=lambda i: stretches[i].peak)
    there = sum(gradients.get(s.name, 0) for s in stretches[:top]) + stands["buckets"]
    forward = next(s.level for s in stretches if s.name == "forward")
    kept = sum(stands[part] for part in ("weights", "diff", "optimizer", "buckets"))
    return split(
        above + stretches[top].peak,
        weights=stands["weights"],
        diff=stands["diff"],
        gradients=there,
        optimizer=stands["optimizer"],
        held_for_backward=above + forward - kept,
    )


def _times(step: Callable[[], Any], device: torch.device, steps: int) -> list[float]:
    """Return the seconds of each of some steps, from an idle device until it is idle again."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    seconds = []
    for _ in range(steps):
        wait()
        start = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds
