"""Tasks, scores and reports.

Here: what a task is (one file each in ``tasks``), predictions and scores of any classifier on it,
summaries over languages and seeds, their JSON, Markdown and PNG. Not here: reading tables
(``sparseft.data``), training (``sparseft.training``).
"""

from __future__ import annotations

from sparseft.evaluation.evaluate import (
    Evaluation,
    evaluate_classifier,
    evaluating,
    predict_logits,
)
from sparseft.evaluation.metrics import METRICS, accuracy, confusion, macro_f1
from sparseft.evaluation.pretrained import load_model, load_tokenizer
from sparseft.evaluation.provenance import provenance
from sparseft.evaluation.report import Gain, Result, Results, SettingSummary
from sparseft.evaluation.task import Task, get_task, register_task, task_names

__all__ = [
    "METRICS",
    "Evaluation",
    "Gain",
    "Result",
    "Results",
    "SettingSummary",
    "Task",
    "accuracy",
    "confusion",
    "evaluate_classifier",
    "evaluating",
    "get_task",
    "load_model",
    "load_tokenizer",
    "macro_f1",
    "predict_logits",
    "provenance",
    "register_task",
    "task_names",
]
