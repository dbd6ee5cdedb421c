"""One masked parameter: where its mask is, what was there before, and the compact diff in training.

Every other piece (class swap, optimizer hooks, `SparseAdamW`, `Attachment`) finds it through the
two weak registries here: by leaf and by weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparseft.diff import SparseDiff, SparsePattern
from sparseft.modules.storage_stack import Holder, holders, pop, push, require_top
from sparseft.modules.weak_table import WeakTable
from sparseft.modules.weight_storage import OwnEntries, read_entries
from sparseft.ops import sum_entries, write_entries_, write_sum_
from sparseft.ops._rounding import round_stochastically

if TYPE_CHECKING:
    from sparseft.modules.placement import Placement
    from sparseft.modules.sharding import Shards

__all__ = ["MaskedParameter", "leaf_attribute", "masked_by_leaf", "masked_by_weight", "registered"]

# A state holds its leaf and weight, so an id in here belongs to a live tensor.
_by_leaf: WeakTable[MaskedParameter] = WeakTable()
_by_weight: WeakTable[MaskedParameter] = WeakTable()


def leaf_attribute(name: str) -> str:
    """Return the name of the compact leaf beside a masked attribute or parameter.

    ``weight`` -> ``diff_weight``, ``up.weight`` -> ``up.diff_weight``. In front, because
    transformers matches names with open-ended patterns: ``tie_weights()`` takes
    ``embeddings.weight_diff`` for one more weight to tie.
    """
    head, dot, attr = name.rpartition(".")
    return f"{head}{dot}diff_{attr}"


def masked_by_leaf(parameter: Tensor) -> MaskedParameter | None:
    """Return the masked parameter whose compact leaf this is, if any."""
    return _by_leaf.get(parameter)


def masked_by_weight(parameter: Tensor) -> MaskedParameter | None:
    """Return the masked parameter whose weight this is, if any."""
    return _by_weight.get(parameter)


def registered() -> Iterator[MaskedParameter]:
    """Yield every masked parameter alive."""
    return iter(_by_leaf.values())


class MaskedParameter:
    """A weight that holds ``rn(base + values)`` at a mask, and the leaf that holds ``values``.

    The one invariant: ``weight[indices] == rn(base + leaf)`` in the weight's dtype after every
    optimizer step, load and cast; entries outside the mask are never written.

    Args:
        name: canonical name of the weight, for messages.
        weight: the model's own parameter, any shape; stays where it is, frozen.
        pattern: where it is trained, on the weight's device.
        aliases: its other canonical names.
        backend: backend of the ops, None for the ambient choice.
        compact: state dicts leave the weight out.
        shards: of a weight that ``fully_shard`` has cut. Leaf, indices and base are whole on every
            process, each of which writes its own rows; making it is then a collective.

    Attributes:
        leaf: (nnz,) fp32 (fp64 for an fp64 weight) trainable diff, zeros at first.
        holder: its place on the weight's storage stack; keeps indices and base.
        wide: dtype of the leaf, whatever becomes of the weight's.
        placement: of its attachment; None for a copy of the module alone.
        separate: whether the weight is left alone and the diff's product added beside it.
        scheme: how the weight is quantised, "" where it is not.
        home: the module that has the leaf among its parameters, and under which name.
    """

    separate: ClassVar[bool] = False
    scheme: str = ""
    shards: Shards | None

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        pattern: SparsePattern,
        *,
        aliases: Iterable[str] = (),
        backend: str | None = None,
        compact: bool = False,
        shards: Shards | None = None,
    ) -> None:
        self.start(name, weight, pattern, aliases=aliases, backend=backend, compact=compact)
        self.shards = shards
        self.wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.leaf = nn.Parameter(torch.zeros(pattern.nnz, dtype=self.wide, device=weight.device))
        base = read_entries(weight, pattern.indices, backend=backend)
        self.holder = Holder(f"attach({name!r})", pattern.indices, base)
        push(weight, self.holder, keeper=self)
        self.register()

    def start(
        self,
        name: str,
        weight: nn.Parameter,
        pattern: SparsePattern,
        *,
        aliases: Iterable[str],
        backend: str | None,
        compact: bool,
    ) -> None:
        """Set what every kind of masked parameter has; arguments as of the class."""
        self.name = name
        self.aliases = frozenset(aliases)
        self.weight = weight
        self.pattern = pattern
        self.backend = backend
        self.compact = compact
        self.reported = False
        self.home: tuple[nn.Module, str] | None = None
        self.placement: Placement | None = None
        self._handed_out: tuple[Tensor, int] | None = None
        self._data_was_set = False
        self.shards = None
        self._own: OwnEntries | None = None

    @property
    def indices(self) -> Tensor:
        """(nnz,) flat positions, ascending."""
        return self.pattern.indices

    @property
    def base(self) -> Tensor:
        """(nnz,) entries before any training, in the weight's dtype."""
        return self.holder.saved

    def register(self) -> None:
        """Make the optimizer hooks find it; they are installed with the first one."""
        from sparseft.modules.writeback import install_hooks

        _by_leaf.put(self.leaf, self)
        _by_weight.put(self.weight, self)
        install_hooks()

    def unregister(self) -> None:
        """Make the optimizer hooks forget it; they are removed with the last one."""
        from sparseft.modules.writeback import remove_idle_hooks

        for table, parameter in ((_by_leaf, self.leaf), (_by_weight, self.weight)):
            if table.get(parameter) is self:
                table.remove(parameter)
        remove_idle_hooks()

    def is_weight(self, tensor: Tensor | None) -> bool:
        """Whether this is the weight: the parameter, or FSDP2's other form of it."""
        return tensor is self.weight or (self.shards is not None and self.shards.shows(tensor))

    def own_entries(self) -> OwnEntries | None:
        """Return the entries in this process's rows, ready to be read and written.

        None for a weight that is not sharded.
        """
        if self.shards is None:
            return None
        self.shards.settle()
        if self._own is None or not self._own.of(self.weight, self.indices):
            self._own = OwnEntries(self.weight, self.indices)
        return self._own

    def hand_out(self, alias: Tensor) -> None:
        """Keep the alias that a module just gave as its weight, for `data_was_set`."""
        if type(alias) is Tensor and type(self.weight) is nn.Parameter:
            try:
                self._handed_out = alias, alias.data_ptr()
            except RuntimeError:  # inside a transform of torch.func it has no memory of its own
                self._handed_out = None

    def data_was_set(self) -> bool:
        """Whether ``module.weight.data = ...`` changed an alias, and so no weight.

        Lets go of the alias kept.
        """
        if self._handed_out is not None:
            alias, address = self._handed_out
            self._handed_out = None
            self._data_was_set |= alias.data_ptr() != address
        return self._data_was_set

    def follow_weight_(self) -> None:
        """Bring indices, base and leaf to the weight's device, and base to its dtype.

        A cast rounds base exactly as it rounded the frozen entries: restoring then gives what
        casting the plain base would have given.
        """
        weight, holder = self.weight, self.holder
        if holder.saved.dtype != weight.dtype or holder.saved.device != weight.device:
            holder.saved = holder.saved.to(device=weight.device, dtype=weight.dtype)
        if self.pattern.device != weight.device:
            self.pattern = self.pattern.to(weight.device)
            holder.indices = self.pattern.indices
        if self.leaf.device != weight.device:
            self.leaf.data = self.leaf.data.to(weight.device)
            if self.leaf.grad is not None:
                self.leaf.grad = self.leaf.grad.to(weight.device)

    def require_top(self, action: str) -> None:
        """Raise StackOrderError unless nobody changed the weight since attach did."""
        require_top(self.weight, self.holder, name=self.name, action=action)

    @torch.no_grad()
    def write_(self, action: str = "write the trained diff into") -> None:
        """Write ``weight[indices] = rn(base + leaf)``.

        Raises:
            StackOrderError: something was applied on top since.
        """
        self.require_top(action)
        self.follow_weight_()
        own = self.own_entries()
        if own is None:
            write_sum_(self.weight, self.indices, self.base, self.leaf, backend=self.backend)
        else:
            own.write_sum(self.base, self.leaf.detach(), backend=self.backend)

    @torch.no_grad()
    def write_stochastically_(self, *, seed: int, tensor: int, step: int) -> None:
        """Write ``sr(base + leaf)`` into this process's rows of a sharded weight.

        Random words go by place in the whole weight: they are those of one process alone.
        """
        self.require_top("write the trained diff into")
        self.follow_weight_()
        own = self.own_entries()
        if own is None:
            raise TypeError(f"{self.name!r} is not sharded")
        part = own.where
        wide = sum_entries(self.base[part], self.leaf.detach()[part], self.leaf.dtype)
        rounded = round_stochastically(
            wide, self.weight.dtype, self.indices[part], seed=seed, tensor=tensor, step=step
        )
        own.write_own(rounded, backend=self.backend)

    @torch.no_grad()
    def write_entries_(self, values: Tensor) -> None:
        """Write ``weight[indices] = values``, (nnz,) in the weight's dtype, bit for bit."""
        own = self.own_entries()
        if own is None:
            write_entries_(self.weight, self.indices, values, backend=self.backend)
        else:
            own.write(values, backend=self.backend)

    def expected_entries(self, values: Tensor) -> Tensor:
        """Return ``rn(base + values)``, what the weight holds at the mask for a given diff."""
        self.follow_weight_()
        values = values.detach().to(device=self.weight.device, dtype=self.leaf.dtype)
        return sum_entries(self.base, values, self.weight.dtype)

    @torch.no_grad()
    def release_(self, *, restore: bool) -> None:
        """Leave the storage stack, with the base put back or the sum kept.

        Raises:
            StackOrderError: something was applied on top since.
        """
        self.require_top("detach")
        self.follow_weight_()
        if restore:
            self.write_entries_(self.base)
        self.unregister()
        if restore or len(holders(self.weight)) == 1:
            pop(self.weight, self.holder, name=self.name)
        else:
            # Kept on top of a composition: taking that off underneath would not give its base back,
            # so the stack remembers and refuses.
            self.holder.label = f"a diff of {self.name!r} kept by detach(restore=False)"

    def digest_tensor(self) -> Tensor:
        """Return 32 bytes (uint8) that name mask and base; compact checkpoints carry them."""
        self.follow_weight_()
        digest = SparseDiff._trusted(self.indices, self.base, self.pattern.shape).digest()
        return torch.tensor(list(digest.encode()), dtype=torch.uint8)

    # Copies: `copy.deepcopy` and pickle both come through here, with the copied weight and leaf.

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["placement"]  # which sets it again, if the whole model is copied
        state["_handed_out"] = state["_own"] = None
        stack = holders(self.weight)
        # What lies beneath, so that the copy's bottom base is the original's.
        state["_beneath"] = stack[: stack.index(self.holder)] if self.holder in stack else ()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        beneath = state.pop("_beneath")
        self.__dict__.setdefault("placement", None)
        self.__dict__.update(state)
        for holder in (*beneath, self.holder):
            push(self.weight, holder)
        self.register()
