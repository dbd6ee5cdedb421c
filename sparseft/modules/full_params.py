"""A parameter that is trained densely beside the masks (a head), and how it comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparseft.modules.storage_stack import Holder, holders, pop, push, require_top

if TYPE_CHECKING:
    from sparseft.modules.sharding import Shards

__all__ = ["FullParameter"]


class FullParameter:
    """A fully trained parameter with a copy of the values it had before.

    Args:
        name: canonical name.
        parameter: the model's own; trained in place.
        shards: of one that ``fully_shard`` has cut: it reduces its gradient, too.
    """

    def __init__(self, name: str, parameter: nn.Parameter, shards: Shards | None = None) -> None:
        self.name = name
        self.parameter = parameter
        self.shards = shards
        before = parameter.detach().clone()
        self.holder = Holder(f"attach({name!r}, fully trained)", None, before)
        push(parameter, self.holder, keeper=self)

    def require_top(self, action: str) -> None:
        """Raise StackOrderError unless nobody changed the parameter since attach did."""
        require_top(self.parameter, self.holder, name=self.name, action=action)

    @torch.no_grad()
    def release_(self, *, restore: bool) -> None:
        """Leave the storage stack, with the values of before put back or the trained ones kept.

        Raises:
            StackOrderError: something was applied on top since.
        """
        self.require_top("detach")
        if self.shards is not None:
            self.shards.settle()
        if restore:
            self.parameter.copy_(self.holder.saved)
        if restore or len(holders(self.parameter)) == 1:
            pop(self.parameter, self.holder, name=self.name)
        else:
            self.holder.label = f"values of {self.name!r} kept by detach(restore=False)"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy or pickle: the copied parameter gets its holder, too.
        self.__dict__.update(state)
        push(self.parameter, self.holder)
