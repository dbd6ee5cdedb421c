"""Denoising: the low-rank part of each matrix whole, its residual pruned to the largest entries.

The seed paper's abstract speaks of denoising the weight matrices of the pre-trained model; its
method, DeFT-X, denoises the *differences* ``theta1 - theta0`` between the fine-tuned and the
pre-trained weights. That is ``target="delta"``, the default. ``target="weight"`` decomposes the
weights themselves, which is the step that LIFT takes (``select(model, "low_rank")``).

Of each matrix ``D``, with ``L`` its truncated SVD and ``R = D - L``::

    denoised = L + (R where |R| is among its round(residual * numel) largest, else 0)

As ``L + R = D``, entries whose residual is kept have exactly the value they had.

How: matrices are taken in the order given, as many as half the memory holds, and decomposed in
chunks of one shape (`sparseft.ops.plan_svd`). Differences are written into the chunk's buffer,
decomposed, and pruned in it; no residual is stored. Then the window is handed out in order.

Source: https://arxiv.org/abs/2505.15090 (DeFT-X). PEFT's DEFT is an unrelated method.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sparseft._text import did_you_mean, human_bytes, parse_bytes
from sparseft.errors import DecompositionError, OptionError
from sparseft.modules import ParameterIndex
from sparseft.ops import difference_, plan_svd, prune_residual_
from sparseft.ops._rank_rules import RankRule
from sparseft.ops.score_keys import difference

__all__ = ["Denoise", "Target", "Treated", "denoised", "embedding_names", "treat"]

logger = logging.getLogger(__name__)

Target = Literal["delta", "weight"]

Triple = tuple[str, Tensor, Tensor | None]

_CHOICES = {
    "target": get_args(Target),
    "embeddings": ("denoise", "pass"),
    "vectors": ("pass", "denoise"),
}


@dataclass(frozen=True, kw_only=True)
class Denoise:
    """How matrices are denoised. `dataclasses.asdict` of it is JSON.

    Args:
        rank: singular values that are kept of every matrix. A matrix that has no more passes as it
            is. Exactly one of ``rank``, ``energy`` and ``hard``.
        energy: or the fewest whose squares sum to this share of all squares, in (0, 1]; 1 passes
            every matrix as it is.
        hard: or those above the Gavish-Donoho threshold, at the given standard deviation of the
            noise in each entry or, ``"median"``, at noise estimated from each matrix.
        residual: share of each matrix's entries at which the residual is kept, the largest ones,
            in [0, 1]; 1 passes every matrix as it is. The paper prunes it; the share it used was
            not found, 0.1 is ours.
        target: ``"delta"`` (DeFT-X): the difference theta1 - theta0. ``"weight"``: theta1.
        embeddings: ``"denoise"`` treats them as any matrix, as the paper does; ``"pass"`` leaves
            them as they are.
        vectors: ``"pass"`` leaves 1-D tensors as they are, as the paper does. ``"denoise"``: a
            vector has no low-rank part, its ``residual`` largest entries stay, the others become 0.
        memory: bytes for differences and the work on them, as a number or as text: ``"2GiB"``. A
            matrix that alone needs more is treated by itself; the first such is logged.

    Raises:
        OptionError: not exactly one rule, or a value out of range. Numbers of other libraries, such
            as numpy's, become Python's own.

    Example:
        >>> import dataclasses
        >>> dataclasses.asdict(Denoise(energy=0.9))["residual"]
        0.1
    """

    rank: int | None = None
    energy: float | None = None
    hard: float | Literal["median"] | None = None
    residual: float = 0.1
    target: Target = "delta"
    embeddings: Literal["denoise", "pass"] = "denoise"
    vectors: Literal["pass", "denoise"] = "pass"
    memory: int | str = "1GiB"
    hard_threshold: InitVar[None] = None  # no field: there to be refused by its own name

    def __post_init__(self, hard_threshold: None) -> None:
        if hard_threshold is not None:
            raise OptionError(
                f"Denoise: hard_threshold is {hard_threshold!r}; wanted hard={hard_threshold!r}, "
                "as what truncated_svd calls hard_threshold= is named here."
            )
        for name in ("rank", "energy", "hard", "residual", "memory"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        try:
            RankRule(self.rank, self.energy, self.hard)
        except OptionError as bad:
            said = str(bad).replace("truncated SVD:", "Denoise:").replace("hard_threshold", "hard")
            raise OptionError(said) from None
        share = self.residual
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise OptionError(
                f"Denoise: residual is {share!r}; wanted the share of entries at which the "
                "residual is kept, a number in [0, 1]."
            )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(
                    f"Denoise: {name} is {value!r}; wanted one of "
                    f"{', '.join(map(repr, choices))}.{did_you_mean(str(value), choices)}"
                )
        try:
            parse_bytes(self.memory)
        except ValueError as error:
            raise OptionError(f"Denoise: memory: {error}") from None

    @classmethod
    def of_method(cls, method: str, **options: Any) -> Denoise:
        """Return it from the options of a selection method, which errors name as having asked."""
        try:
            return cls(**options)
        except OptionError as bad:
            said = str(bad).replace("Denoise:", f"selection method {method!r}:", 1)
            raise OptionError(said) from None

    def kept(self, numel: int) -> int:
        """Return at how many entries of a tensor the residual is kept, rounded half to even."""
        return round(self.residual * numel)

    def changes(self, shape: torch.Size, *, embedding: bool = False) -> bool:
        """Return whether a tensor of this shape is treated, or passes as it is.

        Tensors of no entries, of no or of more than two dimensions always pass.
        """
        if not 1 <= len(shape) <= 2 or self.kept(shape.numel()) == shape.numel():
            return False
        if len(shape) == 1:
            return self.vectors == "denoise"
        if embedding and self.embeddings == "pass":
            return False
        return self.energy != 1 and (self.rank is None or self.rank < min(shape))


def _plain(value: Any) -> Any:
    """Return a number of another library as Python's own, everything else as it is."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


