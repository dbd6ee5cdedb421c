"""Names of one parameter in the same encoder with and without a head around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from sparseft.modules.names import canonical_name

__all__ = ["find_name", "names_around"]


def names_around(model: nn.Module, name: str) -> Iterator[str]:
    """Yield ``name``, then its forms without and with the model's ``base_model_prefix``.

    Transformers puts an encoder under that prefix when a head is around it (``roberta.encoder...``)
    and not otherwise (``encoder...``); its own loader maps the two the same way.
    """
    yield name
    short = canonical_name(name)
    if short != name:
        yield short
    prefix = getattr(model, "base_model_prefix", "")
    if isinstance(prefix, str) and prefix:
        if short.startswith(f"{prefix}."):
            yield short[len(prefix) + 1 :]
        else:
            yield f"{prefix}.{short}"


def find_name(model: nn.Module, name: str, known: Callable[[str], bool]) -> str | None:
    """Return the first form of ``name`` that is ``known``, or None."""
    return next((form for form in names_around(model, name) if known(form)), None)
