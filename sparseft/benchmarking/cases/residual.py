"""What surrounds the products of a truncated SVD: the difference before, the pruned rest after.

Pruning overwrites its matrices: there every contender first copies them, and the copy is in all
times and bytes. The density of a row is the share of entries whose residual is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparseft.benchmarking.cases.asked import check_densities, check_shape, percent, torch_dtype
from sparseft.benchmarking.cases.parts import typical
from sparseft.benchmarking.catalogue import OpBench, Shape, case_name
from sparseft.benchmarking.checks import Check, as_accurate, equal_bits, worst
from sparseft.benchmarking.competitors import compiled
from sparseft.benchmarking.limits import require_memory
from sparseft.benchmarking.suite import Case, Contender, Prepared, attempt
from sparseft.ops import difference_, prune_residual_, resolve_backend
from sparseft.ops._svd_problem import full_precision

__all__ = ["BENCHES", "difference_case", "prune_case"]

TORCH = "torch"
COMPILED = "compiled: torch"
TURNED = ", transposed"

_DIFFERENCE_DIMS, _PRUNE_DIMS = "ROWSxCOLUMNS", "COUNTxROWSxCOLUMNSxRANK"
_DTYPES = ("bf16", "fp32", "fp16")


# ---- difference


def difference_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare ``wide(theta1) - wide(theta0)``, written as it is and transposed."""
    check_shape("difference", _DIFFERENCE_DIMS, shape)
    kind = torch_dtype("difference", dtype, _DTYPES)

    def build(device: torch.device) -> Prepared:
        numel = shape[0] * shape[1]
        require_memory(numel * (2 * kind.itemsize + 8 * 4 + 2 * 8), device)
        before, after = (_noise(shape, seed, device).to(kind) for seed in (0, 1))
        wanted = (after.double() - before.double()).float()  # one rounding, as each of them has
        moved = float(numel * (2 * kind.itemsize + 4))

        def check(got: Tensor) -> list[Check]:
            return [equal_bits("difference", got.contiguous(), wanted)]

        def plain(turned: bool) -> Contender:
            out = _output(shape, turned, device)
            run = partial(_minus, out, after, before)
            return Contender(run, check(run()), bytes=moved)

        def fused(turned: bool) -> Contender:
            out = _output(shape, turned, device)
            return compiled(_minus, out, after, before, check=check)

        def ours(turned: bool) -> Contender:
            out = _output(shape, turned, device)
            run = partial(difference_, out, after, before)
            facts = {"backend": resolve_backend("difference_", out, after, before)}
            return Contender(run, check(run()), facts, ours=True, bytes=moved)

        contenders: dict[str, Contender] = {}
        sides: dict[str, Callable[[bool], Contender]] = {
            TORCH: plain,
            COMPILED: fused,
            "difference_": ours,
        }
        for suffix in ("", TURNED):
            for name, make in sides.items():
                made = contenders[name + suffix] = attempt(partial(make, bool(suffix)))
                made.bytes, made.work = moved, suffix.strip(" ,")
        return Prepared(contenders, TORCH)

    return Case(case_name("difference", shape, dtype), build)


def _output(shape: Shape, turned: bool, device: torch.device) -> Tensor:
    if turned:
        return torch.empty(shape[::-1], device=device).mT
    return torch.empty(shape, device=device)


def _minus(out: Tensor, after: Tensor, before: Tensor) -> Tensor:
    return out.copy_(after).sub_(before)


# ---- pruning


