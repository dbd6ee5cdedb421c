"""Notice that a masked weight is no longer where `attach` put its mask.

A loop's own code may replace a parameter, a module, or the memory behind a weight. Training would
then go on in a tensor that no forward reads. So each optimizer step first looks at identities,
addresses, dtypes and devices: no value is read, nothing waits for a GPU. Values are compared only
where an address is another one, which moving a model does as well. (Memory that is replaced twice
between two steps may come to lie where it lay; that is not noticed.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft.errors import AttachError
from sparseft.fingerprint import Fingerprint, fingerprint_tensor
from sparseft.modules.class_swap import MaskedModule
from sparseft.modules.full_params import FullParameter
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.quantised_base import fingerprint_quantised
from sparseft.modules.storage_stack import bottom_value
from sparseft.modules.weight_storage import OwnEntries, is_sharded, own_rows
from sparseft.ops import gather_entries

__all__ = ["DETACHED", "Misplaced", "Placement", "placements"]

# Attribute of a leaf whose mask was detached: the name of its weight.
DETACHED = "_sparseft_detached"

Owners = Sequence[tuple[nn.Module, str]]
# Mask, parameter, leaf, addresses of both (None: stand-ins), modules that hold it with their class;
# no mask for what is trained densely.
_Known = tuple[
    MaskedParameter | None,
    nn.Parameter,
    nn.Parameter,
    tuple[int, int] | None,
    list[tuple[nn.Module, str, type]],
]
_alive: weakref.WeakSet[Placement] = weakref.WeakSet()


def placements() -> list[Placement]:
    """Return those of every attachment alive and not detached."""
    return list(_alive)


class Misplaced(NamedTuple):
    """What is wrong with one weight.

    Attributes:
        what: goes after the weight's name in a message.
        foreign: whether its memory holds values that are not base + diff.
        there: whether the model still has the weight itself, so that detach restores it.
    """

    what: str
    foreign: bool = False
    there: bool = False


def _address(weight: Tensor) -> int:
    if is_sharded(weight):
        return own_rows(weight).local.data_ptr()
    # A stand-in without memory (FakeTensor) has none.
    return weight.data_ptr() if type(weight) is nn.Parameter else 0


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)} on {tensor.device}"


class Placement:
    """Where the weights of one attachment are: the modules that hold them, and the way there.

    Args:
        model: the model given to attach.
        masked: name -> masked parameter.
        full: parameters that are trained densely.
        owners: name of either -> every (module, attribute) that holds it.

    Attributes:
        stepped: whether an optimizer has stepped one of the leaves.
        settled: optimizers whose state was looked at since something moved.
        warned: what was said already.
    """

    def __init__(
        self,
        model: nn.Module,
        masked: Mapping[str, MaskedParameter],
        full: Sequence[FullParameter],
        owners: Mapping[str, Owners],
    ) -> None:
        self._model, self._masked, self._full, self._owners = model, masked, full, owners
        held = [*(m.shards for m in masked.values()), *(f.shards for f in full)]
        self._shards = [shards for shards in held if shards is not None]
        self.stepped = False
        self.warned: set[str] = set()
        self._start()
        self._remember()

    def _start(self) -> None:
        # A deep copy is not put together yet, and remembers at its first check.
        self._addresses: dict[str, int] = {}
        self._known: list[_Known] | None = None
        self._links: list[tuple[nn.Module, str, nn.Module]] = []
        self.settled: weakref.WeakSet[Any] = weakref.WeakSet()
        for masked in self._masked.values():
            masked.placement = self
        if self._masked:
            _alive.add(self)

    def close(self) -> None:
        """Forget it: the masks are detached, and their leaves remember that."""
        _alive.discard(self)
        for name, masked in self._masked.items():
            masked.placement = None
            setattr(masked.leaf, DETACHED, name)

    @property
    def count(self) -> int:
        """How many weights are masked."""
        return len(self._masked)

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_addresses", "_known", "_links", "settled")
        return {k: v for k, v in self.__dict__.items() if k not in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def holds_full(self, parameters: set[int]) -> bool:
        """Whether one of these ids is that of a parameter trained densely here."""
        return any(id(f.parameter) in parameters for f in self._full)

    def check(self) -> None:
        """Raise AttachError unless each weight is where its mask was attached."""
        self.settle()
        if not self._intact():
            wrong = self.misplaced()
            if wrong:
                raise AttachError(self.describe(wrong))

    def settle(self) -> None:
        """Have sharded modules show their rows."""
        for shards in self._shards:
            shards.settle()

    def describe(self, wrong: Mapping[str, Misplaced]) -> str:
        """Say what is wrong and what to do."""
        name, what = next((name, w.what) for name, w in wrong.items())
        more = f" So have {len(wrong) - 1} more trained tensors." if len(wrong) > 1 else ""
        return (
            f"{name!r} has changed since attach: {what}.{more} Steps would train what no forward "
            "reads. attachment.adapter() still gives what was trained; then detach(), change the "
            "model, attach again (with that adapter, where the base is the same) and build the "
            "optimizer from the new leaves."
        )

    def _intact(self) -> bool:
        """Whether nothing is other than when `misplaced` found nothing; in each step, so short."""
        if self._known is None:
            return False
        for masked, parameter, leaf, addresses, holders in self._known:
            for module, attr, kind in holders:
                own = module.__dict__
                if own["_parameters"].get(attr) is not parameter or module.__class__ is not kind:
                    return False
            if masked is None:
                continue
            if addresses is not None:
                plain = masked.shards is None
                now = parameter.data_ptr() if plain else _address(parameter)
                if addresses != (now, leaf.data_ptr()):
                    return False
            if masked.data_was_set():
                return False
        return all(parent._modules.get(name) is child for parent, name, child in self._links)

    def _remember(self) -> None:
        known: list[_Known] = []
        self._addresses = {}
        for name, masked in self._masked.items():
            weight, leaf = masked.weight, masked.leaf
            self._addresses[name] = _address(weight)
            addresses = (_address(weight), leaf.data_ptr()) if _address(weight) else None
            holders = [(m, attr, type(m)) for m, attr in self._owners[name]]
            known.append((masked, weight, leaf, addresses, holders))
        for f in self._full:
            holders = [(m, attr, type(m)) for m, attr in self._owners[f.name]]
            known.append((None, f.parameter, f.parameter, None, holders))
        self._known, self._links = known, list(self._ways())
        self.settled.clear()

    def misplaced(self) -> dict[str, Misplaced]:
        """Return what is wrong, by name; nothing if all has its place, which is then remembered."""
        self.settle()
        reachable = {id(module) for module in self._model.modules()}
        wrong = {}
        for name, masked in self._masked.items():
            found = _moved_away(masked.weight, self._owners[name], reachable)
            found = found or _unread(masked, self._owners[name])
            found = _memory(masked, self._addresses.get(name)) or found
            if found:
                wrong[name] = found
        for f in self._full:
            if found := _moved_away(f.parameter, self._owners[f.name], reachable):
                wrong[f.name] = found
        if not wrong:
            self._remember()
        return wrong

    def _ways(self) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """Yield each (parent, name, child) on one way from the model to each owner, once."""
        above: dict[int, tuple[nn.Module, str, nn.Module]] = {}
        for parent in self._model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    above.setdefault(id(child), (parent, name, child))
        done = {id(self._model)}
        for owners in self._owners.values():
            for owner, _ in owners:
                module = owner
                while id(module) not in done:
                    done.add(id(module))
                    link = above[id(module)]
                    yield link
                    module = link[0]

    def fingerprint(self, wrong: Mapping[str, Misplaced]) -> Fingerprint:
        """Fingerprint the bottom base of each masked weight, but for those of foreign memory."""
        return Fingerprint(
            {
                name: fingerprint_quantised(name, *self._owners[name][0])
                if masked.separate
                else fingerprint_tensor(name, bottom_value(masked.weight))
                for name, masked in self._masked.items()
                if not (name in wrong and wrong[name].foreign)
            }
        )


def _moved_away(parameter: nn.Parameter, owners: Owners, reachable: set[int]) -> Misplaced | None:
    """Say where a parameter no longer is in the model."""
    for module, attr in owners:
        kind = type(module).__name__
        if id(module) not in reachable:
            return Misplaced(f"the {kind} that holds it is no longer a part of the model")
        current = module._parameters.get(attr)
        if current is not parameter:
            return Misplaced(
                f"its {kind} now holds {_describe(current)} in {attr!r}, wanted the parameter that "
                f"attach found there, {_describe(parameter)}"
            )
    return None


def _unread(masked: MaskedParameter, owners: Owners) -> Misplaced | None:
    """Say why reads of a weight that is in its place would not reach the leaf."""
    for module, attr in owners:
        if not isinstance(module, MaskedModule) or module._masks().get(attr) is not masked:
            kind = type(module).__qualname__
            return Misplaced(f"the class of its module was set to {kind}", there=True)
    leaf, weight = masked.leaf, masked.weight
    if leaf.dtype is not masked.wide:
        return Misplaced(
            f"its leaf is {leaf.dtype}, wanted {masked.wide} (p.data = p.data.to(...) over "
            "model.parameters() casts leaves, too; model.to(...) does not)",
            there=True,
        )
    if leaf.device != weight.device:
        return Misplaced(
            f"its leaf is on {leaf.device}, its weight on {weight.device} (move the model with "
            "model.to(device), which takes leaves, bases and masks along)",
            there=True,
        )
    if masked.data_was_set():
        return Misplaced(
            "something was assigned to .data of what the module gave as its weight. That is an "
            "alias while gradients are recorded, so the weight has not changed",
            there=True,
        )
    return None


@torch.no_grad()
def _memory(masked: MaskedParameter, known: int | None) -> Misplaced | None:
    """Say why a weight's memory is not base + diff any more; None where it is, moved or cast."""
    weight = masked.weight
    if masked.separate:
        return None  # codes and scales, which nobody writes
    if weight.shape != masked.pattern.shape:
        return Misplaced(
            f"its .data is {_describe(weight)}, wanted shape {tuple(masked.pattern.shape)}", True
        )
    if known is None or _address(weight) == known or weight.is_meta:
        return None
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # nothing can be read here; what is captured has been stepped before
    if not weight.is_floating_point():
        return Misplaced(f"its .data is {_describe(weight)}, wanted floating values", True)
    indices, base = masked.indices.to(weight.device), masked.base.to(weight.device)
    leaf = masked.leaf.detach().to(weight.device, torch.float64)
    if is_sharded(weight):  # other processes may see nothing, so each looks at its own rows
        own = OwnEntries(weight, indices)
        found, base, leaf = own.read(), base[own.where], leaf[own.where]
    else:
        found = gather_entries(weight.detach(), indices)
    summed = base.double() + leaf
    # Rounded once or twice (a cast), to nearest or stochastically.
    kinds = [torch.finfo(d) for d in (base.dtype, found.dtype)]
    spacing, least = max(k.eps for k in kinds), max(k.tiny * k.eps for k in kinds)
    near = (found.double() - summed).abs() <= 2 * (spacing * summed.abs() + least)
    same = near | (found == base.to(found.dtype)) | (found == summed.to(found.dtype))
    # One read of one number, and only when a weight's memory is another.
    if bool((same | (found.isnan() & summed.isnan())).all()):
        return None
    return Misplaced(
        f"its .data was set to another tensor, {_describe(weight)}, whose values are not its base "
        "plus its diff",
        True,
    )
