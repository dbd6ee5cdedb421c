"""Where adapters lie: budgets that hold at every moment, least recently used first, same bits."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import Adapter, SparseDiff
from sparseft._text import parse_bytes
from sparseft.composition.residency import Moved, Residency
from sparseft.composition.residency_copies import CudaCopies, Landed, PlainCopies, copies_for
from sparseft.errors import (
    AdapterFormatError,
    CompositionError,
    OptionError,
    UnknownNameError,
)

TENSORS = ("a", "b", "c")
GPU = torch.device("meta")  # any device that is not the CPU; the copies below stay readable


def adapter_of(entries: int, seed: int = 0, *, head: int = 0) -> Adapter:
    """Three diffs of ``entries`` fp32 entries each: 24 * entries bytes."""
    generator = torch.Generator().manual_seed(seed)
    diffs = {}
    for name in TENSORS:
        dense = torch.zeros(4 * entries)
        dense[torch.randperm(4 * entries, generator=generator)[:entries]] = 1.0 + torch.rand(
            entries, generator=generator
        )
        diffs[name] = SparseDiff.from_dense(dense)
    return Adapter(diffs, dense={"head": torch.ones(head)} if head else None, name=f"s{seed}")


class Machine:
    """Copies that know how many bytes of each kind are alive, also while a copy is made."""

    pins = True

    def __init__(self, host: int | None = None, device: int | None = None) -> None:
        self.budgets = {"host": host, "device": device}
        self.alive = {"host": 0, "device": 0}
        self.most = {"host": 0, "device": 0}
        self.waits = 0
        self.room: int | None = None  # of the device, whatever the budget

    def __call__(self, device: torch.device) -> Machine:
        return self

    def host_cost(self, nbytes: int) -> int:
        return nbytes

    def _made(self, where: str, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        size = copy.numel() * copy.element_size()
        self.alive[where] += size
        self.most[where] = max(self.most[where], self.alive[where])

        def gone() -> None:
            self.alive[where] -= size

        weakref.finalize(copy, gone)
        return copy

    def to_host(self, tensor):
        return self._made("host", tensor)

    def to_device(self, parts, device, *, pinned):
        size = sum(p.numel() * p.element_size() for p in parts)
        if self.room is not None and self.alive["device"] + size > self.room:
            raise torch.OutOfMemoryError("no room")

        def ready() -> None:
            self.waits += 1

        return Landed([self._made("device", part) for part in parts], ready)


@pytest.fixture
def files(tmp_path):
    """Adapters of 240, 480, ... bytes on disk, opened lazily."""

    def make(*entries: int, head: int = 0, compact: bool = False) -> dict[str, Adapter]:
        out = {}
        for i, n in enumerate(entries):
            adapter_of(n, i, head=head).save(tmp_path / f"n{i}", compact=compact)
            out[f"n{i}"] = Adapter.load(tmp_path / f"n{i}", check="lazy")
        return out

    return make


def residency_of(adapters, **kwargs) -> Residency:
    residency = Residency(**kwargs)
    for name, adapter in adapters.items():
        residency.add(name, adapter)
    return residency


def test_on_a_cpu_a_used_adapter_leaves_its_file(files, tmp_path):
    adapters = files(10, 10)
    residency = residency_of(adapters)
    assert residency.where("n0") == "mapped"
    expected = adapter_of(10, 0)
    first = residency.diff("n0", "a", "cpu")
    assert residency.where("n0") == "host"
    assert residency.where("n1") == "mapped"
    assert first.equals(expected["a"])
    assert residency.diff("n0", "a", "cpu") is first
    assert residency.moved == Moved(hits=1, misses=1, host_bytes=80)
    os.truncate(tmp_path / "n0" / "adapter.safetensors", 0)
    assert residency.diff("n0", "a", "cpu").equals(expected["a"]), "it needs its file no more"
    with pytest.raises(AdapterFormatError, match=r"n0.adapter\.safetensors: the file was cut"):
        residency.diff("n0", "b", "cpu")


def test_without_room_it_stays_in_its_file(files):
    adapters = files(10, 20)
    residency = residency_of(adapters, host_bytes=300)
    for _ in range(2):
        assert residency.diff("n0", "a", "cpu").equals(adapters["n0"]["a"])
        assert residency.diff("n1", "a", "cpu").equals(adapters["n1"]["a"])
    assert residency.where("n0") == "host"
    assert residency.where("n1") == "mapped"
    assert residency.moved == Moved(hits=1, misses=3, streamed=2, host_bytes=80)
    assert residency.report().host_bytes == 80


def test_an_adapter_in_memory_is_used_as_it_is():
    adapter = adapter_of(10, head=3)
    residency = residency_of({"x": adapter}, host_bytes=0)
    assert residency.diff("x", "a", "cpu") is adapter["a"]
    assert residency.dense("x", "head", "cpu") is adapter.dense["head"]
    assert residency.where("x") == "memory"
    assert residency.moved == Moved(hits=2)


def test_compact_indices_are_not_held_twice(files):
    adapters = files(1000, compact=True)
    assert adapters["n0"].header("a").encoding == "gaps"
    residency = residency_of(adapters)
    held = residency.diff("n0", "a", "cpu")
    assert held.indices.data_ptr() == adapters["n0"]["a"].indices.data_ptr()
    assert held.values.data_ptr() != adapters["n0"]["a"].values.data_ptr()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dense_tensors_have_room_of_their_own(files, device):
    adapters = files(10, head=100)
    machine = Machine()
    residency = residency_of(adapters, device_bytes=300, host_bytes=300, copies=machine)
    residency.diff("n0", "a", device)
    assert residency.dense("n0", "head", device).tolist() == [1.0] * 100
    assert residency.moved.streamed == 1, "400 bytes do not fit"
    assert residency.where("n0") == {"cpu": "host", "meta": "device"}[device]
    assert machine.alive["host" if device == "cpu" else "device"] == 80


def test_up_to_the_device_and_no_host_copy_where_all_fit(files):
    machine = Machine()
    residency = residency_of(files(10, 10), device_bytes=480, copies=machine)
    for name in ("n0", "n1", "n0"):
        for tensor in TENSORS:
            residency.diff(name, tensor, GPU)
    assert residency.where("n0") == residency.where("n1") == "device"
    assert residency.moved == Moved(hits=3, misses=6, device_bytes=480)
    assert machine.alive == {"host": 0, "device": 480}
    assert machine.waits == 3, "a later use waits for the copy"


def test_moved_down_it_is_in_host_memory_already(files):
    machine = Machine()
    residency = residency_of(files(10, 10, 10), device_bytes=480, copies=machine)
    for name in ("n0", "n1", "n2"):
        for tensor in TENSORS:
            residency.diff(name, tensor, GPU)
    assert [residency.where(n) for n in ("n0", "n1", "n2")] == ["host", "device", "device"]
    assert residency.moved == Moved(misses=9, host_bytes=720, device_bytes=720, evicted=1)
    before = residency.moved
    for tensor in TENSORS:
        residency.diff("n0", tensor, GPU)
    assert residency.moved - before == Moved(misses=3, device_bytes=240, evicted=1)
    assert residency.where("n1") == "host", "used longest ago"


def test_one_larger_than_the_device_moves_nobody(files):
    machine = Machine()
    residency = residency_of(files(10, 100), device_bytes=300, host_bytes=3000, copies=machine)
    residency.diff("n0", "a", GPU)
    for _ in range(2):
        residency.diff("n1", "a", GPU)
    assert residency.where("n0") == "device"
    assert residency.where("n1") == "host"
    moved = residency.moved
    assert (moved.streamed, moved.evicted, moved.device_bytes) == (2, 0, 80 + 2 * 800)


def test_together_they_do_not_push_each_other_out(files):
    def rounds(residency):
        for _ in range(3):
            for tensor in TENSORS:
                for name in ("n0", "n1", "n2"):
                    residency.diff(name, tensor, GPU)
        return residency.moved

    def make():
        return residency_of(files(10, 10, 10), device_bytes=480, copies=Machine())

    assert rounds(make()).hits == 0, "each is moved down before it is used again"
    residency = make()
    with residency.using("n0", "n1", "n2"):
        moved = rounds(residency)
        with pytest.raises(CompositionError, match="'n1' is in use"):
            residency.remove("n1")
    assert (moved.hits, moved.evicted, moved.streamed) == (12, 0, 9)
    residency.remove("n1")
    residency.diff("n2", "a", GPU)
    assert residency.where("n2") == "device", "afterwards there is room again"


def test_a_device_out_of_memory_sets_the_limit(files):
    machine = Machine()
    machine.room = 500
    residency = residency_of(files(10, 10, 10), copies=machine)
    for name in ("n0", "n1", "n2"):
        for tensor in TENSORS:
            assert residency.diff(name, tensor, GPU).nnz == 10
    assert [residency.where(n) for n in ("n0", "n1", "n2")] == ["mapped", "device", "device"]
    machine.room = 0
    residency = residency_of(files(10), copies=machine)
    with pytest.raises(torch.OutOfMemoryError):
        residency.diff("n0", "a", GPU)
    assert residency.where("n0") == "mapped"


SIZES = (3, 5, 8, 13, 21)
requests = st.lists(
    st.tuples(st.integers(0, len(SIZES) - 1), st.sampled_from(TENSORS), st.booleans()),
    max_size=30,
)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i, n in enumerate(SIZES):
        adapter_of(n, i).save(folder / f"n{i}")
    return folder


@given(asked=requests, host=st.integers(0, 1300), device=st.integers(0, 1300))
@settings(max_examples=80, deadline=None)
def test_budgets_hold_at_every_moment(on_disk, asked, host, device):
    """What is alive is counted while copies are made; nobody here keeps what was handed out."""
    machine = Machine()
    adapters = {f"n{i}": Adapter.load(on_disk / f"n{i}", check="lazy") for i in range(len(SIZES))}
    residency = residency_of(adapters, device_bytes=device, host_bytes=host, copies=machine)
    for i, tensor, on_device in asked:
        name = f"n{i}"
        got = residency.diff(name, tensor, GPU if on_device else "cpu")
        assert got.equals(adapters[name][tensor])
        del got
        report = residency.report()
        assert report.host_bytes == machine.alive["host"] <= host
        assert sum(report.device_bytes.values()) == machine.alive["device"] <= device
    assert machine.most["host"] <= host
    # One that does not fit is copied, used and dropped; all others are within the budget.
    streamed = max((8 * n for n in SIZES if 24 * n > device), default=0)
    assert machine.most["device"] <= device + streamed


@given(asked=requests, budget=st.integers(0, 1300))
@settings(max_examples=80, deadline=None)
def test_least_recently_used_first(on_disk, asked, budget):
    """Against the definition: a list of adapters by last use, cut off where the budget ends."""
    residency = Residency(host_bytes=budget)
    for i in range(len(SIZES)):
        residency.add(f"n{i}", Adapter.load(on_disk / f"n{i}", check="lazy"))
    held: list[int] = []
    for i, tensor, _ in asked:
        residency.diff(f"n{i}", tensor, "cpu")
        if i in held:
            held.remove(i)
        elif 24 * SIZES[i] > budget:
            continue
        held.append(i)
        while sum(24 * SIZES[j] for j in held) > budget:
            held.pop(0)
        for j in range(len(SIZES)):
            assert residency.where(f"n{j}") == ("host" if j in held else "mapped")


def test_threads(on_disk):
    adapters = {f"n{i}": Adapter.load(on_disk / f"n{i}", check="lazy") for i in range(len(SIZES))}
    expected = {n: {t: a[t] for t in TENSORS} for n, a in adapters.items()}
    machine = Machine()
    residency = residency_of(adapters, device_bytes=700, host_bytes=900, copies=machine)
    wrong: list[object] = []

    def work(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        try:
            for _ in range(150):
                name = f"n{int(torch.randint(len(SIZES), (), generator=draw))}"
                tensor = TENSORS[int(torch.randint(3, (), generator=draw))]
                with residency.using(name):
                    got = residency.diff(name, tensor, GPU if seed % 2 else "cpu")
                if not got.equals(expected[name][tensor]):
                    wrong.append((name, tensor))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    moved = residency.moved
    assert moved.hits + moved.misses == 600
    report = residency.report()
    assert report.host_bytes <= 900
    assert sum(report.device_bytes.values()) <= 700


def test_report(files):
    residency = residency_of(files(10, 10), device_bytes="1KiB", copies=Machine())
    residency.diff("n1", "a", GPU)
    report = residency.report()
    assert [r.name for r in report.residents] == ["n1", "n0"], "most recently used first"
    text = str(report)
    assert "80 B of 1.0 KiB" in text
    assert text.splitlines()[1].split()[:2] == ["n1", "device"]
    assert json.loads(json.dumps(report.to_json()))["device_bytes"] == {"meta": 80}
    assert repr(residency) == "Residency(adapters=2, host=0 B, meta=80 B)"
    assert "1 misses (0 streamed)" in str(report.moved)


def test_a_deep_copy_is_independent(files):
    machine = Machine()
    residency = residency_of(files(10, 10), device_bytes=300, copies=machine)
    residency.diff("n0", "a", GPU)
    alive = dict(machine.alive)
    with residency.using("n0"):
        other = copy.deepcopy(residency)
    assert machine.alive == alive, "what lies in tiers is not copied"
    assert other.moved == Moved()
    assert other.diff("n0", "a", "cpu").equals(residency.diff("n0", "a", "cpu"))
    other.remove("n0")
    assert residency.where("n0") == "device"
    pickle.loads(pickle.dumps(Residency(host_bytes=5)))


def test_bad_use(files):
    residency = residency_of(files(10, head=2))
    with pytest.raises(CompositionError, match="'n0' is here already"):
        residency.add("n0", adapter_of(3))
    with pytest.raises(CompositionError, match="'x' is str, wanted an Adapter"):
        residency.add("x", "swahili/")
    for call in (residency.remove, residency.where, lambda n: residency.diff(n, "a", "cpu")):
        with pytest.raises(UnknownNameError, match="no adapter is called 'm0'. Did you mean 'n0'?"):
            call("m0")
    with (
        pytest.raises(UnknownNameError, match="no adapter is called 'zz'"),
        residency.using("n0", "zz"),
    ):
        pass
    residency.remove("n0")
    with pytest.raises(UnknownNameError):
        residency.where("n0")
    residency.add("n0", adapter_of(3, head=2))
    with pytest.raises(UnknownNameError, match="'n0' has no diff of 'head'"):
        residency.diff("n0", "head", "cpu")
    with pytest.raises(UnknownNameError, match="no dense tensor 'haed'. Did you mean 'head'?"):
        residency.dense("n0", "haed", "cpu")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(0, 0), (7, 7), ("4096", 4096), ("2GiB", 2 << 30), ("500 MB", 500_000_000),
     ("1.5 kib", 1536), (".5KB", 500), (" 3 B ", 3), ("1TiB", 1 << 40)],
)  # fmt: skip
def test_bytes(given, wanted):
    assert parse_bytes(given) == wanted


@pytest.mark.parametrize("given", [-1, "-1", "2 GigaBytes", "", "GiB", "1e9", 1.5, True, "nan"])
def test_no_bytes(given):
    with pytest.raises(ValueError, match="is no number of bytes"):
        parse_bytes(given)
    with pytest.raises(OptionError, match="device_bytes: .* None means no limit"):
        Residency(given)
    with pytest.raises(OptionError, match="host_bytes: "):
        Residency(host_bytes=given)


def test_pinned_blocks_are_powers_of_two():
    cost = CudaCopies().host_cost
    assert [cost(n) for n in (0, 1, 2, 3, 1024, 1025)] == [0, 1, 2, 4, 1024, 2048]
    assert isinstance(copies_for(torch.device("cuda")), CudaCopies)
    assert isinstance(copies_for(torch.device("cpu")), PlainCopies)


class Stream:
    device = torch.device("meta")

    def __init__(self, log):
        self.log = log

    def wait_event(self, event):
        self.log.append(("waits", self, event.recorded))


class Event:
    recorded: Stream | None = None

    def record(self, stream):
        self.recorded = stream


class Part(torch.Tensor):
    def record_stream(self, stream):
        stream.log.append(("in use", stream))


def test_only_another_stream_waits(monkeypatch):
    """The order of calls, without a GPU; whether they do what they say is the GPU lane's."""
    log: list[tuple[object, ...]] = []
    one, other = Stream(log), Stream(log)
    current = [one]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    parts = [torch.zeros(2, device="meta").as_subclass(Part) for _ in range(2)]
    landed = CudaCopies().to_device(parts, torch.device("meta"), pinned=True)
    assert landed.ready is not None
    landed.ready()
    assert log == [], "on the stream of the copy the order is given"
    current[0] = other
    landed.ready()
    assert log == [("waits", other, one), ("in use", other), ("in use", other)]


