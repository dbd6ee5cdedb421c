"""Accuracy and macro-F1, equal to scikit-learn's, without needing scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sparseft.errors import DataError

__all__ = ["METRICS", "accuracy", "confusion", "macro_f1"]


def _checked(targets: Sequence[int], predictions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    y, p = np.asarray(targets), np.asarray(predictions)
    if y.shape != p.shape or y.ndim != 1:
        raise DataError(f"{y.shape} targets and {p.shape} predictions; two lists of one length go.")
    if not y.size:
        raise DataError("no predictions to score: the data set is empty.")
    return y, p


def accuracy(targets: Sequence[int], predictions: Sequence[int]) -> float:
    """Return the fraction of predictions equal to their target.

    Args:
        targets: (n,) class indices.
        predictions: (n,) class indices.
    """
    y, p = _checked(targets, predictions)
    return float(np.mean(y == p))


def macro_f1(
    targets: Sequence[int], predictions: Sequence[int], classes: Sequence[int] | None = None
) -> float:
    """Return the unweighted mean over classes of F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c).

    Args:
        targets: (n,) class indices.
        predictions: (n,) class indices.
        classes: the classes averaged over; None takes those that occur among targets or
            predictions, as scikit-learn does.

    Numerics: a class that occurs in neither list has F1 0, as scikit-learn's
        ``f1_score(labels=classes, average="macro", zero_division=0)``.
    """
    y, p = _checked(targets, predictions)
    wanted = np.union1d(y, p) if classes is None else np.asarray(classes)
    hit = np.array([np.sum((y == c) & (p == c)) for c in wanted], dtype=np.float64)
    size = np.array([np.sum(y == c) + np.sum(p == c) for c in wanted], dtype=np.float64)
    return float(np.mean(np.divide(2 * hit, size, out=np.zeros_like(hit), where=size > 0)))


def confusion(targets: Sequence[int], predictions: Sequence[int], n: int) -> list[list[int]]:
    """Return (n, n) counts: rows are targets, columns predictions."""
    y, p = _checked(targets, predictions)
    table = np.zeros((n, n), dtype=np.int64)
    np.add.at(table, (y, p), 1)
    return table.tolist()


METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
}
