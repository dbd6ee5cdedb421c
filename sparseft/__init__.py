"""sparseft: sparse fine-tuning that is exact, composable and fast.

Names load on first use, so ``import sparseft`` touches no device and imports neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparseft._version import __version__

if TYPE_CHECKING:
    from sparseft.adapter import Adapter
    from sparseft.attachment import Attachment, attach, attachments_of
    from sparseft.composition import (
        Composer,
        SeparateComposer,
        compose_adapters,
        extract_adapter,
        overlap_report,
    )
    from sparseft.denoise import Denoise, denoised
    from sparseft.diff import SparseDiff, SparsePattern
    from sparseft.errors import SparseFtError
    from sparseft.ops import backend
    from sparseft.optim import SparseAdamW, SparseLion, SparseSGD
    from sparseft.selection import register_selector, select
    from sparseft.training import Reselection, SparseCallback, TrainingMeter, lottery_ticket, track

# Public name -> module that defines it.
_EXPORTS = {
    "Adapter": "sparseft.adapter",
    "Attachment": "sparseft.attachment",
    "Composer": "sparseft.composition",
    "Denoise": "sparseft.denoise",
    "Reselection": "sparseft.training",
    "SeparateComposer": "sparseft.composition",
    "SparseAdamW": "sparseft.optim",
    "SparseCallback": "sparseft.training",
    "SparseDiff": "sparseft.diff",
    "SparseFtError": "sparseft.errors",
    "SparseLion": "sparseft.optim",
    "SparsePattern": "sparseft.diff",
    "SparseSGD": "sparseft.optim",
    "TrainingMeter": "sparseft.training",
    "attach": "sparseft.attachment",
    "attachments_of": "sparseft.attachment",
    "backend": "sparseft.ops",
    "compose_adapters": "sparseft.composition",
    "denoised": "sparseft.denoise",
    "extract_adapter": "sparseft.composition",
    "lottery_ticket": "sparseft.training",
    "overlap_report": "sparseft.composition",
    "register_selector": "sparseft.selection",
    "select": "sparseft.selection",
    "track": "sparseft.training",
}

__all__ = [
    "Adapter",
    "Attachment",
    "Composer",
    "Denoise",
    "Reselection",
    "SeparateComposer",
    "SparseAdamW",
    "SparseCallback",
    "SparseDiff",
    "SparseFtError",
    "SparseLion",
    "SparsePattern",
    "SparseSGD",
    "TrainingMeter",
    "__version__",
    "attach",
    "attachments_of",
    "backend",
    "compose_adapters",
    "denoised",
    "extract_adapter",
    "lottery_ticket",
    "overlap_report",
    "register_selector",
    "select",
    "track",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sparseft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
