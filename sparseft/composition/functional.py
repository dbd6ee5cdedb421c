"""Composed weights as new tensors, with gradients in the coefficients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparseft.composition.coefficients import check_coeff
from sparseft.composition.fit import Loaded
from sparseft.composition.planning import Planner
from sparseft.errors import CompositionError
from sparseft.ops import compose_diffs

__all__ = ["composed_weights"]


def composed_weights(
    planner: Planner, loaded: Mapping[str, Loaded], coeffs: Mapping[str, Tensor | float]
) -> dict[str, Tensor]:
    """Return the weights of `Composer.weights`; the model is the planner's."""
    chosen = sorted((loaded[name] for name in coeffs), key=lambda x: x.order)
    factors = [_factor(one.name, coeffs[one.name]) for one in chosen]
    touched: dict[str, list[tuple[int, str]]] = {}
    for ordinal, one in enumerate(chosen):
        fit = planner.fit(one)
        if fit.dense:
            raise CompositionError(
                f"adapter {one.name!r} holds all of {next(iter(fit.dense))!r}, which has no "
                "coefficient; build the Composer with dense='skip' to leave heads out."
            )
        for name, own in fit.diffs.items():
            touched.setdefault(name, []).append((ordinal, own))
    weights = {}
    for name in sorted(touched):
        parameter = planner.fitter.index.get(name)
        parts = [chosen[ordinal] for ordinal, _ in touched[name]]
        own_factors = [factors[ordinal] for ordinal, _ in touched[name]]
        diffs = []
        for ordinal, own_name in touched[name]:
            diff = planner.diff(chosen[ordinal].name, own_name, parameter.device)
            if diff.mode == "set":
                raise CompositionError(
                    f"adapter {chosen[ordinal].name!r} replaces entries of {name!r} (mode 'set'), "
                    "which have no coefficient to differentiate in."
                )
            diffs.append(diff)
        packed = planner.packed_diffs(name, tuple(one.digest for one in parts), diffs)
        factor = torch.stack([f.to(parameter.device) for f in own_factors])
        weights[name] = compose_diffs(parameter.detach(), diffs, factor, packed=packed)
    return weights


def _factor(name: str, coeff: Tensor | float) -> Tensor:
    if isinstance(coeff, Tensor) and coeff.ndim == 0 and coeff.is_floating_point():
        check_coeff(name, coeff.detach())
        return coeff.float() if coeff.dtype.itemsize < 4 else coeff
    return torch.tensor(check_coeff(name, coeff), dtype=torch.float32)
