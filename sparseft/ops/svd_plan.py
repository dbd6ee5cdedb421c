"""A whole model's matrices in batches of one shape, within a memory budget.

Linear layers of a transformer come in a handful of shapes, and a tall one is a wide one transposed:
`plan_svd` puts them together, `SvdPlan.run` fills one buffer per chunk and hands out the results,
`SvdPlan.run_chunks` the buffers as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from sparseft._text import human_bytes, parse_bytes
from sparseft.errors import DecompositionError, OptionError
from sparseft.ops._block_svd import BLOCK
from sparseft.ops._common import accumulation_dtype
from sparseft.ops._exact_svd import GRAM_ENTRIES
from sparseft.ops._rank_rules import RankRule
from sparseft.ops._sketch import SKETCH_ROWS
from sparseft.ops._svd_input import DTYPES
from sparseft.ops.truncated_svd import (
    Method,
    TruncatedSVD,
    check_options,
    choose_method,
    truncated_svd,
)

__all__ = ["SvdChunk", "SvdPlan", "plan_svd"]

# On a CPU a batched product is a loop. Buffers of this size, and what the work on them needs, come
# from memory that the process has; for more than 32 MiB the C library asks for fresh pages each
# time, which cost a tenth of the decomposition.
_CPU_BYTES = 24 << 20


@dataclass(frozen=True)
class SvdChunk:
    """Matrices that are decomposed together.

    Args:
        names: of the matrices.
        shape: (s, t), s <= t, of all of them, tall ones transposed.
        tall: which are transposed.
        bytes: the most that the work on them needs at a time, their own buffer included.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    tall: tuple[bool, ...]
    bytes: int


@dataclass(frozen=True)
class SvdPlan:
    """What `plan_svd` returns.

    Args:
        chunks: every matrix once; shapes in order of first appearance, names in the order given.
        dtype: of the buffers.
        options: of `truncated_svd`.
    """

    chunks: tuple[SvdChunk, ...]
    dtype: torch.dtype
    options: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """The largest chunk's."""
        return max((c.bytes for c in self.chunks), default=0)

    def run(
        self,
        load: Callable[[str], Tensor],
        *,
        device: torch.device | str | None = None,
    ) -> Iterator[tuple[str, TruncatedSVD]]:
        """Decompose everything, chunk by chunk.

        Args:
            load: returns the matrix of a name, in its own orientation; called once per name.
            device: where the work is done; None: where the first matrix of a chunk lies.

        Yields:
            Name and result, batches of one cut to the matrix's own rank, in its own orientation.

        Raises:
            DecompositionError: a matrix of another shape than planned; as `truncated_svd`.
        """
        ahead: list[Tensor] = []  # the first matrix of a chunk says where, if the caller does not

        def fill(name: str, out: Tensor) -> None:
            matrix = ahead.pop() if ahead else load(name).detach()
            if matrix.shape != out.shape:
                raise DecompositionError(
                    f"plan_svd: {name!r} has shape {tuple(matrix.shape)} but was planned as "
                    f"{tuple(out.shape)}."
                )
            out.copy_(matrix)

        for chunk in self.chunks:
            ahead.append(load(chunk.names[0]).detach())
            where = torch.device(ahead[0].device if device is None else device)
            for part in _parts(chunk, where, self.dtype):
                yield from _split(part, self._decompose(part, fill, where)[1])

    def run_chunks(
        self,
        fill: Callable[[str, Tensor], object],
        *,
        device: torch.device | str,
    ) -> Iterator[tuple[SvdChunk, Tensor, TruncatedSVD]]:
        """Decompose everything, and hand out the chunks' buffers to go on working in.

        Args:
            fill: called once per name with the matrix to write: (m, n) of `dtype`, uninitialised,
                in the matrix's own orientation, so that tall ones are strided.
            device: where the buffers lie and the work is done.

        Yields:
            The chunk, on a CPU parts of it; its buffer (B, s, t), as it was filled and now the
            caller's; the result for all of it in that orientation, zeros beyond each one's rank.

        Raises:
            DecompositionError: as `truncated_svd`.
        """
        where = torch.device(device)
        for chunk in self.chunks:
            for part in _parts(chunk, where, self.dtype):
                # Nothing is kept here: what the caller drops is free before the next one.
                yield part, *self._decompose(part, fill, where)

    def _decompose(
        self,
        chunk: SvdChunk,
        fill: Callable[[str, Tensor], object],
        device: torch.device,
    ) -> tuple[Tensor, TruncatedSVD]:
        buffer = torch.empty((len(chunk.names), *chunk.shape), dtype=self.dtype, device=device)
        for name, tall, own in zip(chunk.names, chunk.tall, buffer, strict=True):
            fill(name, own.mT if tall else own)
        return buffer, truncated_svd(buffer, names=chunk.names, **self.options)


