"""Where adapters' tensors lie: on the model's device, in host memory, or in their mapped files."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor

from sparseft._text import did_you_mean, human_bytes, parse_bytes
from sparseft.adapter import Adapter, DiffSource
from sparseft.composition.residency_copies import Copies, copies_for
from sparseft.composition.residency_report import Moved, ResidencyReport, Resident, Tier
from sparseft.composition.residency_shelf import (
    Held,
    Item,
    Kind,
    Parcel,
    Shelf,
    nbytes_of,
    parts_of,
    rebuilt,
)
from sparseft.diff import SparseDiff
from sparseft.errors import CompositionError, OptionError, UnknownNameError

__all__ = ["Moved", "Residency", "ResidencyReport", "Resident", "Tier"]


class Residency:
    """Keeps adapters' tensors where they are fastest, within byte budgets.

    There are three tiers. "device": the GPU of the model; a CPU model has none. "host": pinned
    memory for GPUs, ordinary memory for CPUs, in both cases independent of the file. "mapped": in
    the file, read when used. (Adapters that come from no file are in "memory": their own tensors.)

    Whatever is asked for is brought up as far as the budgets allow, tensor by tensor, with room set
    aside for the whole adapter. Room is made by moving the least recently used adapters down. An
    adapter larger than a budget does not get in: it stays below and is copied at each use.
    On its way to a device an adapter is kept in host memory, too, once the device cannot hold all
    adapters; moved down, it is there already.

    The bytes do not depend on the tier. A budget counts what lies here; a tensor that was handed
    out lives as long as whoever has it.

    Args:
        device_bytes: budget of each device: a number, text such as "2GiB", or None for no limit.
            Without a limit a device that runs out of memory sets it: adapters are moved down.
        host_bytes: the same for host memory.
        copies: how to copy for a device (`copies_for`).

    Example:
        >>> import torch
        >>> from sparseft import Adapter, SparseDiff
        >>> residency = Residency(host_bytes="1MiB")
        >>> change = SparseDiff.from_dense(torch.tensor([0.0, 2.0]))
        >>> residency.add("a", Adapter({"weight": change}))
        >>> residency.where("a"), residency.diff("a", "weight", "cpu").values.tolist()
        ('memory', [2.0])

    Safe to use from several threads: one lock, held while copying.

    Raises:
        OptionError: a budget that is no number of bytes.
    """

    def __init__(
        self,
        device_bytes: int | str | None = None,
        host_bytes: int | str | None = None,
        *,
        copies: Callable[[torch.device], Copies] = copies_for,
    ) -> None:
        self._device_budget = _budget("device_bytes", device_bytes)
        self._host = Shelf(_budget("host_bytes", host_bytes))
        self._devices: dict[torch.device, Shelf] = {}
        self._copies = copies
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self._sizes: dict[tuple[str, Kind], list[int]] = {}  # bytes of every tensor
        self._total: dict[tuple[str, Kind], int] = {}
        self._in_use: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()  # fields of `Moved`

    # The adapters.

    def add(self, name: str, adapter: Adapter) -> None:
        """Take care of an adapter; nothing is read or copied yet.

        Raises:
            CompositionError: not an adapter, or the name is taken.
        """
        if not isinstance(adapter, Adapter):
            raise CompositionError(
                f"{name!r} is {type(adapter).__name__}, wanted an Adapter: Adapter.load(path, "
                "check='lazy') opens one."
            )
        with self._lock:
            if name in self._adapters:
                raise CompositionError(
                    f"an adapter called {name!r} is here already; remove({name!r}) first, or "
                    "choose another name."
                )
            sizes = []
            for own in adapter.names:
                header = adapter.header(own)
                values = header.nnz * header.dtype.itemsize
                sizes += [header.nbytes - values, values]
            self._adapters[name] = adapter
            self._adapters.move_to_end(name, last=False)  # not used yet
            self._measure(name, "diff", sizes)

    def remove(self, name: str) -> None:
        """Forget an adapter and what lies here of it.

        Raises:
            UnknownNameError: there is none of that name.
            CompositionError: it is in use (`using`).
        """
        with self._lock:
            self._known(name)
            if self._in_use[name]:
                raise CompositionError(f"adapter {name!r} is in use; remove it afterwards.")
            for shelf in (self._host, *self._devices.values()):
                shelf.drop(name)
            del self._adapters[name]
            for kind in get_args(Kind):
                self._sizes.pop((name, kind), None)
                self._total.pop((name, kind), None)

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Keep adapters where they are, or get, for the length of a ``with`` block.

        Those that are used together, tensor by tensor, would else move each other down in turn when
        they do not all fit; so the first ones that fit stay, and the others are copied at each use.

        Raises:
            UnknownNameError: there is none of that name.
        """
        with self._lock:
            for name in names:
                self._known(name)
            self._in_use.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._in_use.subtract(names)

    # The tensors.

    def diff(self, name: str, tensor_name: str, device: torch.device | str) -> SparseDiff:
        """Return one diff of an adapter on ``device``.

        Raises:
            UnknownNameError: no such adapter, or it has no such diff.
            AdapterFormatError: its file is damaged, or was cut short since it was opened.
        """
        with self._lock:
            adapter = self._known(name)
            if tensor_name not in adapter.diffs:
                raise UnknownNameError(
                    f"adapter {name!r} has no diff of {tensor_name!r}."
                    f"{did_you_mean(tensor_name, adapter.diffs)}"
                )
            return self._get(name, "diff", adapter.diffs, tensor_name, _as_device(device))

    def dense(self, name: str, tensor_name: str, device: torch.device | str) -> Tensor:
        """Return one dense tensor of an adapter on ``device``; not to be written to.

        Raises:
            UnknownNameError: no such adapter, or it has no such dense tensor.
            AdapterFormatError: its file is damaged, or was cut short since it was opened.
        """
        with self._lock:
            adapter = self._known(name)
            if tensor_name not in adapter.dense:
                raise UnknownNameError(
                    f"adapter {name!r} has no dense tensor {tensor_name!r}."
                    f"{did_you_mean(tensor_name, adapter.dense)}"
                )
            if (name, "dense") not in self._sizes:
                self._measure(name, "dense", map(nbytes_of, adapter.dense.values()))
            return self._get(name, "dense", adapter.dense, tensor_name, _as_device(device))

    # What lies where.

    @property
    def moved(self) -> Moved:
        """What was asked for and copied so far; the difference of two says what lay between."""
        with self._lock:
            return Moved(**self._counts)

    def where(self, name: str) -> Tier:
        """Return the highest tier in which an adapter has room.

        Raises:
            UnknownNameError: there is none of that name.
        """
        with self._lock:
            adapter = self._known(name)
            if any(name in shelf.owners() for shelf in self._devices.values()):
                return "device"
            if name in self._host.owners():
                return "host"
            return "mapped" if isinstance(adapter.diffs, DiffSource) else "memory"

    def report(self) -> ResidencyReport:
        """Describe every adapter and the totals, most recently used first."""
        with self._lock:
            residents = tuple(
                Resident(
                    name=name,
                    tier=self.where(name),
                    nbytes=self._total[name, "diff"],
                    host_bytes=self._host.bytes_of(name),
                    device_bytes={
                        str(device): held
                        for device, shelf in self._devices.items()
                        if (held := shelf.bytes_of(name))
                    },
                )
                for name in reversed(self._adapters)
            )
            return ResidencyReport(residents, self._device_budget, self._host.budget, self.moved)

    def __getstate__(self) -> dict[str, Any]:
        # A deep copy or pickle takes the adapters along, and fills tiers of its own when used.
        with self._lock:
            state = {key: value for key, value in self.__dict__.items() if key != "_lock"}
            return {
                **state,
                "_adapters": OrderedDict(self._adapters),
                "_host": Shelf(self._host.budget),
                "_devices": {},
                "_in_use": Counter(),
                "_counts": Counter(),
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def __repr__(self) -> str:
        report = self.report()
        held = {"host": report.host_bytes, **report.device_bytes}
        tiers = ", ".join(f"{where}={human_bytes(n)}" for where, n in held.items())
        return f"Residency(adapters={len(report.residents)}, {tiers})"

    # How.

    def _measure(self, name: str, kind: Kind, sizes: Iterable[int]) -> None:
        self._sizes[name, kind] = list(sizes)
        self._total[name, kind] = sum(self._sizes[name, kind])

    def _known(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise UnknownNameError(
                f"no adapter is called {name!r}.{did_you_mean(str(name), self._adapters)}"
            )
        return self._adapters[name]

    def _get(
        self, name: str, kind: Kind, source: Mapping[str, Item], own: str, device: torch.device
    ) -> Item:
        self._adapters.move_to_end(name)
        if device.type == "cpu":
            return self._on_host(name, kind, source, own, device)[0]
        key = (name, kind)
        shelf = self._devices.setdefault(device, Shelf(self._device_budget))
        parcel = shelf.parcels.get(key)
        if parcel is not None and own in parcel.held:
            self._counts["hits"] += 1
            return parcel.held[own].use()
        crowded = shelf.budget is not None and sum(self._total.values()) > shelf.budget
        if crowded or key in self._host.parcels:
            item, pinned = self._on_host(name, kind, source, own, device)
        else:
            item, pinned = source[own], False
        if item.device == device:  # the adapter itself lies there
            self._counts["hits"] += 1
            return item
        copies = self._copies(device)
        parcel = self._place(shelf, key, self._total[key], copies)
        held = self._landed(copies, item, device, pinned, shelf, key)
        self._counts["misses"] += 1
        self._counts["streamed"] += int(parcel is None)
        self._counts["device_bytes"] += held.nbytes
        if parcel is not None:
            parcel.held[own] = held
        return held.item  # type: ignore[return-value]

    def _on_host(
        self, name: str, kind: Kind, source: Mapping[str, Item], own: str, device: torch.device
    ) -> tuple[Item, bool]:
        """Return a tensor in host memory, on its way to ``device``, and whether it is pinned.

        It is left where it is if it lies on another device, or where there is no room. What goes on
        to a device is counted there.
        """
        here = int(device.type == "cpu")
        key = (name, kind)
        parcel = self._host.parcels.get(key)
        if parcel is not None and own in parcel.held:
            self._counts["hits"] += here
            return parcel.held[own].use(), parcel.copies.pins
        item = source[own]
        on_cpu = item.device.type == "cpu"
        in_file = on_cpu and isinstance(self._adapters[name].diffs, DiffSource)
        if on_cpu and here and not in_file:
            self._counts["hits"] += 1
            return item, False
        if not on_cpu and not here:
            return item, False
        copies = self._copies(device)
        if parcel is None:
            room = sum(map(copies.host_cost, self._sizes[key]))
            parcel = self._place(self._host, key, room, copies)
        if parcel is None:
            self._counts["misses"] += here
            self._counts["streamed"] += here
            if in_file:  # what is handed out must not read the file later on
                item = rebuilt(item, [part.clone() for part in parts_of(item)])
            return (item if on_cpu else item.to("cpu")), False
        parts: list[Tensor] = parts_of(item)
        # Compact indices were decoded into memory of their own, which the adapter keeps as well.
        decoded = int(kind == "diff" and self._adapters[name].header(own).encoding == "gaps")
        kept: list[Tensor] = parts[:decoded] if in_file and not parcel.copies.pins else []
        copied: list[Tensor] = [parcel.copies.to_host(part) for part in parts[len(kept) :]]
        nbytes = sum(parcel.copies.host_cost(nbytes_of(part)) for part in parts)
        item = rebuilt(item, [*kept, *copied])
        parcel.held[own] = Held(item, nbytes)
        self._counts["misses"] += here
        self._counts["host_bytes"] += sum(map(nbytes_of, copied))
        return item, parcel.copies.pins

    def _place(
        self, shelf: Shelf, key: tuple[str, Kind], room: int, copies: Copies
    ) -> Parcel | None:
        """Set room aside, moving others down if that makes enough; None if there is too little."""
        if key in shelf.parcels:
            return shelf.parcels[key]
        if shelf.budget is not None and shelf.room + room > shelf.budget:
            victims = self._victims(shelf, key[0])
            if shelf.room - sum(map(shelf.room_of, victims)) + room > shelf.budget:
                return None
            for victim in victims:
                self._move_down(shelf, victim)
                if shelf.room + room <= shelf.budget:
                    break
        shelf.parcels[key] = Parcel(room, copies)
        return shelf.parcels[key]

    def _victims(self, shelf: Shelf, name: str) -> list[str]:
        """Return who may be moved down for ``name``, least recently used first."""
        owners = shelf.owners()
        return [n for n in self._adapters if n in owners and n != name and not self._in_use[n]]

    def _move_down(self, shelf: Shelf, name: str) -> None:
        shelf.drop(name)
        self._counts["evicted"] += 1

    def _landed(
        self,
        copies: Copies,
        item: Item,
        device: torch.device,
        pinned: bool,
        shelf: Shelf,
        key: tuple[str, Kind],
    ) -> Held:
        """Copy to a device; if its memory runs out, others are moved down, one by one."""
        while True:
            try:
                landed = copies.to_device(parts_of(item), device, pinned=pinned)
            except torch.OutOfMemoryError:
                victims = self._victims(shelf, key[0])
                if not victims:
                    if key in shelf.parcels and not shelf.parcels[key].held:
                        del shelf.parcels[key]
                    raise
                self._move_down(shelf, victims[0])
            else:
                nbytes = sum(map(nbytes_of, landed.parts))
                return Held(rebuilt(item, landed.parts), nbytes, landed.ready)


def _budget(what: str, given: int | str | None) -> int | None:
    try:
        return None if given is None else parse_bytes(given)
    except ValueError as bad:
        raise OptionError(f"{what}: {bad} None means no limit.") from None


def _as_device(device: torch.device | str) -> torch.device:
    """Return the device with its index: ``cuda`` is the current one."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found
