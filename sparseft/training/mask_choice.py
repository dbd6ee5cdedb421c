"""How a run chooses its masks: a registered selector with its options, and what that needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparseft.denoise import Denoise
from sparseft.errors import OptionError
from sparseft.selection import Masks, options_of, select, selectors
from sparseft.selection.registry import check_options
from sparseft.selection.select import check_scope

__all__ = ["Batches", "MaskChoice"]

# Options that a run fills in.
_FILLED = ("base", "batches", "loss_fn", "seed", "nnz", "scope")


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
            OptionError: ``denoise`` that is no `Denoise`, or beside another selector than it
                stands for; an option that the selector needs is missing.
            UnknownNameError: no such selector or option; the message has the nearest names.
            MaskError: no such scope.
        """
        if denoise is not None and not isinstance(denoise, Denoise):
            got = denoise.__name__ if isinstance(denoise, type) else repr(denoise)
            raise OptionError(
                f"denoise is {got}, wanted a sparseft.Denoise with its rule, e.g. "
                "denoise=sparseft.Denoise(rank=64)."
            )
        if denoise is None:
            choice = cls(selector, scope, dict(options or {}))
            choice._check()
            return choice
        if selector not in ("magnitude", "deltas_svd"):
            raise OptionError(
                f"denoise={denoise} is for selector 'deltas_svd' (or 'magnitude', which it "
                f"refines), got {selector!r}. Give one of the two."
            )
        refined = dataclasses.asdict(denoise)
        both = sorted(set(refined) & set(options or {}))
        if both:
            raise OptionError(
                f"selector_options gives {', '.join(map(repr, both))}, which denoise gives too; "
                "keep one of the two."
            )
        choice = cls("deltas_svd", scope, {**refined, **(options or {})})
        choice._check()
        return choice

    def _check(self) -> None:
        """Refuse before anything is trained what `select` would refuse after."""
        check_scope(self.method, self.scope, counted=True)
        known = options_of(self.method, self.options)
        filled = [o for o in _FILLED if o in known and o not in self.options]
        check_options(self.method, {**self.options, **dict.fromkeys(filled)})
        if self.method == "deltas_svd":
            names = {f.name for f in dataclasses.fields(Denoise)}
            Denoise(**{k: v for k, v in self.options.items() if k in names})

    def fixed_nnz(self, model: nn.Module, include: Sequence[str]) -> int | None:
        """Return how many entries a method keeps whose masks say so themselves, else None."""
        entry = selectors()[self.method]
        if entry.traits["kind"] != "patterns":
            return None
        options = {k: v for k, v in self.options.items() if k in entry.options}
        if "score" in entry.options:  # which entries is another matter
            options["score"] = "random"
        return select(model, self.method, include=list(include), **options).nnz

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
