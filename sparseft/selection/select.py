"""`select`: choose which entries of a model to train."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import nn

from sparseft._registry import Registered
from sparseft._text import did_you_mean
from sparseft.diff import MaskLike, SparsePattern, as_pattern
from sparseft.errors import MaskError, OptionError, UnknownNameError
from sparseft.modules import ParameterIndex
from sparseft.modules.dense_view import readable
from sparseft.modules.sharding import settle_model
from sparseft.selection.counts import all_nnz, is_integer, is_several
from sparseft.selection.masks import Masks
from sparseft.selection.patterns import names_between
from sparseft.selection.registry import (
    REGISTRY,
    Candidates,
    check_options,
    options_of,
    scored_by,
)
from sparseft.selection.scopes import Kept, Scope, keep_best, keep_true
from sparseft.selection.source import Source

__all__ = ["candidates_of", "check_scope", "select"]

logger = logging.getLogger(__name__)

DensityOf = Literal["candidates", "model"]

# Options that say how many are wanted, by kind of method.
_FILLED_IN = {"scores": ("nnz",), "structure": ("nnz", "scope")}

# Arithmetic and comparisons exist for these; those of 8 bits are only stored.
_RANKED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def candidates_of(
    model: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> Candidates:
    """Return the floating parameters of a model that match the patterns, tied ones once.

    Raises:
        UnknownNameError: a pattern that matches nothing; the message has the nearest names.
        MaskError: no parameter is left.
        TypeError: the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(_not_a_model(model))
    settle_model(model)  # after an evaluation FSDP2's root may show whole weights for a while
    index = ParameterIndex(model)
    chosen = sorted(names_between(index, include, exclude))
    found = {name: readable(index, name) for name in chosen}
    parameters = {name: p for name, p in found.items() if p.is_floating_point()}
    if not parameters:
        raise MaskError(
            f"no parameter is left to select from: include={include!r} and exclude={exclude!r} "
            f"rule out all {len(index)} (only floating ones count)."
        )
    return Candidates(model, parameters)


@overload
def select(
    model: nn.Module,
    method: str = "magnitude",
    *,
    nnz: int | None = None,
    density: float | None = None,
    density_of: DensityOf = "candidates",
    scope: Scope = "global",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    base: Source | None = None,
    tuned: Source | None = None,
    seed: int = 0,
    **options: Any,
) -> Masks: ...


@overload
def select(
    model: nn.Module,
    method: str = "magnitude",
    *,
    nnz: Sequence[int],
    density: None = None,
    **others: Any,
) -> list[Masks]: ...


@overload
def select(
    model: nn.Module,
    method: str = "magnitude",
    *,
    nnz: None = None,
    density: Sequence[float],
    **others: Any,
) -> list[Masks]: ...


