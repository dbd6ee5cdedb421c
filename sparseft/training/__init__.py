"""Training: the lottery ticket over any trainer, a plain loop, recipes and the studies they
describe.

Here: when to train what, and going on after an interruption. Not here: what a mask does to a model
(``sparseft.attachment``), how it is chosen (``sparseft.selection``), data and scores.
"""

from __future__ import annotations

from sparseft.training.callback import SparseCallback
from sparseft.training.loop import LoopResult, LoopTrainer
from sparseft.training.lottery import LotteryTicketResult, dense_phase, lottery_ticket
from sparseft.training.meter import Reading, TrainingMeter
from sparseft.training.phases import Phase
from sparseft.training.progress import track
from sparseft.training.reselection import Reselection
from sparseft.training.schedule import SCHEDULES
from sparseft.training.sharded_checkpoint import load_target

__all__ = [
    "SCHEDULES",
    "LoopResult",
    "LoopTrainer",
    "LotteryTicketResult",
    "Phase",
    "Reading",
    "Reselection",
    "SparseCallback",
    "TrainingMeter",
    "dense_phase",
    "load_target",
    "lottery_ticket",
    "track",
]
