"""Were several adapters made on one base? Their fingerprints are compared; no model is needed."""

from __future__ import annotations

from collections.abc import Mapping

from sparseft.adapter import Adapter
from sparseft.errors import BaseMismatchError
from sparseft.fingerprint import Fingerprint, TensorFingerprint, compare

__all__ = ["merged_fingerprint"]


def merged_fingerprint(adapters: Mapping[str, Adapter]) -> Fingerprint | None:
    """Return the fingerprint of the base that all were made on; None if none of them has one.

    Of a tensor that several know, the first one's is taken.

    Args:
        adapters: by the names that messages use.

    Raises:
        BaseMismatchError: two of them were made on different bases.
    """
    merged: dict[str, TensorFingerprint] = {}
    owner: dict[str, str] = {}
    for adapter_name, adapter in adapters.items():
        fingerprint = adapter.metadata.fingerprint
        for name, print_ in (fingerprint.tensors if fingerprint else {}).items():
            if name in merged and compare(merged[name], print_) == "different":
                raise BaseMismatchError(
                    f"adapters {owner[name]!r} and {adapter_name!r} were made on different bases: "
                    f"{name!r} was {merged[name]} for the first, {print_} for the second."
                )
            merged.setdefault(name, print_)
            owner.setdefault(name, adapter_name)
    return Fingerprint(merged) if merged else None