@pytest.mark.gpu
def test_pinned_and_on_the_gpu(files):
    adapters = files(1000, 1000)
    size = 3 * 2 * 4000
    residency = residency_of(adapters, device_bytes=size)
    before = torch.cuda.memory_allocated()
    for name in ("n0", "n1"):
        for tensor in TENSORS:
            got = residency.diff(name, tensor, "cuda")
            assert got.device.type == "cuda"
            assert got.equals(adapters[name][tensor])
    del got
    assert [residency.where(n) for n in ("n0", "n1")] == ["host", "device"]
    assert residency.report().host_bytes == 2 * 3 * 2 * 4096, "pinned blocks, rounded up"
    assert torch.cuda.memory_allocated() - before <= 3 * 2 * 4096
    assert residency.diff("n0", "a", "cpu").values.is_pinned()
    again = residency.moved
    residency.diff("n0", "a", "cuda")
    assert (residency.moved - again).host_bytes == 0, "from pinned memory, not from the file"


@pytest.mark.gpu
def test_another_stream_waits_for_the_copy(files):
    """A long kernel ahead of the copy; a second stream that asks later must see the values."""
    adapters = files(200_000)
    residency = residency_of(adapters, device_bytes=10**9)
    expected = adapters["n0"]["a"].values.double().sum()
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        torch.cuda._sleep(200_000_000)
        residency.diff("n0", "a", "cuda")
    with torch.cuda.stream(other):
        total = residency.diff("n0", "a", "cuda").values.double().sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-12)
    assert residency.moved.hits == 1
    residency.remove("n0")  # while both streams may still be at work: the memory waits for them
    torch.cuda.synchronize()
