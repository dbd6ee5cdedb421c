"""How adapters combine on one base, and the composer that puts them on a model and takes them off.

- methods: one file each (linear, ties, dare, ...), `registry`, and what they share, `preparation`;
- the composer: `composer` <- `planning` (from names to plans) <- `plan`, `fit`, `coefficients`;
  `placement` (all or nothing) <- `writer`, `witness`; `turns`, `switch_report`, `functional`;
- where adapters lie: `residency*`; beside untouched weights: `separate*`; compared: `overlap*`;
- into one adapter: `merge`; onto a checkpoint's files: `checkpoint*`; the inverse: `extract`.

Does not belong here: training (sparseft/attachment.py, sparseft/training), choosing entries
(sparseft/selection).
"""

from sparseft.composition.breadcrumbs import compose_breadcrumbs
from sparseft.composition.checkpoint import merge_into_checkpoint
from sparseft.composition.composer import Composer
from sparseft.composition.consensus import compose_consensus
from sparseft.composition.dare import compose_dare_linear, compose_dare_ties
from sparseft.composition.della import compose_della
from sparseft.composition.extract import extract_adapter
from sparseft.composition.linear import compose_linear
from sparseft.composition.magnitude_max import compose_magnitude_max
from sparseft.composition.merge import compose_adapters
from sparseft.composition.overlap import Overlap, jaccard
from sparseft.composition.overlap_pairs import OverlapReport, PairOverlap, overlap_report
from sparseft.composition.registry import Part, Recipe, Rule, Term, methods, register_method
from sparseft.composition.residency import Residency
from sparseft.composition.separate import SeparateComposer
from sparseft.composition.switch_report import SwitchReport
from sparseft.composition.ties import compose_ties

__all__ = [
    "Composer",
    "Overlap",
    "OverlapReport",
    "PairOverlap",
    "Part",
    "Recipe",
    "Residency",
    "Rule",
    "SeparateComposer",
    "SwitchReport",
    "Term",
    "compose_adapters",
    "compose_breadcrumbs",
    "compose_consensus",
    "compose_dare_linear",
    "compose_dare_ties",
    "compose_della",
    "compose_linear",
    "compose_magnitude_max",
    "compose_ties",
    "extract_adapter",
    "jaccard",
    "merge_into_checkpoint",
    "methods",
    "overlap_report",
    "register_method",
]
