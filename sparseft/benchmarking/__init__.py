"""Speed and memory against named competitors: paired timing, cases, results with provenance.

A case first shows that both sides compute the same thing, then times them; a case that disagrees
has no speed.
"""

from sparseft.benchmarking.paired import Comparison, alternate
from sparseft.benchmarking.results import markdown_table, results_folder, write_results
from sparseft.benchmarking.training_step import StepCase, measure_step

__all__ = [
    "Comparison",
    "StepCase",
    "alternate",
    "markdown_table",
    "measure_step",
    "results_folder",
    "write_results",
]
