"""Whether processes that train together have the same masks, bases and values, and which do not.

Every process hashes what it has; one all-reduce of 24 bytes says whether all hashes are equal. Only
where they are not, the hashes of each tensor are gathered, so that every process raises the same
error. This is the one place that compares ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft._integrity import hash_tensor
from sparseft._text import first_of
from sparseft.adapter import Adapter
from sparseft.diff import SparsePattern
from sparseft.errors import AttachError
from sparseft.modules._collective import Group, Ranks
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.weight_storage import full_value, is_sharded

__all__ = [
    "check_adapter",
    "check_attached",
    "check_bases",
    "check_heads",
    "check_masks",
    "check_moves",
    "failing_together",
]

_SAME_MASKS = (
    "Masks are to be the same on every rank: select with one seed and the same weights, or select "
    "on rank 0 and send them with torch.distributed.broadcast_object_list. Masks of processes that "
    "do not train together: attach(..., group=False)."
)
_SAME_BASE = (
    "Load the same weights on every rank before attach (one checkpoint, or one seed before the "
    "model is made): DistributedDataParallel would broadcast rank 0's weights over bases that stay "
    "those of the others, and each rank would write back another sum."
)
_SAME_MOVES = (
    "Their diffs or gradients differ. Do they start from the same weights, and does "
    "DistributedDataParallel reduce every leaf?"
)
_SAME_VALUES = "Load one adapter, from one file, on every rank."
_SAME_HEADS = (
    "fully_shard leaves it whole (ignored_params) or keeps copies of its shards, and sends rank "
    "0's to nobody: make it with one seed, or torch.distributed.broadcast it before fully_shard."
)


@contextlib.contextmanager
def failing_together(action: str, group: Group) -> Iterator[None]:
    """Have the other ranks raise, too, where the code inside fails on this one.

    They are at a comparison of this module, or come to one, and would wait there.

    Args:
        action: what the code does.
        group: who trains together.
    """
    try:
        yield
    except Exception as error:
        ranks = Ranks(group)
        if ranks.several:
            failed = f"{type(error).__name__}: {error}"
            if not ranks.all_equal(_words(failed.encode()), f"{action} failed here: {failed}"):
                ranks.gather({"doing": action, "claims": {}, "failed": failed})
        raise


def check_masks(patterns: Mapping[str, SparsePattern], full: Iterable[str], group: Group) -> None:
    """Raise AttachError, on every rank, unless all attach the same masks and train the same heads.

    A collective where `Ranks` are several, as all of these.

    Args:
        patterns: name -> where it will be trained.
        full: names of what will be trained densely.
        group: who trains together.
    """
    ranks = Ranks(group)
    if ranks.several:
        heads = dict.fromkeys(full, "trained densely")
        claims = {name: p.digest() for name, p in patterns.items()} | heads
        _check("attach", "the mask", claims, _SAME_MASKS, ranks)


def check_bases(masked: Iterable[MaskedParameter], group: Group) -> None:
    """Raise AttachError, on every rank, unless the weights at the masks have the same bits."""
    ranks = Ranks(group)
    if ranks.several:
        claims = {m.name: _digest(m.base) for m in masked}
        _check("attach", "the base weights at the mask", claims, _SAME_BASE, ranks)


def check_heads(full: Mapping[str, Tensor], group: Group) -> None:
    """Raise AttachError, on every rank, unless what is trained densely starts at the same values.

    Of a sharded model, where nobody sends one rank's values to the others. What is cut itself has
    one value for all, unless there are several copies of its shards.
    """
    ranks = Ranks(group)
    if ranks.several:
        copied = {name: p for name, p in full.items() if not is_sharded(p) or _is_copied(p)}
        claims = {name: _digest(full_value(p)) for name, p in copied.items()}
        _check("attach", "the full parameter", claims, _SAME_HEADS, ranks)


def check_attached(masked: Collection[MaskedParameter], full: Iterable[str], group: Group) -> None:
    """Raise AttachError, on every rank, unless all have attached the same masks to the same bases.

    For where several processes begin to train that attached before they knew of each other.
    """
    check_masks({m.name: m.pattern for m in masked}, full, group)
    check_bases(masked, group)


def check_adapter(adapter: Adapter | None, action: str, group: Group) -> None:
    """Raise AttachError, on every rank, unless all are about to load the same values, or none.

    Args:
        adapter: that is loaded.
        action: what loads it, for the message.
        group: who trains together.
    """
    ranks = Ranks(group)
    if ranks.several:
        claims = {}
        if adapter is not None:
            claims = {name: diff.digest() for name, diff in adapter.diffs.items()}
            claims |= {name: _digest(tensor) for name, tensor in adapter.dense.items()}
        _check(action, "the adapter's diff", claims, _SAME_VALUES, ranks)


def check_moves(patterns: Mapping[str, SparsePattern], group: Group) -> None:
    """Raise AttachError, on every rank, unless all are about to move masks to the same entries."""
    ranks = Ranks(group)
    if ranks.several:
        claims = {name: p.digest() for name, p in patterns.items()}
        _check("moving masks", "the new mask", claims, _SAME_MOVES, ranks)


def _is_copied(sharded: Any) -> bool:
    return any(placement.is_replicate() for placement in sharded.placements)


def _digest(tensor: Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype}:{tuple(tensor.shape)}:".encode(), digest_size=16)
    hash_tensor(digest, tensor.detach())
    return digest.hexdigest()


def _words(text: bytes) -> Tensor:
    """Return (3,) int64 that stand for a text."""
    digest = hashlib.blake2b(text, digest_size=24).digest()
    words = [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in range(0, 24, 8)]
    return torch.tensor(words)


def _check(action: str, part: str, claims: Mapping[str, str], fix: str, ranks: Ranks) -> None:
    """Compare claims (name -> digest) over all ranks; ``action`` and ``part`` name them."""
    total = hashlib.blake2b(f"{action}:{part}".encode(), digest_size=24)
    for name, claim in sorted(claims.items()):
        total.update(f":{len(name)}:{name}:{claim}".encode())
    of = f" of {first_of(list(claims), 2)}" if claims else ""
    if ranks.all_equal(_words(total.digest()), f"{action}: comparing {part}{of}"):
        return
    every = ranks.gather({"doing": f"{action}: {part}", "claims": dict(claims)})
    raise AttachError(_describe(action, part, every, fix))


def _describe(action: str, part: str, every: Mapping[int, dict], fix: str) -> str:
    failed = {rank: told["failed"] for rank, told in every.items() if "failed" in told}
    if failed:
        why, who = _sides(failed)[0]
        return f"{action}: stopped here, because it failed on {_ranks(who)}: {why}"
    doing = {rank: told["doing"] for rank, told in every.items()}
    if len(set(doing.values())) > 1:
        steps = "; ".join(f"{_ranks(who)} at {what!r}" for what, who in _sides(doing))
        return (
            f"{action}: ranks are not at the same step: {steps}. All of them attach, load and move "
            "masks together and in one order; a process that does so alone passes group=False to "
            "attach."
        )
    claims = {rank: told["claims"] for rank, told in every.items()}
    names = list(dict.fromkeys(name for own in claims.values() for name in own))
    for name in names:
        has = {rank: str(name in own) for rank, own in claims.items()}
        if len(set(has.values())) > 1:
            there = dict(_sides(has))
            others = sum(any(n not in own for own in claims.values()) for n in names) - 1
            return (
                f"{action}: ranks have different sets of tensors: {name!r} "
                f"{_more(others)}is there on {_ranks(there['True'])} and not on "
                f"{_ranks(there['False'])}. {fix}"
            )
    differ = [name for name in names if len({own[name] for own in claims.values()}) > 1]
    first = _sides({rank: own[differ[0]] for rank, own in claims.items()})
    sides = "; ".join(f"{_ranks(who)} against {_ranks(first[0][1])}" for _, who in first[1:])
    return (
        f"{action}: ranks disagree on {part} of {differ[0]!r}{' ' * (len(differ) > 1)}"
        f"{_more(len(differ) - 1).rstrip()}: {sides}. {fix}"
    )


def _more(count: int) -> str:
    return f"(and {count} more) " if count else ""


def _sides(told: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Return what was told with who told it: the most frequent first, then by lowest rank."""
    sides: dict[str, list[int]] = {}
    for rank, what in sorted(told.items()):
        sides.setdefault(what, []).append(rank)
    return sorted(sides.items(), key=lambda side: (-len(side[1]), side[1][0]))


def _ranks(who: Sequence[int]) -> str:
    text = first_of([str(rank) for rank in who], 8)
    return f"rank {text}" if len(who) == 1 else f"ranks {text}"
