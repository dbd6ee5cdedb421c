"""The registry of composition methods: one typed function each, in a file of its own.

A method says two things. How one adapter's diff of one tensor is *prepared* (trimmed, thinned out,
rescaled), which depends on nothing else and is done once per set of adapters; and by which *rule*
the prepared, weighted values that meet at an entry are combined, which is what re-weighting
repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sparseft._registry import Registered, Registry
from sparseft.errors import UnknownNameError
from sparseft.ops.combine import Rule, Term

__all__ = [
    "Combine",
    "Method",
    "Part",
    "Recipe",
    "Rule",
    "Term",
    "filled_options",
    "methods",
    "recipe_of",
    "register_method",
]


class Part(NamedTuple):
    """One adapter's "add" diff of one tensor, as a method prepares it.

    Args:
        indices: (nnz,) int32 or int64, flat row-major, ascending.
        values: (nnz,) float32 or float64.
        shape: of the tensor.
        name: the tensor's name in the adapter.
        digest: content digest of the adapter. With ``name`` and ``indices`` it keys whatever a
            method draws, so that no draw depends on other adapters or on how tensors are laid out.
    """

    indices: Tensor
    values: Tensor
    shape: torch.Size
    name: str
    digest: str

    def keep(self, chosen: Tensor) -> Part:
        """Return the entries where the bool (nnz,) ``chosen`` is True."""
        return self._replace(indices=self.indices[chosen], values=self.values[chosen])


# A rule of one's own: (terms in canonical order, entries of the union) -> (size,) float32, or
# float64 if any values are; -0.0 adds nothing. It runs as torch operations on every device.
Combine: TypeAlias = Callable[[Sequence[Term], int], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What a composition method does, its options filled in.

    Args:
        rule: how weighted values combine; a `Rule` runs fused on GPUs, a function as it is.
        prepare: what is done to every part first; None: nothing. It must give fewer entries or the
            same, in order, and may change values.
    """

    rule: Rule | Combine = Rule()
    prepare: Callable[[Part], Part] | None = None

    def among(self, adapters: int) -> Rule | Combine:
        """Return the rule for so many adapters with a coefficient other than 0."""
        return self.rule.among(adapters) if isinstance(self.rule, Rule) else self.rule


# A composition method: keyword-only options with defaults or without -> recipe.
Method: TypeAlias = Callable[..., Recipe]

REGISTRY = Registry("composition method")


def register_method(name: str, *, reference: str) -> Callable[[Method], Method]:
    """Register a composition method under ``name``.

    Args:
        name: what users pass as ``method``.
        reference: address of its paper.
    """
    return REGISTRY.register(name, reference=reference)


def methods() -> dict[str, Registered]:
    """Return the registered methods by name, with reference, options and summary."""
    return {name: REGISTRY.get(name) for name in REGISTRY.names()}


def recipe_of(name: str, options: dict[str, Any]) -> Recipe:
    """Return the recipe of a method.

    Raises:
        UnknownNameError: no such method or option.
        OptionError: an option is missing or out of range.
    """
    if not isinstance(name, str):
        raise UnknownNameError(
            f"method is {name!r} ({type(name).__name__}), wanted the name of one: "
            f"{', '.join(REGISTRY.names())}."
        )
    REGISTRY.check_options(name, options)
    return REGISTRY.get(name).fn(**options)


def filled_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's options with its defaults: what a record of a composition holds, for a
    later release may have other defaults.
    """
    return {**REGISTRY.get(name).options, **options}
