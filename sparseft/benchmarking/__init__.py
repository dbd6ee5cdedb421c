"""Speed and memory against named competitors: paired timing, cases, results with provenance.

A case first shows that all sides compute the same thing, then times them; a case that disagrees
has no speed. `training_step` holds the committed table of CPU steps, `suite` and `cases` the
kernels and GPU steps.
"""

from sparseft.benchmarking.cases import (
    compose_cases,
    denoise_cases,
    select_case,
    suite_cases,
)
from sparseft.benchmarking.paired import Comparison, alternate
from sparseft.benchmarking.results import markdown_table, results_folder, write_results
from sparseft.benchmarking.suite import run_suite
from sparseft.benchmarking.suite_report import suite_markdown, suite_source, suite_table
from sparseft.benchmarking.training_step import StepCase, measure_step

__all__ = [
    "Comparison",
    "StepCase",
    "alternate",
    "compose_cases",
    "denoise_cases",
    "markdown_table",
    "measure_step",
    "results_folder",
    "run_suite",
    "select_case",
    "suite_cases",
    "suite_markdown",
    "suite_source",
    "suite_table",
    "write_results",
]
