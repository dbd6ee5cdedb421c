"""Merging models by linear sums, TIES and DARE: Composer against dense task vectors and mergekit.

Ours puts sparse adapters on a model and takes them off; `compose_adapters` makes one adapter of
them. The others merge whole checkpoints, the same adapters on the same base, tensor by tensor, as
mergekit does: they cost the same at any density. mergekit runs where it is installed.

Linear and TIES are held against their definitions in fp64. DARE draws: ours against the sum of what
its own draw leaves, the plain version against the share and the scale of what stays.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.compose_sides import random_adapters
from sparseft.benchmarking.cases.encoders import DIMS, build_model, parameter_shapes
from sparseft.benchmarking.cases.parts import typical
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.competitors import absent, compiled_for_any_size
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.composition import Composer, compose_adapters
from sparseft.composition.plan import prepared
from sparseft.composition.registry import recipe_of
from sparseft.ops import resolve_backend

__all__ = ["BENCH", "dropped", "elected", "methods_case", "summed"]

_OP = "compose_methods"
_DIMS = f"{DIMS}xADAPTERS"
_DTYPES = ("fp32", "bf16", "fp16")
_KEPT = 0.5  # of DARE

# Ours by label: method and options.
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "ties": ("ties", {}),
    "dare": ("dare_linear", {"density": _KEPT, "seed": 0}),
}
# mergekit's name of a method, and what it takes for each model.
_MERGEKIT: dict[str, tuple[str, dict[str, float]]] = {
    "linear": ("task_arithmetic", {"weight": 1.0}),
    "ties": ("ties", {"weight": 1.0, "density": 1.0}),
}

Merge = Callable[..., Tensor]


def summed(base: Tensor, *tuned: Tensor) -> Tensor:
    """Return the base with all task vectors, in fp32 and rounded once (fp64 stays)."""
    wide = base.double() if base.dtype == torch.float64 else base.float()
    return (wide + sum(t.to(wide.dtype) - wide for t in tuned)).to(base.dtype)


def elected(base: Tensor, *tuned: Tensor) -> Tensor:
    """Return the base with the mean of the task vectors that have the elected sign."""
    wide = base.double() if base.dtype == torch.float64 else base.float()
    vectors = torch.stack([t.to(wide.dtype) - wide for t in tuned])
    agree = (vectors * vectors.sum(0).sign()) > 0
    chosen = torch.where(agree, vectors, 0.0).sum(0)
    return (wide + chosen / agree.sum(0).clamp(min=1)).to(base.dtype)


def dropped(base: Tensor, *tuned: Tensor) -> Tensor:
    """Return the base with task vectors of which half is dropped at random, the rest doubled."""
    wide = base.double() if base.dtype == torch.float64 else base.float()
    out = wide.clone()
    for t in tuned:
        vector = t.to(wide.dtype) - wide
        out += vector * torch.empty_like(vector).bernoulli_(_KEPT) / _KEPT
    return out.to(base.dtype)


_PLAIN: dict[str, Merge] = {"linear": summed, "ties": elected, "dare": dropped}


def methods_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare on an encoder and random adapters, coefficients 1."""
    check_shape(_OP, _DIMS, shape)
    check_densities(_OP, densities)
    kind = torch_dtype(_OP, dtype, _DTYPES)
    model, count = shape[:-1], shape[-1]

    def build(device: torch.device) -> Prepared:
        shapes = parameter_shapes(model)
        numel = sum(s.numel() for s in shapes.values())
        largest = max(s.numel() for s in shapes.values())
        # checkpoints, a result, and ours; per entry what adapters hold; a tensor's gate in fp64
        needed = float(numel * kind.itemsize * (count + 3))
        needed += sum(densities) * numel * count * 24 + 16 * largest * (2 * count + 3)
        require_memory(needed, device)
        contenders: dict[str, Contender] = {}
        for density in densities:
            sides = _Sides(model, count, kind, density, device)
            for name, make in sides.ours().items():
                made = contenders[f"{name}, {percent(density)}"] = attempt(make)
                made.density = density
            if density == typical(densities):
                others = {name: attempt(make) for name, make in sides.others().items()}
                for made in others.values():  # base and models in, a model out
                    made.bytes = float(numel * kind.itemsize * (count + 2))
                contenders |= others
            del sides
        for name, made in contenders.items():
            made.work = next((label for label in _METHODS if label in name), "")
        facts = {"parameters": numel, "adapters": count}
        return Prepared(contenders, _plain_name("linear"), facts=facts, warmup=1, least=3)

    return Case(case_name(_OP, shape, dtype), build)


