"""The registry of composition methods: one typed function each, in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sparseft._registry import Registered, Registry

__all__ = ["Method", "Term", "methods", "register_method"]


class Term(NamedTuple):
    """What one adapter adds to one tensor.

    Args:
        coeff: its coefficient, not 0.
        values: (nnz,) floating, its diff values.
        positions: (nnz,) int32, where they lie in the union of all adapters' entries; None when
            they are the whole union.
        digest: content digest of the adapter; seeds whatever a method draws.
    """

    coeff: float
    values: Tensor
    positions: Tensor | None
    digest: str


class Method(Protocol):
    """A composition method: what is added to the base at the union of the adapters' entries.

    ``method(terms, size, **options) -> (size,) float32`` (float64 if any values are), with
    ``terms`` in canonical order (adapter name, then content digest), at least one. The caller adds
    the result to the base and rounds once. Keyword-only parameters are the method's options.
    """

    def __call__(self, terms: Sequence[Term], size: int, **options: Any) -> Tensor: ...


REGISTRY = Registry("composition method")


def register_method(name: str, *, reference: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a composition method under ``name``.

    Args:
        name: what users pass as ``method``.
        reference: address of its paper.
    """
    return REGISTRY.register(name, reference=reference)


def methods() -> dict[str, Registered]:
    """Return the registered methods by name, with reference, options and summary."""
    return {name: REGISTRY.get(name) for name in REGISTRY.names()}