def prune_case(shape: Shape, densities: tuple[float, ...], dtype: str) -> Case:
    """Compare keeping the largest entries of what a low-rank part leaves of each matrix."""
    check_shape("prune_residual", _PRUNE_DIMS, shape)
    check_densities("prune_residual", densities)
    torch_dtype("prune_residual", dtype, ("fp32",))
    count, m, n, rank = shape

    def build(device: torch.device) -> Prepared:
        numel = m * n
        # matrices, their work, what torch holds beside them; and the gate's, matrix by matrix
        require_memory(4.0 * count * numel * 7 + 8.0 * numel * 8, device)
        delta = _noise((count, m, n), 0, device)
        left = _noise((count, m, rank), 1, device) * rank**-0.5
        right = _noise((count, rank, n), 2, device)
        work = torch.empty_like(delta)
        # copied in and out; then at least in and out again
        moved, flops = 16.0 * count * numel, 2.0 * count * numel * rank
        contenders: dict[str, Contender] = {}
        for density in densities:
            keep = max(1, round(density * numel))
            theirs = _prune(work, delta, left, right, keep).clone()

            def check(got: Tensor, keep: int = keep, theirs: Tensor = theirs) -> list[Check]:
                return _pruned(delta, left, right, keep, got, theirs)

            def plain(keep: int = keep, check: Callable[..., list[Check]] = check) -> Contender:
                run = partial(_prune, work, delta, left, right, keep)
                return Contender(run, check(run()))

            def fused(keep: int = keep, check: Callable[..., list[Check]] = check) -> Contender:
                with full_precision(device):
                    return compiled(_prune_plain, work, delta, left, right, keep, check=check)

            def ours(keep: int = keep, check: Callable[..., list[Check]] = check) -> Contender:
                def run() -> Tensor:
                    return prune_residual_(work.copy_(delta), left, right, keep)

                facts = {"backend": resolve_backend("prune_residual_", delta), "kept": keep}
                return Contender(run, check(run()), facts, ours=True)

            sides = {TORCH: plain, "prune_residual_": ours}
            if density == typical(densities):
                sides[COMPILED] = fused
            for name, make in sides.items():
                made = contenders[f"{name}, {percent(density)}"] = attempt(make)
                made.density, made.bytes, made.flops = density, moved, flops
        return Prepared(contenders, next(iter(contenders)))

    return Case(case_name("prune_residual", shape, dtype), build)


def _prune(work: Tensor, delta: Tensor, left: Tensor, right: Tensor, keep: int) -> Tensor:
    with full_precision(delta.device):
        return _prune_plain(work, delta, left, right, keep)


def _prune_plain(work: Tensor, delta: Tensor, left: Tensor, right: Tensor, keep: int) -> Tensor:
    work.copy_(delta)
    low = left @ right
    flat, old = low.flatten(1), work.flatten(1)
    at = torch.topk((old - flat).abs(), keep, sorted=False).indices
    return work.copy_(flat.scatter(1, at, old.gather(1, at)).view_as(low))


def _kept(found: Tensor, matrix: Tensor, rest: Tensor) -> Tensor:
    """Return which entries a pruning left: not those whose low-rank part happens to equal them."""
    return (found == matrix) & (rest > 1e-5 * rest.amax())


def _pruned(
    delta: Tensor, left: Tensor, right: Tensor, keep: int, got: Tensor, theirs: Tensor
) -> list[Check]:
    """Against float64, matrix by matrix: how many entries are kept, which, the others' values."""
    miscounted, misplaced, values = 0, 0, []
    for d, u, v, mine, plain in zip(delta, left, right, got, theirs, strict=True):
        low = u.double() @ v.double()
        rest = (d - low).abs()
        kept = _kept(mine, d, rest)
        miscounted += int(kept.sum()) != keep
        # what rounding of a product can move past the threshold, and no more
        edge = torch.topk(rest.view(-1), keep, sorted=False).values.min()
        slack = 1e-5 * (u.double().abs() @ v.double().abs()).max()
        misplaced += int((kept & (rest < edge - slack)).sum())
        misplaced += int((~kept & (rest > edge + slack)).sum())
        exact = torch.where(kept, d.double(), low)
        same = torch.where(kept == _kept(plain, d, rest), plain, exact.float())
        values.append(as_accurate("low-rank part", mine, same, exact))
    return [
        Check("matrices with another number of entries kept", float(miscounted), 0.0),
        Check("entries on the wrong side of the threshold", float(misplaced), 0.0),
        worst(values),
    ]


def _noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator)


BENCHES = (
    OpBench(
        name="difference",
        summary="theta1 - theta0 widened, as it lies and transposed: one pass against copy and sub",
        dims=_DIFFERENCE_DIMS,
        shapes={
            "cuda": ((4096, 11008), (11008, 4096)),
            "cpu": ((1024, 3072),),
            "tiny": ((40, 70),),
        },
        dtypes=_DTYPES,
        densities=(),
        build=difference_case,
    ),
    OpBench(
        name="prune_residual",
        summary="low-rank parts with the largest residuals kept: no residual stored, against topk",
        dims=_PRUNE_DIMS,
        shapes={
            "cuda": ((48, 768, 768, 64), (8, 768, 3072, 64)),
            "cpu": ((4, 256, 256, 16), (1, 256, 1024, 16)),
            "tiny": ((2, 40, 70, 5),),
        },
        dtypes=("fp32",),
        densities=(0.01, 0.1),
        build=prune_case,
    ),
)
