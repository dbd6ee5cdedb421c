"""Which entries to train: `select` and the registry of methods.

Belongs here: methods (one file each, registered with `register_selector`), counts and scopes, the
masks they give. Does not belong here: the exact top-k (sparseft/ops/topk.py), putting masks on a
model (sparseft/attachment.py).
"""

from sparseft.selection.blocks import select_blocks
from sparseft.selection.deltas_svd import select_deltas_svd
from sparseft.selection.file import select_file
from sparseft.selection.fisher import select_fisher
from sparseft.selection.function import select_function
from sparseft.selection.gradient import select_gradient
from sparseft.selection.low_rank import select_low_rank
from sparseft.selection.magnitude import select_magnitude
from sparseft.selection.masks import Masks
from sparseft.selection.movement import select_movement
from sparseft.selection.n_of_m import select_n_of_m
from sparseft.selection.random import select_random
from sparseft.selection.registry import (
    Candidates,
    Piece,
    options_of,
    register_selector,
    selectors,
)
from sparseft.selection.rows import select_rows
from sparseft.selection.select import candidates_of, select
from sparseft.selection.source import Checkpoint
from sparseft.selection.tiles import select_tiles
from sparseft.selection.weight_magnitude import select_weight_magnitude

__all__ = [
    "Candidates",
    "Checkpoint",
    "Masks",
    "Piece",
    "candidates_of",
    "options_of",
    "register_selector",
    "select",
    "select_blocks",
    "select_deltas_svd",
    "select_file",
    "select_fisher",
    "select_function",
    "select_gradient",
    "select_low_rank",
    "select_magnitude",
    "select_movement",
    "select_n_of_m",
    "select_random",
    "select_rows",
    "select_tiles",
    "select_weight_magnitude",
    "selectors",
]