def _plain_name(label: str) -> str:
    return f"torch, dense task vectors, {label}"


class _Sides:
    """One base, adapters of one density, and the checkpoints that they make."""

    def __init__(
        self,
        model: Shape,
        count: int,
        kind: torch.dtype,
        density: float,
        device: torch.device,
    ) -> None:
        self.model = build_model(model, device).to(kind)
        self.kind, self.device = kind, device
        shapes = {n: p.shape for n, p in self.model.named_parameters()}
        self.adapters = random_adapters(count, shapes, kind, density, device)
        self.digests = [adapter.digest for adapter in self.adapters.values()]
        self.base = {n: p.detach().flatten().clone() for n, p in self.model.named_parameters()}

    def vectors(self, label: str, name: str) -> list[Tensor]:
        """Return the task vectors of one tensor in fp64, as the method prepares them."""
        method, options = _METHODS[label]
        recipe = recipe_of(method, options)
        found = []
        for adapter, digest in zip(self.adapters.values(), self.digests, strict=True):
            diff = prepared(adapter[name], recipe, name=name, digest=digest)
            found.append(diff.to_dense().double().flatten())
        return found

    def exact(self, label: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield what each tensor becomes, in fp64, and where any task vector has an entry."""
        merge = elected if label == "ties" else summed
        for name, base in self.base.items():
            wide, vectors = base.double(), self.vectors(label, name)
            touched = torch.stack([v != 0 for v in vectors]).any(0)
            yield name, merge(wide, *(wide + v for v in vectors)), touched

    # Ours.

    def ours(self) -> dict[str, Callable[[], Contender]]:
        made: dict[str, Callable[[], Contender]] = {
            f"Composer, {label}": partial(self.composer, label) for label in _METHODS
        }
        made["compose_adapters, ties"] = self.merged
        return made

    def composer(self, label: str) -> Contender:
        method, options = _METHODS[label]
        composer = Composer(self.model, self.adapters)

        def run() -> None:
            composer.switch(list(self.adapters), method=method, **options)
            composer.revert()

        composer.switch(list(self.adapters), method=method, **options)
        checks = self.near(label, self.model.get_parameter, 1)
        composer.revert()
        backend = resolve_backend("compose_many_", *(p.detach() for p in self.model.parameters()))
        return Contender(run, checks, {"backend": backend}, ours=True)

    def merged(self) -> Contender:
        def run() -> Any:
            return compose_adapters(self.adapters, method="ties", check_base=False)

        merged = run()

        def whole(name: str) -> Tensor:
            return self.base[name].double() + merged[name].to_dense().double().flatten()

        return Contender(run, self.near("ties", whole, 1), {"nnz": merged.nnz}, ours=True)

    def near(self, label: str, get: Callable[[str], Tensor], roundings: int) -> list[Check]:
        """Merged entries as near to the definition as so many roundings allow, the others kept."""
        limit = roundings**0.5 * torch.finfo(self.kind).eps / 2
        error, size, lost = 0.0, 0.0, 0
        for name, exact, touched in self.exact(label):
            got = get(name).detach().flatten()
            # over all tensors: some have one entry, which may nearly cancel
            error += float((got.double() - exact)[touched].square().sum())
            size += float(exact[touched].square().sum())
            lost += int(((got.double() != self.base[name].double()) & ~touched).sum())
        return [
            Check("merged entries: error", (error / size) ** 0.5, limit),
            Check("untouched entries that differ", float(lost), 0.0),
        ]

    # The others.

    def others(self) -> dict[str, Callable[[], Contender]]:
        tuned = {
            name: [
                (base.double() + a[name].to_dense().double().flatten()).to(self.kind)
                for a in self.adapters.values()
            ]
            for name, base in self.base.items()
        }
        made: dict[str, Callable[[], Contender]] = {
            _plain_name(label): partial(self.plain, tuned, label, merge)
            for label, merge in _PLAIN.items()
        }
        made[f"compiled: {_plain_name('ties')}"] = lambda: compiled_for_any_size(
            elected, partial(self.plain, tuned, "ties")
        )
        for label in _MERGEKIT:
            made[f"mergekit, {label}"] = partial(self.mergekit, tuned, label)
        return made

    def plain(self, tuned: dict[str, list[Tensor]], label: str, merge: Merge) -> Contender:
        def run() -> dict[str, Tensor]:
            with torch.no_grad():
                return {name: merge(base, *tuned[name]) for name, base in self.base.items()}

        checks = [_drawn(self.base, tuned, merge)] if label == "dare" else []
        if not checks:
            # checkpoints are rounded before their differences are taken
            checks = self.near(label, run().__getitem__, 2 + len(self.adapters))
        return Contender(run, checks)

    def mergekit(self, tuned: dict[str, list[Tensor]], label: str) -> Contender:
        if absent("mergekit"):
            return Contender(skipped="mergekit is not installed (pip install mergekit==0.1.5)")
        name, options = _MERGEKIT[label]
        parameters = {key: [value] * len(self.adapters) for key, value in options.items()}
        try:
            method = importlib.import_module("mergekit.merge_methods").get(name)
            merge_tensors = importlib.import_module("mergekit.merge_methods.api").merge_tensors
        except (ImportError, AttributeError, KeyError, RuntimeError) as error:
            return Contender(skipped=f"mergekit has another interface than 0.1.5: {error}")

        def merge(base: Tensor, *models: Tensor) -> Tensor:
            return merge_tensors([base, *models], method, parameters=parameters, base_index=0)

        return self.plain(tuned, label, merge)


def _drawn(base: dict[str, Tensor], tuned: dict[str, list[Tensor]], merge: Merge) -> Check:
    """Of one model alone on a base of zeros: what stays is scaled, and it is half of all.

    The number is the distance from half in standard deviations; infinite where a value is neither
    dropped nor scaled.
    """
    kept, count = 0, 0
    for name, weight in base.items():
        vector = tuned[name][0].double() - weight.double()
        found = merge(torch.zeros_like(vector), vector)
        stays = (found - vector / _KEPT).abs() <= 1e-12
        if not bool((stays | (found == 0)).all()):
            return Check("values neither dropped nor scaled", float("inf"), 0.0)
        moved = vector != 0
        kept, count = kept + int((stays & moved).sum()), count + int(moved.sum())
    away = abs(kept - _KEPT * count) / max(1.0, (count * _KEPT * (1 - _KEPT)) ** 0.5)
    return Check("kept share off, in standard deviations", away, 6.0)


def _shapes(models: Sequence[Shape], count: int) -> tuple[Shape, ...]:
    return tuple((*model, count) for model in models)


BENCH = OpBench(
    name=_OP,
    summary="linear, TIES and DARE: sparse adapters on and off, against whole checkpoints merged",
    dims=_DIMS,
    shapes={
        "cuda": _shapes(((12, 768, 250_002),), 2),
        "cpu": _shapes(((2, 256, 4_000),), 2),
        "tiny": _shapes(((1, 32, 64),), 2),
    },
    dtypes=_DTYPES,
    densities=(0.01, 0.1),
    build=methods_case,
)
