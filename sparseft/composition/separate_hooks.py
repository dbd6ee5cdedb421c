"""Hooks that stay with the model they were put on: a copy, or a saved model, gets none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Hook", "encoder_of"]


def _nothing(*args: Any) -> None:
    return None


def _left_behind() -> Callable[..., None]:
    return _nothing


class Hook:
    """A hook of a handle; copied or pickled with its module it becomes one that does nothing.

    Args:
        call: what to do.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _left_behind, ()


def encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the part of transformers' encoder-decoder models that ``generate`` calls by itself."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    find = getattr(model, "get_encoder", None)
    found = find() if callable(find) else None
    return found if isinstance(found, nn.Module) and found is not model else None
