"""How a run chooses its masks: a registered selector with its options, and what that needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from sparseft.errors import OptionError
from sparseft.selection import Masks, options_of, select

if TYPE_CHECKING:
    from sparseft.denoise import Denoise

__all__ = ["Batches", "MaskChoice"]


class Batches(NamedTuple):
    """What a selector by gradients looks at: batches, and the loss they are for."""

    batches: Iterable[Any]
    loss_fn: Callable[[nn.Module, Any], Tensor] | None


@dataclass(frozen=True)
class MaskChoice:
    """A selector, its scope and its options.

    Args:
        method: name of a registered selector.
        scope: as in `select`.
        options: of the selector, without those that a run fills in (base, seed, batches, loss_fn).
    """

    method: str = "magnitude"
    scope: str = "global"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, selector: str, scope: str, options: Mapping[str, Any] | None, denoise: Denoise | None
    ) -> MaskChoice:
        """Return the choice that the arguments of `lottery_ticket` speak of.

        Raises:
            OptionError: ``denoise`` beside a selector that is not the one it stands for.
        """
        if denoise is None:
            return cls(selector, scope, dict(options or {}))
        if selector not in ("magnitude", "deltas_svd"):
            raise OptionError(
                f"denoise={denoise} is for selector 'deltas_svd' (or 'magnitude', which it "
                f"refines), got {selector!r}. Give one of the two."
            )
        return cls("deltas_svd", scope, {**dataclasses.asdict(denoise), **(options or {})})

    def takes(self, option: str) -> bool:
        """Whether the selector, or the scoring method it builds on, has an option of this name."""
        return option in options_of(self.method, self.options)

    @property
    def needs_dense(self) -> bool:
        """Whether it looks at what a dense phase changed."""
        return self.takes("base")

    @property
    def needs_batches(self) -> bool:
        """Whether it looks at gradients."""
        return self.takes("batches")

    def masks(
        self,
        model: nn.Module,
        counts: Sequence[int],
        *,
        base: Mapping[str, Tensor],
        include: Sequence[str],
        seed: int,
        batches: Batches | None,
    ) -> list[Masks]:
        """Choose masks of several sizes; everything is scored once."""
        filled: dict[str, Any] = {"base": base} if self.needs_dense else {}
        if batches is not None:
            filled.update(batches._asdict())
        return select(
            model,
            self.method,
            nnz=list(counts),
            scope=self.scope,
            include=list(include),
            seed=seed,
            **{**filled, **self.options},
        )
