"""``deltas_svd``: the entries that moved most, after the differences were denoised (DeFT-X)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from sparseft.denoise import Denoise, Target, Treated, embedding_names, treat
from sparseft.errors import DecompositionError, OptionError
from sparseft.modules.weight_storage import full_value
from sparseft.ops.score_keys import difference, flat_part
from sparseft.selection.magnitude import pairs_of
from sparseft.selection.registry import Candidates, Piece, pieces_of, register_selector
from sparseft.selection.source import Source, TensorSource

__all__ = ["select_deltas_svd"]


@register_selector("deltas_svd", reference="https://arxiv.org/abs/2505.15090", zero="did not move")
def select_deltas_svd(
    candidates: Candidates,
    *,
    base: Source | None = None,
    tuned: Source | None = None,
    rank: int | None = None,
    energy: float | None = None,
    hard: float | Literal["median"] | None = None,
    residual: float = 0.1,
    target: Target = "delta",
    embeddings: Literal["denoise", "pass"] = "denoise",
    vectors: Literal["pass", "denoise"] = "pass",
    memory: int | str = "1GiB",
) -> Iterator[Piece]:
    """Keep the largest changes after each matrix of changes was denoised by an SVD (DeFT-X).

    The paper's abstract speaks of the weight matrices of the pre-trained model; what its method
    decomposes is the difference theta1 - theta0, as is done here. Where nothing passes through the
    decomposition (``residual=1``, a rank no matrix exceeds) the masks are those of ``magnitude``.

    Args:
        candidates: parameters; theta1 unless ``tuned`` is given.
        base: theta0, in the forms that ``magnitude`` takes; not needed for ``target="weight"``.
        tuned: theta1, likewise.
        rank, energy, hard, residual, target, embeddings, vectors, memory: as in
            `sparseft.Denoise`, whose ``dataclasses.asdict`` they are. With ``target="weight"``
            theta1 itself is denoised and ranked.

    Raises:
        DecompositionError: a NaN or infinite entry in a difference; names the tensor.
        OptionError: base is missing; as `sparseft.Denoise`.
        MaskError: as ``magnitude``.

    Numerics: ``magnitude``'s, with `sparseft.denoised` between difference and ranking. Differences
        are taken once each; at most ``memory`` of them are held, the order of names is kept.
    """
    how = Denoise.of_method(
        "deltas_svd", rank=rank, energy=energy, hard=hard, residual=residual, target=target,
        embeddings=embeddings, vectors=vectors, memory=memory,
    )  # fmt: skip
    pairs: Iterator[tuple[str, Tensor, Tensor | None]]
    if target == "weight":
        pairs = weights_of(candidates, tuned)
    elif base is None:
        raise OptionError(
            "selection method 'deltas_svd' needs base=..., the model before training; without one "
            "there are target='weight' and the method 'low_rank'."
        )
    else:
        pairs = pairs_of(candidates, base, tuned)
    embedded = embedding_names(candidates.model) if embeddings == "pass" else ()
    return _pieces(treat(pairs, how, embeddings=embedded), target)


def weights_of(
    candidates: Candidates, tuned: Source | None
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield the candidates' weights, or those of another source, without a theta0."""
    source = None if tuned is None else TensorSource(tuned, candidates.model, "tuned")
    for name, parameter in candidates.parameters.items():
        shape = tuple(parameter.shape)
        yield name, full_value(parameter) if source is None else source.get(name, shape), None


def _pieces(stream: Iterator[Treated], target: Target) -> Iterator[Piece]:
    for item in stream:
        yield from scores_of(item, target)


def scores_of(item: Treated, target: Target) -> Iterator[Piece]:
    """Yield magnitudes of a tensor that was denoised, or of one that passes as it is."""
    name, theta1, theta0, value = item
    for part in pieces_of(theta1.numel()):
        if value is not None:
            scores = flat_part(value, part).abs()
        else:
            scores = flat_part(theta1, part)
            if theta0 is not None:
                scores = difference(scores, flat_part(theta0, part))
            scores = scores.abs()
            if not bool(scores.amax().isfinite()):
                what = "difference" if target == "delta" else "weight"
                raise DecompositionError(
                    f"the {what} of {name!r} holds NaN or infinite entries between flat index "
                    f"{part.start} and {part.stop}; wanted finite ones. Did training diverge?"
                )
        yield Piece(name, part.start, scores)
