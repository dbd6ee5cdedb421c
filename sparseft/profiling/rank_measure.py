"""A training step in several real processes: what one of them holds, and what they exchange.

gloo between processes of one machine on a CPU, NCCL with a GPU each. Memory is that of the rank
that holds most, from the record that a single process has (`measure`); bytes are those that
torch.distributed's own marks in a profile name, in a step of their own. Nothing is timed: ranks
that share a machine wait for each other's turn on it.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from sparseft.errors import OptionError
from sparseft.profiling.allocations import RecordLostError, how_measured
from sparseft.profiling.communication import Communication
from sparseft.profiling.measure import WARMUP, Measurement, recorded, standing, there_before
from sparseft.profiling.sharding import check_ranks, sharder
from sparseft.profiling.sides import Built, build
from sparseft.profiling.worker import call_ranks
from sparseft.profiling.workload import Way, Workload

__all__ = ["MOST_RANKS", "Buckets", "communicated", "measure_rank", "measure_ranks"]

# Of one machine's CPU: each is an interpreter with torch, some 400 MB, whose turn must come.
MOST_RANKS = 8
_RECORDS = 3
_SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8}
_SIZES |= {"unsigned char": 1, "signed char": 1, "bool": 1, "char": 1}


def measure_ranks(
    workload: Workload,
    way: Way,
    device: str = "cpu",
    *,
    world_size: int,
    sharding: str = "fsdp",
    threads: int | None = None,
) -> Measurement:
    """Run a step in so many processes and return what the heaviest of them took.

    Args:
        workload: the step; ``batch`` is each rank's.
        way: how it trains.
        device: ``"cpu"``: gloo; ``"cuda"``: NCCL, rank i on device i.
        world_size: processes, at least 2.
        sharding: ``"fsdp"`` or ``"ddp"``, see `sharding`.
        threads: torch's, in each; None: what this process has.

    Raises:
        NotMeasuredError: a rank ran out of memory, was killed or failed; says which and why.
        OptionError: a base of 4 or 8 bits; less than two ranks.
    """
    check_ranks(world_size, sharding)
    if workload.base:
        raise OptionError(f"a base of {workload.base} is predicted only; measure with base=''.")
    if world_size == 1:
        raise OptionError("world_size=1 is measured by `measure`; wanted at least 2.")
    request = {
        "workload": asdict(workload),
        "way": asdict(way),
        "device": device,
        "sharding": sharding,
    }
    threads = torch.get_num_threads() if threads is None else threads
    answers = call_ranks(request, world_size, threads=threads)
    return max(map(Measurement.from_json, answers), key=lambda found: found.use.peak)


def measure_rank(
    workload: Workload, way: Way, device: torch.device | str, sharding: str
) -> Measurement:
    """Be a rank of the initialised default group: run the step and return what this one took.

    Every rank of the group calls it.

    Raises:
        RecordLostError: the profiler lost its events in every step.
    """
    where = torch.device(device)
    before = there_before(where)
    built, buckets = _built(workload, way, where, sharding)
    for _ in range(WARMUP):
        built.step()
    gc.collect()
    _let_go(built.model)
    stands = standing(built, where, before, buckets.storages)
    uses = []
    for _ in range(_RECORDS):  # as many on each rank, whatever its profiler loses
        with _workers_finish():
            use = recorded(built, where, before, stands)
        _let_go(built.model)
        uses += [use] if use is not None else []
    sent = communicated(built, where)
    if not uses:
        raise RecordLostError(
            f"the profiler recorded no allocations in {_RECORDS} steps of a rank. The machine is "
            "too busy: try again."
        )
    return Measurement(
        # What a worker's thread frees is not always seen, and only ever makes a record higher.
        use=min(uses, key=lambda use: use.peak),
        trainable=built.trainable,
        seconds={},
        steps=0,
        tokens_per_second=0.0,
        how=f"{how_measured(where)}, {dist.get_world_size()} processes, {dist.get_backend()}",
        communication=sent,
    )


class Buckets:
    """Has a communication hook for DDP that reduces as DDP does, and sees what is reduced.

    Attributes:
        reduced: bytes, all steps together.
        storages: bytes of the buckets' memory by address, of the last step.
    """

    def __init__(self) -> None:
        self.reduced = 0
        self.storages: dict[int, int] = {}

    def hook(self, group, bucket):  # DDP reads annotations, and wants no strings
        """Reduce a bucket; for ``register_comm_hook``."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        if bucket.index() == 0:
            self.storages.clear()
        buffer: Tensor = bucket.buffer()
        self.reduced += buffer.numel() * buffer.element_size()
        self.storages[buffer.untyped_storage().data_ptr()] = buffer.untyped_storage().nbytes()
        return allreduce_hook(group, bucket)


def _built(
    workload: Workload, way: Way, device: torch.device, sharding: str
) -> tuple[Built, Buckets]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    buckets = Buckets()
    if sharding == "fsdp":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return build(workload, way, device, shard=sharder(mesh)), buckets
    built = build(workload, way, device)
    if any(p.requires_grad for p in built.model.parameters()):  # DDP refuses a frozen model
        built.wrapped = DistributedDataParallel(built.model)
        built.wrapped.register_comm_hook(None, buckets.hook)
    return built, buckets


def _let_go(model: Any) -> None:
    """Drop the last layer's gathered weights, which FSDP frees at the beginning of the next step.

    They were there before the record, and a CPU's profiler does not know the size of what it then
    sees freed.
    """
    if hasattr(model, "_get_fsdp_state"):
        state = model._get_fsdp_state()
        state._comm_ctx.all_gather_state = None


@contextlib.contextmanager
def _workers_finish() -> Iterator[None]:
    """After each collective wait for its worker: what gloo's thread frees later is in no record."""
    wait = dist.Work.wait

    def waited(work: Any, *args: Any) -> Any:
        done = wait(work, *args)
        time.sleep(0.002)
        return done

    with mock.patch.object(dist.Work, "wait", waited):
        yield


def communicated(built: Built, device: torch.device) -> Communication:
    """Take a step and return what torch.distributed's marks in its profile say was exchanged.

    A collective is marked by its operation (``c10d::``), which names the tensors of an all-gather
    and a reduce-scatter, and by its backend (``gloo:``, ``nccl:``), which names those of an
    all-reduce and a broadcast. gloo makes an all-reduce of a reduce-scatter.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        built.step()
    found = dict.fromkeys(("all_reduced", "all_gathered", "reduce_scattered", "broadcast"), 0)
    backend = dist.get_backend()
    for event in profile.profiler.kineto_results.events():
        kind, place = _MARKS.get(event.name().replace(f"{backend}:", "backend:"), ("", 0))
        if kind:
            found[kind] += _size(event, place)
    if backend == "gloo":
        found["all_reduced"] -= found["reduce_scattered"]
    return Communication(**found)


_MARKS = {
    "c10d::_allgather_base_": ("all_gathered", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scattered", 1),
    "backend:all_reduce": ("all_reduced", 0),
    "backend:broadcast": ("broadcast", 0),
}


def _size(event: Any, place: int) -> int:
    entries = 1
    for length in event.shapes()[place]:
        entries *= length
    return entries * _SIZES[event.dtypes()[place]]
