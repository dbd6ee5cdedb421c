"""Speed and memory against named competitors: paired timing, cases, results with provenance.

A case first shows that all sides compute the same thing, then times them; a contender that
disagrees has no speed. What `sparseft bench` does, in Python:

    from sparseft.benchmarking import OPS, case_table, measure_ceilings, run_suite

    op = OPS["sampled_grad"]
    case = op.case((768, 768, 4096), (0.01, 0.1), "fp32")
    [result] = run_suite([case], "cpu", ceilings=measure_ceilings("cpu", ["fp32"]))

and to time something of one's own against something else, checked first:

    from sparseft.benchmarking import Case, Contender, Prepared

    def build(device):
        sides = {"theirs": Contender(theirs), "mine": Contender(mine, checks=[...], ours=True)}
        return Prepared(sides, baseline="theirs")

    [result] = run_suite([Case("mine", build)], "cpu")

`run_suite` says what a result holds. `training_step` holds the committed table of CPU steps,
`suite_cases` what a GPU's suite runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseft.benchmarking.cases import (
        OPS,
        compose_cases,
        denoise_cases,
        select_case,
        suite_cases,
    )
    from sparseft.benchmarking.catalogue import DTYPES, OpBench, case_name
    from sparseft.benchmarking.ceilings import Ceilings, measure_ceilings
    from sparseft.benchmarking.checks import Check, as_accurate, equal_bits
    from sparseft.benchmarking.limits import memory_free, require_memory
    from sparseft.benchmarking.plots import plot_density, plot_roofline, plot_speedups
    from sparseft.benchmarking.records import append_records, make_records, read_records
    from sparseft.benchmarking.results import markdown_table, results_folder, write_results
    from sparseft.benchmarking.revisions import compare_revisions
    from sparseft.benchmarking.suite import Case, Contender, Prepared, Target, run_suite
    from sparseft.benchmarking.suite_report import suite_markdown, suite_source, suite_table
    from sparseft.benchmarking.terminal import case_table
    from sparseft.benchmarking.training_step import StepCase, measure_step

# Imported when first asked for: a comparison of revisions loads this package with another
# revision's library below it, which may lack what some case needs.
_EXPORTS = {
    "cases": ("OPS", "compose_cases", "denoise_cases", "select_case", "suite_cases"),
    "catalogue": ("DTYPES", "OpBench", "case_name"),
    "ceilings": ("Ceilings", "measure_ceilings"),
    "checks": ("Check", "as_accurate", "equal_bits"),
    "limits": ("memory_free", "require_memory"),
    "plots": ("plot_density", "plot_roofline", "plot_speedups"),
    "records": ("append_records", "make_records", "read_records"),
    "results": ("markdown_table", "results_folder", "write_results"),
    "revisions": ("compare_revisions",),
    "suite": ("Case", "Contender", "Prepared", "Target", "run_suite"),
    "suite_report": ("suite_markdown", "suite_source", "suite_table"),
    "terminal": ("case_table",),
    "training_step": ("StepCase", "measure_step"),
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "DTYPES",
    "OPS",
    "Case",
    "Ceilings",
    "Check",
    "Contender",
    "OpBench",
    "Prepared",
    "StepCase",
    "Target",
    "append_records",
    "as_accurate",
    "case_name",
    "case_table",
    "compare_revisions",
    "compose_cases",
    "denoise_cases",
    "equal_bits",
    "make_records",
    "markdown_table",
    "measure_ceilings",
    "measure_step",
    "memory_free",
    "plot_density",
    "plot_roofline",
    "plot_speedups",
    "read_records",
    "require_memory",
    "results_folder",
    "run_suite",
    "select_case",
    "suite_cases",
    "suite_markdown",
    "suite_source",
    "suite_table",
    "write_results",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