def select(
    model: nn.Module,
    method: str = "magnitude",
    *,
    nnz: int | Sequence[int] | None = None,
    density: float | Sequence[float] | None = None,
    density_of: DensityOf = "candidates",
    scope: Scope = "global",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    base: Source | None = None,
    tuned: Source | None = None,
    seed: int = 0,
    **options: Any,
) -> Masks | list[Masks]:
    """Choose exactly ``nnz`` entries of a model's parameters.

    Entries are ranked by the method's scores; ties go to the first by (canonical parameter name,
    flat index). Scores are computed and ranked a million entries at a time, so the memory needed
    does not grow with the model: about 16 bytes per kept entry, the result included, and up to 8
    for each entry of the other masks where several are asked for.

    Args:
        model: its parameters are read, never changed. Tied parameters count once. Sharded by
            `fully_shard`: every process calls, and gets the same masks; tensors are gathered one at
            a time, for methods that read them. Quantised ones are read dequantised, one at a time;
            masks have their logical shape.
        method: a name from `selectors`: "magnitude" (largest ``|theta1 - theta0|``: needs
            ``base``), "random" (``seed``), "file" (``path=``), "function" (``fn=``), ... Structures
            ("rows", "blocks", "tiles", "n:m") build on the scores of another: ``score=`` names it,
            and takes its options too.
        nnz: entries to keep in total. A list of numbers gives a list of `Masks`, each what its
            number alone would give, from one computation of the scores (but a ``shortlist`` of
            gradients is as long as the largest number needs: the others choose from more). They
            nest only with scope "global": shares of tensors and rows are apportioned anew for each
            number, and may shrink by one as the total grows.
        density: fraction to keep, in (0, 1], or a list of them; instead of ``nnz``.
        density_of: what density is a fraction of: the candidates' entries, or those of all
            floating parameters of the model.
        scope: "global"; "tensor" (every tensor its share by size) or "row" (every row of every
            tensor its share; not for structures). The total is exact in each. Masks that have a
            number of their own ("n:m", "file", bool ones of "function") take none.
        include: globs over parameter names; default all. A tied parameter is meant by any of its
            names.
        exclude: globs of names to leave out, likewise: a head's glob also leaves out an embedding
            that is tied to it.
        base: theta0: a model, a mapping from name to tensor, or a checkpoint's path. Only for
            methods that compare with it; so is ``tuned``.
        tuned: theta1, likewise; default: the model's parameters as they are now.
        seed: any integer, for methods that draw.
        options: the method's own options.

    Returns:
        `Masks`: every candidate's name -> `SparsePattern`, on the parameter's device, sorted by
        name; candidates without a kept entry have an empty pattern. A list of them, in order, for
        a list of numbers.

    Raises:
        MaskError: nnz and density both or neither given (masks from a file or function need
            neither), a count out of range, NaN scores (the tensor is named), a base that does not
            fit, a scope that masks with a number of their own cannot follow, parameters on meta or
            of 8 bits.
        UnknownNameError: an unknown method, option, or a pattern that matches nothing; the message
            has the nearest names. A base or tuned that the method does not take.
        OptionError: an option that the method needs is missing; a seed that is no integer.
        TypeError: a method that is no name, a model that is no module.

    A warning is logged when entries of score 0 had to be kept, as fewer moved than were asked for.

    Example:
        >>> import copy, torch, sparseft
        >>> base = torch.nn.Linear(3, 1, bias=False)
        >>> tuned = copy.deepcopy(base)
        >>> with torch.no_grad():
        ...     _ = tuned.weight.add_(torch.tensor([[0.1, -0.3, 0.2]]))
        >>> sparseft.select(tuned, nnz=2, base=base)["weight"].indices.tolist()
        [1, 2]
    """
    if not isinstance(method, str):
        raise TypeError(_not_a_name(method))
    if not isinstance(model, nn.Module):
        raise TypeError(_not_a_model(model))
    if not is_integer(seed):
        raise OptionError(f"seed is {seed!r}, wanted an integer.")
    entry = REGISTRY.get(method)
    check_scope(method, scope, counted=nnz is not None or density is not None)
    _check_choice("density_of", density_of, DensityOf)
    kind = entry.traits["kind"]
    known = options_of(method, options)
    arguments = dict(options)
    below = scored_by(method, options)
    _check_compared(method, below, known, base=base, tuned=tuned)
    shared = {"base": base, "tuned": tuned, "seed": int(seed)}
    arguments.update((n, value) for n, value in shared.items() if value is not None and n in known)
    # How many is known once the candidates are; wrong options are said before that.
    later = {name: None for name in _FILLED_IN.get(kind, ()) if name in known}
    check_options(method, {**arguments, **later})
    candidates = candidates_of(model, include, exclude)
    _check_values(candidates)
    counts: list[int] = []
    if nnz is not None or density is not None or kind in ("scores", "structure"):
        of = candidates.numel
        if density_of == "model":
            index = ParameterIndex(model)
            every = (readable(index, name) for name in index.names)
            of = sum(p.numel() for p in every if p.is_floating_point())
        what = "candidate entries" if density_of == "candidates" else "model entries"
        counts = all_nnz(nnz, density, candidates=candidates.numel, of=of, of_what=what)
    filled = {"nnz": counts if kind == "structure" else max(counts, default=0), "scope": scope}
    arguments.update((name, filled[name]) for name in later)
    chosen = entry.fn(candidates, **arguments)
    if kind == "patterns":
        kept = [Kept(_checked(method, chosen, candidates, counts), 0)] * max(1, len(counts))
    elif kind == "structure":
        kept = [
            Kept(_checked(method, masks, candidates, [count]), zeros)
            for count, (masks, zeros) in zip(counts, chosen, strict=True)
        ]
    elif not counts:
        kept = [Kept(keep_true(chosen, candidates.parameters), 0)]
    else:
        kept = keep_best(chosen, candidates.parameters, counts, scope)
    for count, (_, zeros) in zip(counts, kept, strict=False):
        if zeros:
            _warn_of_zeros(count, zeros, entry, below or entry, scope, based="base" in arguments)
    several = [Masks(patterns) for patterns, _ in kept]
    for masks in several:
        logger.info(
            "selected %s of %s entries (density %.4g) in %d tensors by %s, scope %s",
            f"{masks.nnz:,}", f"{masks.numel:,}", masks.density, len(masks), method, scope,
        )  # fmt: skip
    return several if is_several(nnz) or is_several(density) else several[0]


def _warn_of_zeros(
    count: int, zeros: int, entry: Registered, scored: Registered, scope: Scope, *, based: bool
) -> None:
    """Say that entries of score 0 were kept, and what to do about it.

    Args:
        entry, scored: the method, and the one whose scores it uses.
        based: whether the scores compare with a base.
    """
    if zeros == count and based:  # nothing moved, or base is another's
        advice = "Is base the model as it was before training, and this one trained?"
    else:
        fewer = f"ask for nnz={count - zeros} or fewer"
        fix = fewer if scope == "global" else "scope='global'"
        advice = f"Fix: {fix}, or exclude=[...] what training does not reach."
    where = "with" if entry is scored else f"in {entry.name} with"
    logger.warning(
        "%s entries were asked for, but %r finds only %s %s a score above 0 (scope %s): the other "
        "%s kept %s and are just the first by name and position. %s",
        f"{count:,}", entry.name, f"{count - zeros:,}", where, scope, f"{zeros:,}",
        scored.traits["zero"], advice,
    )  # fmt: skip


