"""How adapters combine on one base, and the composer that puts them on a model and takes them off.

Belongs here: composition methods (one file each, registered with `register_method`), the union of
the entries of several adapters, exact apply and revert, merging into one adapter or a checkpoint.
Does not belong here: training (sparseft/attachment.py, sparseft/training), choosing entries
(sparseft/selection).
"""

from sparseft.composition.checkpoint import merge_into_checkpoint
from sparseft.composition.composer import Composer
from sparseft.composition.linear import compose_linear
from sparseft.composition.merge import compose_adapters
from sparseft.composition.overlap import Overlap, jaccard
from sparseft.composition.registry import Part, Recipe, Rule, Term, methods, register_method

__all__ = [
    "Composer",
    "Overlap",
    "Part",
    "Recipe",
    "Rule",
    "Term",
    "compose_adapters",
    "compose_linear",
    "jaccard",
    "merge_into_checkpoint",
    "methods",
    "register_method",
]
