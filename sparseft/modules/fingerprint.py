"""Fingerprints of a model's tensors, read down to the bottom base through whatever lies on them.

Tensors that ``fully_shard`` has cut are gathered, one at a time: all processes take part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import nn

from sparseft._text import first_of
from sparseft.errors import BaseMismatchError
from sparseft.fingerprint import Fingerprint, TensorFingerprint, compare, fingerprint_tensor
from sparseft.modules.dequantise import is_quantised
from sparseft.modules.names import ParameterIndex
from sparseft.modules.quantised_base import fingerprint_quantised
from sparseft.modules.sharding import settle_model
from sparseft.modules.storage_stack import bottom_value

__all__ = ["fingerprint_base", "fingerprint_model", "verify_fingerprint", "warn_of_quantised"]

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
    settle_model(model)
    index = ParameterIndex(model)
    tensors = {}
    for name in names:
        canonical, parameter = index.resolve(name), index.get(name)
        if bottom or is_quantised(*index.owners(canonical)[0]):
            tensors[canonical] = fingerprint_base(index, canonical)
        else:
            tensors[canonical] = fingerprint_tensor(canonical, parameter.detach())
    return Fingerprint(tensors)


def fingerprint_base(index: ParameterIndex, name: str, seed: str = "") -> TensorFingerprint:
    """Fingerprint the bottom base of one parameter, quantised or not.

    Args:
        index: of the model.
        name: any of the parameter's names.
        seed: name that seeds the positions of the samples, where that is another one.
    """
    owner = index.owners(name)[0]
    if is_quantised(*owner):
        return fingerprint_quantised(seed or name, *owner)
    return fingerprint_tensor(seed or name, bottom_value(index.get(name)))


def warn_of_quantised(what: str, names: Sequence[str]) -> None:
    """Say that a base was accepted that only looks like another quantisation of the same.

    Args:
        what: begins the sentence.
        names: its tensors.
    """
    logger.warning(
        "%s: %d base tensors (%s) are not the bytes it was made on, but agree within a "
        "quantisation step: another quantisation of the same weights, or one side is not "
        "quantised. Accepted; its values were learned beside the other base, so check quality. (A "
        "fine-tuned sibling of the base cannot be told apart by this.)",
        what, len(names), first_of(list(names), 1),
    )  # fmt: skip


def verify_fingerprint(model: nn.Module, fingerprint: Fingerprint) -> None:
    """Check that a model's bottom base is the one that was fingerprinted.

    Equal bytes are accepted; so is a cast of the same base (samples equal up to the coarser dtype's
    rounding), which is logged, and another quantisation of it (samples equal within a step), of
    which a warning is logged.

    Raises:
        BaseMismatchError: another base; names the first tensor, with both fingerprints.
        UnknownNameError: the model lacks a fingerprinted tensor.
    """
    settle_model(model)
    index = ParameterIndex(model)
    casts: list[str] = []
    requantised: list[str] = []
    for name, wanted in fingerprint.tensors.items():
        # Sample positions are seeded by the name on file, which may be an alias in this model.
        got = fingerprint_base(index, name)
        verdict = compare(wanted, got)
        if verdict == "different":
            raise BaseMismatchError(
                f"{name!r} is not the base tensor the adapter was made on: the adapter has "
                f"{wanted}, the model {got}. Load the base model it names."
            )
        if verdict == "cast":
            casts.append(name)
        if verdict == "quantised":
            requantised.append(name)
    if requantised:
        warn_of_quantised("the adapter", requantised)
    if casts:
        first = index.get(casts[0])
        logger.info(
            "%d base tensors are a cast of the fingerprinted ones (%s is %s, was %s): accepted",
            len(casts), casts[0], first.dtype, fingerprint.tensors[casts[0]].dtype,
        )  # fmt: skip
