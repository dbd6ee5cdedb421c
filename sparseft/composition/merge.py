"""Compose without a model: several adapters into one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparseft._integrity import bits_equal
from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.composition.base_check import merged_fingerprint
from sparseft.composition.coefficients import Coeffs, as_coeffs
from sparseft.composition.fit import Loaded
from sparseft.composition.plan import TensorPlan, plan_tensor, prepared
from sparseft.composition.registry import Combine, Rule, filled_options, recipe_of
from sparseft.diff import SparseDiff
from sparseft.errors import BaseMismatchError, CompositionError
from sparseft.fingerprint import Fingerprint, TensorFingerprint, compare

__all__ = ["AdapterLike", "compose_adapters", "load_named"]

AdapterLike = Adapter | str | os.PathLike[str]


def load_named(adapters: Sequence[AdapterLike] | Mapping[str, AdapterLike]) -> dict[str, Adapter]:
    """Return name -> adapter; in a sequence each has its own name, numbered where two are equal.

    Raises:
        FileNotFoundError, AdapterFormatError: as in `Adapter.load`.
    """
    if isinstance(adapters, str | os.PathLike | Adapter):
        raise CompositionError(
            "one adapter was given where several can be: pass a list, or a mapping of name to "
            "adapter."
        )
    if isinstance(adapters, Mapping):
        return {
            n: a if isinstance(a, Adapter) else Adapter.load(a, check="lazy")
            for n, a in adapters.items()
        }
    named: dict[str, Adapter] = {}
    for given in adapters:
        adapter = given if isinstance(given, Adapter) else Adapter.load(given, check="lazy")
        name, n = adapter.name, 2
        while name in named:
            name, n = f"{adapter.name}-{n}", n + 1
        named[name] = adapter
    return named


def compose_adapters(
    adapters: Sequence[AdapterLike] | Mapping[str, AdapterLike],
    coeffs: Coeffs = None,
    *,
    name: str | None = None,
    method: str = "linear",
    check_base: bool = True,
    **options: Any,
) -> Adapter:
    """Merge adapters of one base into one adapter.

    Applied with coefficient 1 it gives, bit for bit, what a `Composer` makes of its parts. Entries
    are the union of theirs, values fp32; adapters with coefficient 0 leave no trace.

    Args:
        adapters: adapters or paths; or name -> adapter or path.
        coeffs: None (1 each), one for all, one each in order, or by name.
        name: of the result; default: the names joined by ``+``.
        method: a registered composition method, with its ``options``.
        check_base: whether to refuse adapters of different bases: by their fingerprints, or by the
            names of the bases where no tensor is known to both. False takes them for one base; the
            result then keeps the fingerprints that do not contradict each other.

    Returns:
        The merged adapter. Its metadata has the parts' digests as parents, and the recipe.

    Raises:
        CompositionError: coefficients that fit no adapter, contradictions between "set" entries or
            dense tensors, a tensor with both "set" and "add" diffs (one diff cannot hold both).
        BaseMismatchError: adapters of different bases (``check_base``), or of different shapes.
        UnknownNameError: no such method or option.
    """
    named = load_named(adapters)
    given = as_coeffs(list(named), coeffs, named)
    recipe = recipe_of(method, options)
    chosen = sorted(
        (Loaded(n, a) for n, a in named.items() if given[n]), key=lambda loaded: loaded.order
    )
    ordered = [given[loaded.name] for loaded in chosen]
    parts = {loaded.name: loaded.adapter for loaded in chosen}
    if check_base:
        fingerprint = merged_fingerprint(parts)
        _check_base_names(parts)
    else:
        fingerprint = _undisputed(parts)
    touched: dict[str, list[tuple[int, SparseDiff]]] = {}
    for ordinal, loaded in enumerate(chosen):
        for tensor_name, diff in loaded.adapter.diffs.items():
            ready = prepared(diff, recipe, name=tensor_name, digest=loaded.digest)
            touched.setdefault(tensor_name, []).append((ordinal, ready))
    diffs = {}
    for tensor_name, found in sorted(touched.items()):
        _check_same_shape(tensor_name, found, chosen)
        first = found[0][1]
        plan = plan_tensor(tensor_name, found, dtype=first.dtype, device=first.device)
        plan.check(ordered, [loaded.name for loaded in chosen])
        diffs[tensor_name] = _merged(plan, found, ordered, recipe.among(len(chosen)))
    noted = [
        {"name": loaded.name, "digest": loaded.digest, "coeff": coeff}
        for loaded, coeff in zip(chosen, ordered, strict=True)
    ]
    bases = {loaded.adapter.metadata.base_name for loaded in chosen}
    metadata = AdapterMetadata(
        base_name=bases.pop() if len(bases) == 1 else None,
        fingerprint=fingerprint,
        method=f"compose/{method}",
        parents=tuple(loaded.digest for loaded in chosen),
        extra={
            "composition": {
                "method": method,
                "options": filled_options(method, options),
                "adapters": noted,
            }
        },
    )
    return Adapter(
        diffs,
        name=name or "+".join(loaded.name for loaded in chosen) or "base",
        dense=_merge_dense(chosen, diffs),
        metadata=metadata,
    )


def _prints(adapter: Adapter) -> Mapping[str, TensorFingerprint]:
    fingerprint = adapter.metadata.fingerprint
    return fingerprint.tensors if fingerprint is not None else {}


def _check_base_names(parts: Mapping[str, Adapter]) -> None:
    """Refuse adapters whose bases have different names, unless fingerprints show them to be one.

    Fingerprints that contradict each other have been refused before, so a tensor that two adapters
    know makes their bases one, whatever the names. Of a name the last part counts: the same base is
    ``xlm-roberta-base`` in a folder and ``owner/xlm-roberta-base`` on the hub.

    Raises:
        BaseMismatchError: names differ, and nothing joins them.
    """
    group = {name: name for name in parts}

    def top(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    owner: dict[tuple[str, str], str] = {}
    for name, adapter in parts.items():
        base = adapter.metadata.base_name
        known = [("tensor", tensor) for tensor in _prints(adapter)]
        for key in (*known, *([("base", _last_part(base))] if base else ())):
            group[top(name)] = top(owner.setdefault(key, name))
    named = [name for name, adapter in parts.items() if adapter.metadata.base_name]
    for other in named[1:]:
        if top(other) != top(named[0]):
            first, second = (parts[n].metadata.base_name for n in (named[0], other))
            raise BaseMismatchError(
                f"adapter {named[0]!r} was made on {first!r} and {other!r} on {second!r}, and no "
                "fingerprint of a tensor that both know shows the two to be one base. If they are, "
                "pass --no-check-base (check_base=False)."
            )


def _last_part(base: str) -> str:
    return base.rstrip("/").rpartition("/")[2].casefold()


def _undisputed(parts: Mapping[str, Adapter]) -> Fingerprint | None:
    """Return the fingerprints of the tensors in which no two adapters contradict each other."""
    found: dict[str, TensorFingerprint] = {}
    disputed: set[str] = set()
    for adapter in parts.values():
        for name, print_ in _prints(adapter).items():
            if compare(found.setdefault(name, print_), print_) == "different":
                disputed.add(name)
    kept = {name: print_ for name, print_ in found.items() if name not in disputed}
    return Fingerprint(kept) if kept else None


def _check_same_shape(
    name: str, found: Sequence[tuple[int, SparseDiff]], chosen: Sequence[Loaded]
) -> None:
    (i, first), *rest = found
    for j, diff in rest:
        if diff.shape != first.shape:
            raise BaseMismatchError(
                f"{name!r} has shape {tuple(first.shape)} in adapter {chosen[i].name!r} but "
                f"{tuple(diff.shape)} in {chosen[j].name!r}; they belong to different bases."
            )
        if diff.mode != first.mode:
            raise CompositionError(
                f"{name!r} is a {first.mode!r} diff in adapter {chosen[i].name!r} but a "
                f"{diff.mode!r} diff in {chosen[j].name!r}; one merged diff cannot hold both. "
                "Apply them together with a Composer, which can."
            )


def _merged(
    plan: TensorPlan,
    found: Sequence[tuple[int, SparseDiff]],
    coeffs: Sequence[float],
    rule: Rule | Combine,
) -> SparseDiff:
    first = found[0][1]
    # Every entry of a "set" union is replaced, so what lies beneath does not matter.
    empty = first.values.new_zeros(plan.indices.numel())
    base, total = plan.total(empty, coeffs, rule)
    if first.mode == "set":
        return SparseDiff(plan.indices, base, first.shape, "set")
    if total is None:  # cannot be: coefficients 0 were left out
        total = empty.float()
    return SparseDiff(plan.indices, total, first.shape, "add")


def _merge_dense(chosen: Sequence[Loaded], diffs: Mapping[str, SparseDiff]) -> dict[str, Tensor]:
    dense: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for loaded in chosen:
        for name, tensor in loaded.adapter.dense.items():
            if name in diffs:
                raise CompositionError(
                    f"adapter {loaded.name!r} holds all of {name!r} while another has a diff of "
                    "it; one adapter cannot hold both."
                )
            if name in dense and not bits_equal(dense[name], tensor):
                raise CompositionError(
                    f"adapters {owner[name]!r} and {loaded.name!r} both hold all of {name!r}, "
                    "with different values; give one of them coefficient 0."
                )
            dense[name], owner[name] = tensor, loaded.name
    return dense
