"""`GradientScores`: sums of gradients, or of their squares, of weights that nobody trains.

Belongs here: what a caller sees. How a gradient is made in tiles is in `_gradient_tiles`, where it
goes in `_gradient_sums`, how layers hand it over in `_gradient_taps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from numbers import Integral
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.diff import SparsePattern
from sparseft.errors import MaskError
from sparseft.modules._collective import Group, Ranks
from sparseft.modules._gradient_sums import Rule, TensorSums
from sparseft.modules._gradient_taps import put_taps
from sparseft.modules._gradient_tiles import Scratch
from sparseft.modules.dense_view import DenseView, readable
from sparseft.modules.dequantise import keep_all_trainable
from sparseft.modules.names import ParameterIndex
from sparseft.modules.weight_storage import is_sharded

__all__ = ["GradientScores", "NonFinite", "Statistic", "TensorScores"]

Statistic = Literal["sum", "square"]
NonFinite = Literal["raise", "skip"]


class TensorScores(NamedTuple):
    """The sums of one tensor.

    Args:
        name: canonical name.
        pattern: where; None for every entry in flat order.
        scores: (nnz,) or (numel,) fp32, fp64 for an fp64 weight.
    """

    name: str
    pattern: SparsePattern | None
    scores: Tensor


class GradientScores:
    """Sum the gradients of weights over batches, without ever forming one of them whole.

    Inside the ``with`` block every backward through the model adds to the sums. The model may be
    plain or have masks attached; masks in training go on training. Weights need not require grad,
    and none gets a ``.grad``::

        with GradientScores(model, names, statistic="square", candidates={...}) as scores:
            for batch in batches:
                loss_fn(model, batch).backward()
                scores.step()
        found = scores.finish()                    # {name: (flat indices, sums)}

    Linear, Embedding and Conv1D layers make their gradient in row tiles, in one reused buffer, or
    at the candidates alone (`sparseft.ops.sampled_weight_grad`). A weight that is read in any other
    way (biases, norms, convolutions, ``x @ emb.weight.t()``) has one dense gradient at a time,
    dropped at once. Uses of one weight (tied, shared, called twice) add up before anything is
    squared.

    Args:
        model: any module.
        parameters: names of the weights, or a mapping by name, as in `Candidates`.
        statistic: "sum": of the batches' gradients, signed. "square": of their squares; a batch is
            what lies between two calls of `step`.
        candidates: None: every entry; 4 bytes an entry. A number of entries for each tensor: those
            with the largest statistic in the first batch that reaches the tensor, exactly, ties to
            the lowest flat index; nothing as large as the tensor is kept. Or a pattern for each.
        exclude: name -> entries that never become candidates (what is trained already, for drop and
            grow).
        weighted: rank candidates by the gradient times the weight.
        accumulate: several backward calls make one batch. Candidates are then chosen by the first
            of them; "square" with all entries keeps a second dense tensor for each weight.
        nonfinite: what becomes of a tensor whose gradient is NaN or infinite somewhere when its
            candidates are chosen (a loss scale that was too large). "raise": an error; "skip": it
            has none, and a warning says so. Sums are not looked at: they hold what came.
        group: process group whose processes add up; None: the default one, if
            ``torch.distributed`` is initialised; False: none. Candidates are chosen together: in
            the first batch, each tile is summed over the processes before it is ranked (as much
            traffic as one gradient of the model, never stored), so all should run through the same
            layers then. Afterwards one sum over the candidates, in `finish`.

    Attributes:
        batches: how many were counted; over all processes after `finish`.
        unreached: after `finish`, names of the tensors that no gradient came for.

    Raises:
        UnknownNameError: a name that is no parameter.
        MaskError: candidates or exclude that do not fit; a weight that is not floating; in
            backward, a gradient that is not finite where candidates are to be chosen by it.

    Memory, besides what the model's own forward and backward take without weight gradients: a tile
    (4 MiB on CPUs, 64 MiB on GPUs), the sums, and for "square" one more value a candidate. A weight
    used more than once in a batch has one dense gradient in the batch its candidates are chosen in,
    and throughout for "square" with all entries.

    Numerics: products and sums in fp32 (fp64 for fp64 weights). Loss scaling (GradScaler, a loss
    divided by the number of micro-batches) is in the sums, too. Deterministic for fixed shapes and
    threads or device; over processes the results are the same bits on each.

    Compiled modules run eagerly inside the block. Attach and detach outside of it. Wrap the model
    in nothing that expects gradients of weights (DDP around a plain model: use ``no_sync()``).
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[str],
        *,
        statistic: Statistic = "sum",
        candidates: Mapping[str, int] | Mapping[str, SparsePattern] | None = None,
        exclude: Mapping[str, SparsePattern] | None = None,
        weighted: bool = False,
        accumulate: bool = False,
        nonfinite: NonFinite = "raise",
        group: Group = None,
    ) -> None:
        for what, given, kind in (
            ("statistic", statistic, Statistic),
            ("nonfinite", nonfinite, NonFinite),
        ):
            if given not in get_args(kind):
                raise MaskError(
                    f"{what}={given!r} is not one of {', '.join(get_args(kind))}."
                    f"{did_you_mean(str(given), get_args(kind))}"
                )
        self._model = model
        self._index = index = ParameterIndex(model)
        self._ranks = Ranks(group)
        rule = Rule(statistic == "square", weighted, accumulate, nonfinite == "skip")
        scratch = Scratch()
        names = list(dict.fromkeys(index.resolve(name) for name in parameters))
        found = None if candidates is None else {index.resolve(n): c for n, c in candidates.items()}
        barred = {index.resolve(name): pattern for name, pattern in (exclude or {}).items()}
        self._sums: list[TensorSums] = []
        for ordinal, name in enumerate(names):
            weight = readable(index, name)
            _check_weight(name, weight)
            if found is not None and name not in found:
                raise MaskError(
                    f"candidates has nothing for {name!r}; give every parameter a number of "
                    "entries or a pattern, or None for all entries of all."
                )
            wanted = None if found is None else _checked(found[name], name, weight, "candidates")
            out = _checked(barred[name], name, weight, "exclude") if name in barred else None
            one = TensorSums(
                name,
                ordinal,
                cast(Tensor, weight) if isinstance(weight, DenseView) else weight.detach(),
                rule,
                wanted,
                out if isinstance(out, SparsePattern) and out.nnz else None,
                self._ranks,
                scratch,
            )
            self._sums.append(one)
        self._undo: ExitStack | None = None
        self._finished = False
        self.batches = 0
        self.unreached: list[str] = []

    def __enter__(self) -> GradientScores:
        if self._undo is not None:
            raise RuntimeError("this GradientScores is in use already; make another one.")
        with ExitStack() as undo:
            if any(_is_compiled(module) for module in self._model.modules()):
                undo.enter_context(torch.compiler.set_stance("force_eager"))
            for let_repack in keep_all_trainable(self._model):
                undo.callback(let_repack)
            tapped = [one for one in self._sums if one.weight.numel()]
            put_taps(self._index, tapped, undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def step(self) -> None:
        """Count one batch: call it after each backward, before the next forward."""
        for one in self._sums:
            one.step()
        if self._ranks.several and not self.batches and self._choosing():
            # From here on processes go their own ways: numbers of batches may differ.
            self._ranks.meet(-1, "the end of the first batch", self._device())
            for one in self._choosing():
                one.give_up_choosing()
        self.batches += 1

    def _choosing(self) -> list[TensorSums]:
        return [one for one in self._sums if one.choosing and one.weight.numel()]

    def _device(self) -> torch.device:
        return self._sums[0].weight.device if self._sums else torch.device("cpu")

    def totals(self) -> Iterator[TensorScores]:
        """Yield each tensor's sums, in the order of ``parameters``; the object is spent."""
        if self._finished:
            raise RuntimeError("the sums were taken already; make another GradientScores.")
        waiting = next((one for one in self._sums if one.waiting), None)
        if waiting is not None:
            raise RuntimeError(
                f"a backward reached {waiting.name!r} after the last step(); call step() after "
                "each batch."
            )
        self._finished = True
        if self._ranks.several and not self.batches and self._choosing():
            self._ranks.meet(-2, "the end, without a batch", self._device())
        flags = [self.batches, *(int(one.reached) for one in self._sums)]
        counts = self._ranks.sum_(torch.tensor(flags, device=self._device())).tolist()
        self.batches = counts[0]
        self.unreached = [one.name for one, n in zip(self._sums, counts[1:], strict=True) if not n]
        while self._sums:
            one = self._sums.pop(0)
            if one.choosing:
                one.give_up_choosing()
            yield TensorScores(one.name, one.pattern, one.finish())

    def finish(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return name -> (flat indices, ascending; sums at them), in the order of ``parameters``.

        A tensor that no gradient reached has no candidates, unless they were given or are all
        entries: zeros then. Without ``candidates`` the indices of all entries that are not excluded
        take 4 bytes more for each; `totals` leaves them out, and gives excluded entries, too.
        """
        allowed = {one.name: one.allowed for one in self._sums}
        result: dict[str, tuple[Tensor, Tensor]] = {}
        for name, pattern, scores in self.totals():
            if pattern is None:
                pattern = allowed[name]()
                if pattern.nnz < scores.numel():
                    scores = scores[pattern.indices.long()]
            result[name] = (pattern.indices, scores)
        return result


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or (
        getattr(module, "_compiled_call_impl", None) is not None
    )


def _check_weight(name: str, weight: Any) -> None:
    plain = type(weight) is nn.Parameter or isinstance(weight, DenseView) or is_sharded(weight)
    if not weight.is_floating_point() or weight.is_meta or not plain:
        raise MaskError(
            f"{name!r} is a {type(weight).__name__} of {weight.dtype} on {weight.device}; wanted a "
            "plain floating nn.Parameter that holds values, one that fully_shard has cut, or one "
            "that bitsandbytes or torchao has quantised."
        )


def _checked(
    wanted: int | SparsePattern, name: str, weight: Tensor, what: str
) -> int | SparsePattern:
    if isinstance(wanted, SparsePattern):
        if wanted.shape != weight.shape:
            raise MaskError(
                f"{what} of {name!r} is a pattern of shape {tuple(wanted.shape)}; the weight has "
                f"{tuple(weight.shape)}."
            )
        return wanted.to(weight.device)
    integer = isinstance(wanted, Integral) and not isinstance(wanted, bool)
    if what == "exclude" or not integer or int(wanted) < 0:
        kinds = "a SparsePattern" if what == "exclude" else "a number of entries or a SparsePattern"
        raise MaskError(f"{what} of {name!r} is {wanted!r}, wanted {kinds}.")
    return int(wanted)
