"""Gradients of candidates, summed over the steps of a window before a reselection.

One `GradientScores` a step, so that what lies between steps is plain data: it can be saved and gone
on with. The first step names the candidates, the others look only there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sparseft.diff import SparsePattern
from sparseft.modules.gradient_scores import GradientScores
from sparseft.training.drop_and_grow import Found

__all__ = ["Window"]


class Window:
    """The candidates of a window and their sums so far.

    Args:
        model: whose gradients.
        group: process group to sum over.

    Attributes:
        found: tensor name -> candidates; empty outside of windows.
    """

    def __init__(self, model: nn.Module, group: Any) -> None:
        self.found: dict[str, Found] = {}
        self._model, self._group = model, group
        self._tap: GradientScores | None = None
        self._undo = ExitStack()

    def open(self, patterns: Mapping[str, SparsePattern], counts: Mapping[str, int] | None) -> None:
        """Look at the gradients of the coming step.

        Args:
            patterns: masks of the tensors that may move.
            counts: candidates to name for each tensor; None: those found so far.
        """
        candidates: Mapping[str, Any]
        if counts is not None:
            candidates = counts
        else:
            known = {n: f for n, f in self.found.items() if n in patterns}
            candidates = {
                n: SparsePattern._trusted(f.indices, patterns[n].shape) for n, f in known.items()
            }
        if not candidates:
            return
        self._tap = GradientScores(
            self._model,
            list(candidates),
            statistic="sum",
            candidates=candidates,
            exclude={n: patterns[n] for n in candidates},
            nonfinite="skip",  # the loss scale was too large, and the step is skipped as well
            group=self._group,
        )
        self._undo.enter_context(_uncompiled())
        self._undo.enter_context(self._tap)

    def count(self) -> None:
        """Add the gradients that came since `open`, and look no more."""
        if self._tap is None:
            return
        self._tap.step()
        scores = self._tap.finish()
        self.close()
        if self.found:
            scores = {
                n: (indices, self.found[n].scores + new) for n, (indices, new) in scores.items()
            }
        self.found = {n: Found(*pair) for n, pair in scores.items() if pair[0].numel()}

    def take(self) -> dict[str, Found]:
        """Return the candidates; the next window begins without any."""
        found, self.found = self.found, {}
        return found

    def close(self) -> None:
        """Look no more; what was found stays."""
        self._tap = None
        self._undo.close()

    def __getstate__(self) -> dict[str, Any]:
        # For deepcopy and pickle of an attached model: hooks and groups belong to the original.
        return {"found": self.found, "_model": self._model, "_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tap, self._undo = None, ExitStack()


_eager: list[Any] = []  # the compiler's stance before the first window that is open


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled models eagerly; windows of several models may overlap in any order.

    Taps are other classes in each window: with them, compiled code would be made again each time.
    """
    if not _eager:
        _eager.append(torch.compiler.set_stance("force_eager"))
    _eager.append(None)
    try:
        yield
    finally:  # also where a Reselection is dropped in a window
        _eager.pop()
        if len(_eager) == 1:
            _eager.pop().__exit__(None, None, None)