def check_scope(method: str, scope: str, *, counted: bool) -> None:
    """Check a scope before anything is scored.

    Args:
        method: name of a registered method.
        scope: as in `select`.
        counted: whether nnz or density says how many entries to keep.

    Raises:
        UnknownNameError: no such method.
        MaskError: no such scope; or one that masks with a number of their own cannot follow.
    """
    _check_choice("scope", scope, Scope)
    kind = REGISTRY.get(method).traits["kind"]
    if scope != "global" and (kind == "patterns" or (kind == "either" and not counted)):
        raise MaskError(
            f"scope={scope!r} cannot be followed by masks that have a number of entries of their "
            f"own, as those of {method!r} here. Leave scope out."
        )


def _check_choice(what: str, value: object, kind: Any) -> None:
    if value not in get_args(kind):
        raise MaskError(
            f"{what}={value!r} is not one of {', '.join(map(repr, get_args(kind)))}."
            f"{did_you_mean(str(value), get_args(kind))}"
        )


def _check_compared(
    method: str, below: Registered | None, known: Mapping[str, Any], **given: Source | None
) -> None:
    """Refuse a base or tuned that would not be looked at."""
    for what, source in given.items():
        if source is None or what in known:
            continue
        able = [n for n in REGISTRY.names() if what in REGISTRY.get(n).options]
        score = f" with score={below.name!r}" if below else ""
        fix = (
            "Leave it out"
            if what == "base"
            else "Give the tuned model in place of this one: select(tuned, ...)"
        )
        raise UnknownNameError(
            f"{what}=... is given, but method {method!r}{score} has no option {what!r} and reads "
            f"the model alone. {fix}, or take a method that compares: {', '.join(able)}."
        )


def _check_values(candidates: Candidates) -> None:
    """Refuse parameters that hold nothing, or numbers that nothing can be computed with."""
    for name, parameter in candidates.parameters.items():
        if parameter.is_meta:
            raise MaskError(
                f"{name!r} is on the meta device: it has a shape and no values to select by. Load "
                "the weights first."
            )
        if parameter.dtype not in _RANKED:
            raise MaskError(
                f"{name!r} is {parameter.dtype}, wanted float32, bfloat16, float16 or float64. "
                f"Leave it out: exclude=[{name!r}, ...]."
            )


def _not_a_model(model: object) -> str:
    if isinstance(model, Mapping):
        fix = "Load tensors into their model first: model.load_state_dict(...)."
    elif isinstance(model, type):
        fix = f"Make one: {model.__name__}(...)."
    else:
        fix = "It is the model whose parameters are chosen from."
    return f"model is {type(model).__name__}, wanted an nn.Module. {fix}"


def _not_a_name(method: object) -> str:
    """Say what to write instead of a method that is a function, a model, tensors."""
    names = ", ".join(map(repr, REGISTRY.names()))
    for name in REGISTRY.names():
        if REGISTRY.get(name).fn is method:
            return f"method is the function of {name!r}, wanted the name: method={name!r}."
    if isinstance(method, nn.Module | Mapping):
        fix = "The tensors before training go by keyword: base=..."
    elif callable(method):
        own = getattr(method, "__name__", "fn")
        own = own if own.isidentifier() else "fn"
        fix = (
            "Your own scores or bool masks go through the method 'function': "
            f"select(model, 'function', fn={own}, nnz=...), where {own}(name, parameter) returns "
            "a tensor of the parameter's shape."
        )
    else:
        fix = "Leave it out for 'magnitude'."
    return f"method is {type(method).__name__}, wanted a name: {names}. {fix}"


def _checked(
    method: str, chosen: Mapping[str, MaskLike], candidates: Candidates, counts: Sequence[int]
) -> dict[str, SparsePattern]:
    """Check ready masks against the parameters, fill in those without, and compare the counts."""
    masks = {}
    for name, parameter in candidates.parameters.items():
        mask = chosen.get(name)
        if mask is None:
            mask = SparsePattern.from_indices(parameter.new_empty(0).long(), tuple(parameter.shape))
        masks[name] = as_pattern(mask, name=name, shape=parameter.shape)
    total = sum(pattern.nnz for pattern in masks.values())
    for count in counts:
        if count != total:
            raise MaskError(
                f"{count:,} entries were asked for but the masks of {method!r} have {total:,}; "
                "leave nnz and density out to take the masks as they are."
            )
    return masks