def _parts(chunk: SvdChunk, device: torch.device, dtype: torch.dtype) -> Iterator[SvdChunk]:
    """Yield a chunk, on a CPU cut into buffers of `_CPU_BYTES`."""
    step = len(chunk.names)
    if device.type == "cpu":
        own = chunk.shape[0] * chunk.shape[1] * dtype.itemsize
        step = max(1, min(step, _CPU_BYTES // max(own, 1)))
    for start in range(0, len(chunk.names), step):
        at = slice(start, start + step)
        yield replace(chunk, names=chunk.names[at], tall=chunk.tall[at])


def _split(chunk: SvdChunk, found: TruncatedSVD) -> Iterator[tuple[str, TruncatedSVD]]:
    for i, (name, tall, r) in enumerate(
        zip(chunk.names, chunk.tall, found.ranks.tolist(), strict=True)
    ):
        at = slice(i, i + 1)
        u, s, vh = found.U[at, :, :r], found.S[at, :r], found.Vh[at, :r]
        if tall:
            u, vh = vh.mT, u.mT
        yield (
            name,
            TruncatedSVD(
                u, s, vh, found.ranks[at], found.residual[at], found.norm[at], found.methods[at]
            ),
        )


def plan_svd(
    shapes: Mapping[str, Sequence[int]],
    *,
    rank: int | None = None,
    energy: float | None = None,
    hard_threshold: float | Literal["median"] | None = None,
    method: Method = "auto",
    seed: int = 0,
    power_iterations: int = 2,
    oversample: int = 16,
    dtype: torch.dtype = torch.float32,
    memory: int | str = "1GiB",
    oversized: Literal["refuse", "alone"] = "refuse",
) -> SvdPlan:
    """Group matrices by shape, tall with wide, into chunks that fit into memory.

    Args:
        shapes: name -> (m, n), e.g. ``{n: p.shape for n, p in model.named_parameters() if p.ndim ==
            2}``.
        rank, energy, hard_threshold, method, seed, power_iterations, oversample: of
            `truncated_svd`.
        dtype: of the matrices; the work is done in float32, in float64 for float64.
        memory: bytes for a chunk and the work on it, as a number or as text: ``"2GiB"``. What the
            caller keeps of the results comes on top.
        oversized: what to do with a matrix that needs more than that by itself: an error, or a
            chunk of its own whose ``bytes`` say so.

    Raises:
        DecompositionError: a tensor that is no matrix, a tensor in place of a shape, or
            (``"refuse"``) one that alone needs more than the memory; names it.
        OptionError: as `truncated_svd`; another dtype; memory that is no number of bytes.

    Example:
        >>> plan = plan_svd({"up": (8, 4), "down": (4, 8), "query": (4, 4)}, rank=2)
        >>> [(c.names, c.shape) for c in plan.chunks]
        [(('up', 'down'), (4, 8)), (('query',), (4, 4))]
    """
    rule = RankRule(rank, energy, hard_threshold)
    if oversized not in ("refuse", "alone"):
        raise OptionError(f"plan_svd: oversized is {oversized!r}; wanted 'refuse' or 'alone'.")
    try:
        budget = parse_bytes(memory)
    except ValueError as error:
        raise OptionError(f"plan_svd: memory: {error}") from None
    check_options(method, seed, power_iterations, oversample, who="plan_svd")
    if dtype not in DTYPES:
        raise OptionError(
            f"plan_svd: dtype is {dtype!r}; wanted torch.float64, float32, bfloat16 or float16."
        )
    work = accumulation_dtype(dtype)
    groups: dict[tuple[int, int], list[tuple[str, bool]]] = {}
    for name, shape in shapes.items():
        m, n = _sides(name, shape)
        groups.setdefault((min(m, n), max(m, n)), []).append((name, m > n))
    chunks = []
    for shape, members in groups.items():
        shared, each = _bytes_needed(shape, rule, method, oversample, work.itemsize)
        if shared + each > budget and oversized == "refuse":
            raise DecompositionError(
                f"plan_svd: {members[0][0]!r} of shape {shape} (short side first) needs "
                f"{human_bytes(shared + each)} by itself, memory is {human_bytes(budget)}; give "
                "more, or leave the matrix out."
            )
        most = max(1, (budget - shared) // max(each, 1))
        count = -(-len(members) // most)
        size, extra = divmod(len(members), count)
        start = 0
        for i in range(count):  # as even as can be: a last small chunk would use the device badly
            part = members[start : start + size + (i < extra)]
            start += len(part)
            names, tall = zip(*part, strict=True)
            chunks.append(SvdChunk(names, shape, tall, shared + each * len(part)))
    options = {
        "rank": rank, "energy": energy, "hard_threshold": hard_threshold, "method": method,
        "seed": seed, "power_iterations": power_iterations, "oversample": oversample,
    }  # fmt: skip
    return SvdPlan(tuple(chunks), work, options)


def _sides(name: str, shape: Sequence[int]) -> tuple[int, int]:
    if isinstance(shape, Tensor) or hasattr(shape, "__array__"):
        raise DecompositionError(
            f"plan_svd: {name!r} is a {type(shape).__name__}; wanted shapes, such as "
            "{name: x.shape for name, x in matrices.items() if x.ndim == 2}."
        )
    sizes = tuple(shape)
    if not all(isinstance(x, Integral) and x >= 0 for x in sizes):
        raise DecompositionError(
            f"plan_svd: {name!r} has shape {sizes!r}; wanted two integers of 0 or more."
        )
    if len(sizes) != 2:
        raise DecompositionError(
            f"plan_svd: {name!r} has shape {sizes}; wanted a matrix, leave it out."
        )
    return int(sizes[0]), int(sizes[1])


def _bytes_needed(
    shape: tuple[int, int], rule: RankRule, method: str, oversample: int, itemsize: int
) -> tuple[int, int]:
    """Return upper bounds of the bytes of a chunk: those that are needed once, and per matrix.

    A count of what is alive where each way needs most; tests compare it with the allocator.
    """
    s, t = shape
    way = choose_method(shape, rule, oversample) if method == "auto" else method
    own = s * t * itemsize
    kept = s if rule.rank is None else min(rule.rank, s)
    # A column at the end: b and its fp64 copy, the right vectors in fp64 before and after two
    # triangular solves, and as they are returned; on the short side less.
    column = t * (4 * 8 + 3 * itemsize) + s * (2 * 8 + 4 * itemsize)
    gram = 3 * 8 * s * s + kept * column  # Grams, eigenvectors, the solver's copy
    once = min(s * t, GRAM_ENTRIES + t) * (8 + itemsize)  # a matrix in fp64, a residual, in parts
    if way == "svd":
        once = s * t * (8 + itemsize)
        return once, own + 8 * (3 * s * t + 3 * s * s) + kept * column
    if way == "gram":
        return once, own + gram
    columns = min(s, (BLOCK if rule.rank is None else kept) + oversample)
    if rule.rank is None:
        columns = s if method == "block" else max(s // 4, columns)
    sketch = t * columns * itemsize + 4 * 8 * min(t, SKETCH_ROWS) * (columns + 32)
    if rule.rank is not None:
        once = min(s * t, GRAM_ENTRIES + t) * itemsize  # a residual, no Gram
        return once + sketch, own + columns * column
    # where block iteration gives up, a copy of those matrices meets what it found for the others
    each = own + max(columns * column, own + gram + columns * (8 + 2 * itemsize) * (s + t))
    return once + sketch, each