class Treated(NamedTuple):
    """One tensor of `treat`.

    Args:
        name: its name.
        theta1, theta0: as they were given.
        value: the denoised difference or weight, of the tensor's shape (strided for tall
            matrices); None where it passes as it is.
    """

    name: str
    theta1: Tensor
    theta0: Tensor | None
    value: Tensor | None


def denoised(
    pairs: Iterable[Triple], how: Denoise, *, embeddings: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Denoise the differences (or weights) of many tensors, in the order given.

    Args:
        pairs: triples (name, theta1, theta0), theta0 of theta1's shape, None where ``how.target``
            is ``"weight"``; floating. Read as they are needed, and held until they are handed out.
        how: what to do.
        embeddings: names of those that are embeddings (`embedding_names`), for
            ``how.embeddings="pass"``.

    Yields:
        Name and denoised difference (or weight), on theta1's device, float32, float64 where either
        side is; the caller's to keep or to change. Tall matrices are strided: they lie transposed
        in the buffer that they share with those of their shape.

    Raises:
        DecompositionError: a NaN or infinite entry in a difference (the tensor is named), shapes
            that differ, a tensor that is not floating, a name that comes twice, no triple.
        OptionError: ``how`` is no `Denoise`, or ``embeddings`` one string.

    Numerics: as `sparseft.ops.truncated_svd`: the decomposition in fp32 with fp64 factorisations,
        fp64 for float64. Exactly ``round(residual * numel)`` entries keep their value; ties go to
        the lowest flat index with the short side first.

    Example:
        >>> theta0, theta1 = torch.zeros(2, 2), torch.diag(torch.tensor([3.0, 1.0]))
        >>> [(name, delta)] = denoised([("w", theta1, theta0)], Denoise(rank=1, residual=0))
        >>> name, delta.diagonal().tolist()
        ('w', [3.0, 0.0])
    """
    for name, theta1, theta0, value in treat(pairs, how, embeddings=embeddings):
        if value is None:
            value = theta1.clone() if theta0 is None else difference(theta1, theta0)
            value = value.to(_wide(theta1, theta0))
            _check_finite(name, value, how.target)
        yield name, value


def treat(
    pairs: Iterable[Triple], how: Denoise, *, embeddings: Collection[str] = ()
) -> Iterator[Treated]:
    """As `denoised`, but what passes as it is comes as it was given, so that no difference of it is
    formed here.
    """
    if not isinstance(how, Denoise):
        got = "the class itself" if how is Denoise else f"a {type(how).__name__}"
        raise OptionError(
            f"denoise: how is {got}; wanted a Denoise, such as Denoise(rank=64)"
            + (", Denoise(**options) for a dict of options." if isinstance(how, dict) else ".")
        )
    if isinstance(embeddings, str):
        raise OptionError(
            f"denoise: embeddings is the string {embeddings!r}; wanted names, such as "
            f"{{{embeddings!r}}} or embedding_names(model)."
        )
    memory = parse_bytes(how.memory)
    window: list[Triple] = []
    held, said = 0, list[str]()
    for name, theta1, theta0 in _checked(pairs, how.target):
        size = 0
        if theta1.ndim == 2 and how.changes(theta1.shape, embedding=name in embeddings):
            size = theta1.numel() * _wide(theta1, theta0).itemsize
        if held and held + size > memory // 2:
            yield from _of_window(window, how, embeddings, memory - held, said)
            window, held = [], 0
        window.append((name, theta1, theta0))
        held += size
    yield from _of_window(window, how, embeddings, memory - held, said)


def embedding_names(model: nn.Module) -> set[str]:
    """Return the canonical names of embeddings' weights, those of tied heads included."""
    index = ParameterIndex(model)
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {n for n in index.names if any(isinstance(m, kinds) for m, _ in index.owners(n))}


def _checked(pairs: Iterable[Triple], target: Target) -> Iterator[Triple]:
    if isinstance(pairs, Mapping) or not isinstance(pairs, Iterable):
        raise DecompositionError(
            f"denoise: pairs is a {type(pairs).__name__}; wanted triples (name, theta1, theta0), "
            "such as [(n, tuned[n], base[n]) for n in tuned]."
        )
    seen = set[str]()
    for place, triple in enumerate(pairs):
        if not isinstance(triple, tuple | list) or len(triple) != 3:
            got = f"{len(triple)} items" if isinstance(triple, tuple | list) else "no tuple"
            raise DecompositionError(
                f"denoise: pairs[{place}] is a {type(triple).__name__} ({got}); wanted a triple "
                "(name, theta1, theta0), theta0 None for target='weight'."
            )
        name, theta1, theta0 = triple
        for what, tensor in (("theta1", theta1), ("theta0", theta0)):
            if not isinstance(tensor, Tensor) and (tensor is not None or what == "theta1"):
                raise DecompositionError(
                    f"denoise: {what} of {name!r} is a {type(tensor).__name__}; wanted a tensor, "
                    "torch.as_tensor makes one of an array."
                )
        if name in seen:
            raise DecompositionError(
                f"denoise: {name!r} comes twice; wanted names of their own, results go by them."
            )
        seen.add(name)
        if target == "weight":
            theta0 = None
        elif theta0 is None or theta0.shape != theta1.shape:
            got = "is None" if theta0 is None else f"has shape {tuple(theta0.shape)}"
            raise DecompositionError(
                f"denoise: theta0 of {name!r} {got}, theta1 has shape {tuple(theta1.shape)}; "
                "wanted one tensor before and after training (or target='weight')."
            )
        for tensor in (theta1, theta0):
            if tensor is not None and not tensor.is_floating_point():
                raise DecompositionError(
                    f"denoise: {name!r} has dtype {tensor.dtype}; wanted floating tensors."
                )
        yield name, theta1.detach(), None if theta0 is None else theta0.detach()


def _wide(theta1: Tensor, theta0: Tensor | None) -> torch.dtype:
    double = torch.float64 in (theta1.dtype, theta1.dtype if theta0 is None else theta0.dtype)
    return torch.float64 if double else torch.float32


def _of_window(
    window: list[Triple],
    how: Denoise,
    embeddings: Collection[str],
    free: int,
    said: list[str],
) -> Iterator[Treated]:
    """Denoise the matrices of a window together, then hand everything out in order.

    ``free`` is what the memory leaves beside the window's own differences, ``said`` the matrix that
    was logged as larger.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Triple]] = {}
    for name, theta1, theta0 in window:
        if theta1.ndim == 2 and how.changes(theta1.shape, embedding=name in embeddings):
            key = (theta1.device, _wide(theta1, theta0))
            groups.setdefault(key, []).append((name, theta1, theta0))
    done: dict[str, Tensor] = {}
    for (device, dtype), members in groups.items():
        done |= _matrices(members, how, device, dtype, free, said)
    for name, theta1, theta0 in window:
        value = done.pop(name, None)
        if theta1.ndim == 1 and how.changes(theta1.shape):
            value = _vector(name, theta1, theta0, how)
        yield Treated(name, theta1, theta0, value)


def _matrices(
    members: list[Triple],
    how: Denoise,
    device: torch.device,
    dtype: torch.dtype,
    free: int,
    said: list[str],
) -> dict[str, Tensor]:
    """Return the denoised matrices of one device and dtype, views of the chunks' buffers."""
    sides = {name: (theta1, theta0) for name, theta1, theta0 in members}
    # A chunk's bytes count its own differences, which ``free`` has left out.
    memory = max(0, free + min(x.numel() for _, x, _ in members) * dtype.itemsize)
    plan = plan_svd(
        {name: theta1.shape for name, theta1, _ in members},
        rank=how.rank,
        energy=how.energy,
        hard_threshold=how.hard,
        dtype=dtype,
        memory=memory,
        oversized="alone",
    )

    def fill(name: str, out: Tensor) -> None:
        theta1, theta0 = sides[name]
        difference_(out, theta1, None if theta0 is None else theta0.to(device))

    done: dict[str, Tensor] = {}
    if plan.bytes > memory and not said:
        largest = max(plan.chunks, key=lambda c: c.bytes)
        said.append(largest.names[0])
        logger.warning(
            "%r of shape %s needs %s, more than memory=%s leaves: it is treated by itself, as are "
            "others like it. Leave it out, or pass embeddings as they are, where that is too much.",
            largest.names[0], largest.shape, human_bytes(largest.bytes), how.memory,
        )  # fmt: skip
    for chunk, buffer, found in plan.run_chunks(fill, device=device):
        kept = how.kept(buffer[0].numel())
        prune_residual_(buffer, found.U * found.S[:, None, :], found.Vh, kept)
        for name, tall, own in zip(chunk.names, chunk.tall, buffer, strict=True):
            done[name] = own.mT if tall else own
        del buffer, found, own  # before the next chunk is decomposed
    return done


def _vector(name: str, theta1: Tensor, theta0: Tensor | None, how: Denoise) -> Tensor:
    """Return a vector's largest entries, zeros elsewhere: all of it is residual."""
    wide = _wide(theta1, theta0)
    value = (theta1.clone() if theta0 is None else difference(theta1, theta0)).to(wide)
    _check_finite(name, value, how.target)
    nothing = value.new_zeros((1, 1, 0)), value.new_zeros((1, 0, value.numel()))
    return prune_residual_(value.view(1, 1, -1), *nothing, how.kept(value.numel())).view(-1)


def _check_finite(name: str, value: Tensor, target: Target) -> None:
    if value.numel() and not bool(value.abs().amax().isfinite()):
        what = "difference" if target == "delta" else "weight"
        raise DecompositionError(
            f"denoise: the {what} of {name!r} of shape {tuple(value.shape)} holds "
            f"{int(value.isnan().sum())} NaN and {int(value.isinf().sum())} infinite entries; "
            "wanted finite ones. Did training diverge?"
        )
