"""What surrounds the products of a truncated SVD against plain torch, and a whole denoise.

Pruning overwrites its matrices: there every contender first copies them, and the copy is in all
times. The loops that the denoise is held against decompose and multiply out the low-rank part; they
prune nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sparseft.benchmarking.checks import Check, as_accurate, equal_bits, worst
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared, faster
from sparseft.denoise import Denoise, denoised
from sparseft.ops import difference_, plan_svd, prune_residual_, resolve_backend
from sparseft.ops._sketch import sign_sketch
from sparseft.ops._svd_problem import full_precision
from sparseft.ops.cholesky_inverse import cholesky_inverse, cholesky_inverse_reference

__all__ = [
    "FULL",
    "LOWRANK",
    "OURS",
    "XLMR_ENCODER",
    "cholesky_case",
    "denoise_case",
    "difference_case",
    "prune_case",
    "sketch_case",
]

TORCH = "torch"
OURS = "denoised"
PLAN = "plan_svd, nothing pruned"
FULL = "torch.linalg.svd, one by one"
LOWRANK = "torch.svd_lowrank(niter=2), one by one"

XLMR_ENCODER = (((768, 768),) * 4 + ((3072, 768), (768, 3072))) * 12

_KEPT = 0.1
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def difference_case(shape: tuple[int, int], dtype: str, *, turned: bool = False) -> Case:
    """Compare ``wide(theta1) - wide(theta0)``, written as it is or transposed."""

    def build(device: torch.device) -> Prepared:
        before, after = (_noise((1, *shape), seed, device)[0].to(_DTYPES[dtype]) for seed in (0, 1))

        def made() -> Tensor:
            return before.new_empty(shape[::-1] if turned else shape, dtype=torch.float32)

        mine, theirs = made(), made()

        def plain() -> Tensor:
            return (theirs.mT if turned else theirs).copy_(after).sub_(before)

        def ours() -> Tensor:
            return difference_(mine.mT if turned else mine, after, before)

        wanted = (after.double() - before.double()).float()  # one rounding, as bf16 and fp32 have
        checks = [equal_bits("difference", ours().contiguous(), wanted)]
        moved = before.numel() * (2 * before.element_size() + 4)

        def derive(timing: Timing, name: str, contender: Contender) -> Facts:
            return {"one pass, GB/s": moved / timing.median(name) * 1e-9}

        facts = {"backend": resolve_backend("difference_", mine, after, before)}
        return Prepared(
            {TORCH: Contender(plain), "difference_": Contender(ours, checks, facts)},
            TORCH,
            derive=derive,
        )

    name = f"{shape[0]}x{shape[1]}/{dtype}{'/transposed' if turned else ''}"
    return Case(f"svd/difference/{name}", build)


def sketch_case(rows: int, columns: int) -> Case:
    """Compare the same signs by int64 arithmetic of torch; other random numbers stand beside."""

    def build(device: torch.device) -> Prepared:
        def signs(backend: str | None, where: torch.device) -> Tensor:
            return sign_sketch(
                rows, range(columns), 7, dtype=torch.float32, device=where, backend=backend
            )

        got, wanted = signs(None, device), signs("reference", torch.device("cpu"))
        facts = {"backend": resolve_backend("sign_sketch", got)}
        return Prepared(
            {
                TORCH: Contender(lambda: signs("reference", device)),
                "torch.randn, another on each machine": Contender(
                    lambda: torch.randn(rows, columns, device=device)
                ),
                "sign_sketch": Contender(
                    lambda: signs(None, device), [equal_bits("signs", got.cpu(), wanted)], facts
                ),
            },
            TORCH,
        )

    return Case(f"svd/sketch/{rows}x{columns}", build)


def prune_case(count: int, shape: tuple[int, int], rank: int) -> Case:
    """Compare keeping the largest tenth of what a low-rank part leaves of each matrix."""

    def build(device: torch.device) -> Prepared:
        delta = _noise((count, *shape), 0, device)
        left = _noise((count, shape[0], rank), 1, device) * rank**-0.5
        right = _noise((count, rank, shape[1]), 2, device)
        work, numel = torch.empty_like(delta), shape[0] * shape[1]
        keep = max(1, round(_KEPT * numel))

        def plain() -> Tensor:
            work.copy_(delta)
            with full_precision(device):
                low = left @ right
            flat = low.view(count, -1)
            at = torch.topk((work - low).abs_().view(count, -1), keep, sorted=False).indices
            return work.copy_(flat.scatter_(1, at, work.view(count, -1).gather(1, at)).view_as(low))

        def ours() -> Tensor:
            return prune_residual_(work.copy_(delta), left, right, keep)

        theirs = plain().clone()
        checks = _pruned(delta, left, right, keep, ours(), theirs)

        def derive(timing: Timing, name: str, contender: Contender) -> Facts:
            return {"ns per thousand entries": timing.median(name) * 1e12 / (count * numel)}

        facts = {"backend": resolve_backend("prune_residual_", delta), "kept": keep}
        return Prepared(
            {TORCH: Contender(plain), "prune_residual_": Contender(ours, checks, facts)},
            TORCH,
            derive=derive,
        )

    return Case(f"svd/prune/{count}x{shape[0]}x{shape[1]}/r{rank}", build)


def cholesky_case(count: int, columns: int) -> Case:
    """Compare inverse factors of Grams in fp32; in fp64, which the SVD takes, beside."""

    def build(device: torch.device) -> Prepared:
        tall = _noise((count, 8 * columns, columns), 0, device)
        gram = tall.mT @ tall
        shift, wide = gram.new_zeros(count), gram.double()
        exact, _ = cholesky_inverse_reference(wide, shift.double())
        theirs, _ = cholesky_inverse_reference(gram, shift)
        inverse, failed = cholesky_inverse(gram, shift)
        # each rounds in an order of its own, and few numbers are summed: twice is too narrow here
        got = as_accurate("inverse", inverse.contiguous(), theirs, exact)
        checks = [
            Check(got.name, got.got, 2 * got.limit),
            Check("failed factors", float(failed.count_nonzero()), 0.0),
        ]
        return Prepared(
            {
                TORCH: Contender(lambda: cholesky_inverse_reference(gram, shift)),
                "torch, fp64": Contender(lambda: cholesky_inverse_reference(wide, shift.double())),
                "cholesky_inverse": Contender(
                    lambda: cholesky_inverse(gram, shift),
                    checks,
                    {"backend": resolve_backend("cholesky_inverse", gram, shift)},
                ),
            },
            TORCH,
        )

    return Case(f"svd/cholesky_inverse/{count}x{columns}x{columns}", build)


def denoise_case(label: str, shapes: tuple[tuple[int, int], ...], rank: int) -> Case:
    """Compare denoising all matrices of a model with decomposing them one by one.

    Residuals of all sides are in the facts, over the least there is; ours must be within 1 %.
    """

    def build(device: torch.device) -> Prepared:
        pairs = [
            (f"{i:03d}", _falling(shape, i, device), torch.zeros(shape, device=device))
            for i, shape in enumerate(shapes)
        ]
        matrices = {name: theta1 for name, theta1, _ in pairs}
        how = Denoise(rank=rank, residual=_KEPT, memory="8GiB")
        plan = plan_svd({n: x.shape for n, x in matrices.items()}, rank=rank, memory="8GiB")

        def ours() -> dict[str, Tensor]:
            return dict(denoised(pairs, how))

        def planned() -> dict[str, Tensor]:
            found = plan.run(matrices.__getitem__)
            return {name: _product(f.U[0], f.S[0], f.Vh[0]) for name, f in found}

        def one_by_one(cut: Callable[[Tensor], Tensor]) -> Callable[[], dict[str, Tensor]]:
            return lambda: {name: cut(x) for name, x in matrices.items()}

        def full(x: Tensor) -> Tensor:
            u, s, vh = torch.linalg.svd(x, full_matrices=False)
            return _product(u[:, :rank], s[:rank], vh[:rank])

        def lowrank(x: Tensor) -> Tensor:
            u, s, v = torch.svd_lowrank(x, q=min(rank + 8, *x.shape), niter=2)
            return _product(u[:, :rank], s[:rank], v[:, :rank].mT)

        least = {name: _least(matrices[name], rank) for name in _firsts(shapes)}

        def residual(found: dict[str, Tensor]) -> float:
            lost = {n: torch.linalg.vector_norm((matrices[n] - found[n]).double()) for n in least}
            return max(float(lost[n]) / least[n] for n in least)

        result, low = ours(), planned()
        miscounted = sum(
            int(_kept(result[name], x, (x - low[name]).abs()).sum()) != how.kept(x.numel())
            for name, x in matrices.items()
        )
        checks = [
            Check("matrices with another number of entries kept", float(miscounted), 0.0),
            Check("residual over the least there is", residual(low), 1.01),
        ]
        del result, low
        some = next(iter(matrices.values()))
        facts = {"backend": resolve_backend("prune_residual_", some)}
        contenders = {
            FULL: Contender(one_by_one(full)),
            LOWRANK: Contender(one_by_one(lowrank)),
            PLAN: Contender(planned, checks[1:]),
            OURS: Contender(ours, checks, facts),
        }
        for name, run in ((FULL, one_by_one(full)), (LOWRANK, one_by_one(lowrank))):
            contenders[name].facts["residual over the least"] = residual(run())
        contenders[PLAN].facts["residual over the least"] = checks[1].got
        return Prepared(
            contenders,
            FULL,
            targets=(faster(50, OURS, FULL), faster(3, OURS, LOWRANK)),
            facts={"matrices": len(shapes), "entries": sum(m * n for m, n in shapes)},
            clocks=("wall",),
            warmup=1,
            least=3,
        )

    return Case(f"denoise/{label}/r{rank}", build)


def _noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=generator)


def _falling(shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """Return a matrix whose singular values fall about as i ** -0.5, like those of differences."""
    m, n = shape
    short = min(m, n)
    sizes = torch.arange(1, short + 1, device=device) ** -0.5
    left, right = _noise((m, short), 2 * seed, device), _noise((short, n), 2 * seed + 1, device)
    return (left * sizes) @ right * (1e-3 / short**0.5)


def _product(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    with full_precision(u.device):
        return (u * s) @ vh


def _firsts(shapes: Iterable[tuple[int, int]]) -> list[str]:
    """Return the name of the first matrix of each shape: those whose residual is looked at."""
    found: dict[tuple[int, int], str] = {}
    for i, shape in enumerate(shapes):
        found.setdefault(shape, f"{i:03d}")
    return list(found.values())


def _least(x: Tensor, rank: int) -> float:
    """Return the norm of what the best matrix of a rank leaves, in fp64."""
    return float(torch.linalg.vector_norm(torch.linalg.svdvals(x.double())[rank:]))


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
