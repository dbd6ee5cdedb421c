"""Fingerprints of a model's tensors, read down to the bottom base through whatever lies on them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from sparseft.errors import BaseMismatchError
from sparseft.fingerprint import Fingerprint, compare, fingerprint_tensor
from sparseft.modules.names import ParameterIndex
from sparseft.modules.storage_stack import bottom_value

__all__ = ["fingerprint_model", "verify_fingerprint"]

logger = logging.getLogger(__name__)


def fingerprint_model(
    model: nn.Module, names: Iterable[str], *, bottom: bool = True
) -> Fingerprint:
    """Fingerprint the named parameters of a model.

    Args:
        model: with or without adapters on it.
        names: any of a parameter's names; only tensors that a diff touches should be asked for.
        bottom: read each tensor as it was before every apply and attach; else as it is now.

    Raises:
        UnknownNameError: the model has no such parameter.
    """
    index = ParameterIndex(model)
    tensors = {}
    for name in names:
        canonical, parameter = index.resolve(name), index.get(name)
        value = bottom_value(parameter) if bottom else parameter.detach()
        tensors[canonical] = fingerprint_tensor(canonical, value)
    return Fingerprint(tensors)


def verify_fingerprint(model: nn.Module, fingerprint: Fingerprint) -> None:
    """Check that a model's bottom base is the one that was fingerprinted.

    Equal bytes are accepted; so is a cast of the same base (samples equal up to the coarser dtype's
    rounding), which is logged.

    Raises:
        BaseMismatchError: another base; names the first tensor, with both fingerprints.
        UnknownNameError: the model lacks a fingerprinted tensor.
    """
    index = ParameterIndex(model)
    casts = []
    for name, wanted in fingerprint.tensors.items():
        # Sample positions are seeded by the name on file, which may be an alias in this model.
        got = fingerprint_tensor(name, bottom_value(index.get(name)))
        verdict = compare(wanted, got)
        if verdict == "different":
            raise BaseMismatchError(
                f"{name!r} is not the base tensor the adapter was made on: the adapter has "
                f"{wanted}, the model {got}. Load the base model it names."
            )
        if verdict == "cast":
            casts.append(name)
    if casts:
        first = index.get(casts[0])
        logger.info(
            "%d base tensors are a cast of the fingerprinted ones (%s is %s, was %s): accepted",
            len(casts), casts[0], first.dtype, fingerprint.tensors[casts[0]].dtype,
        )  # fmt: skip
