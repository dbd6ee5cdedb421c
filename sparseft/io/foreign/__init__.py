"""Adapters of other projects: read as ours, and ours written as theirs. One module per format.

===================  ==========================================  =====  =====
name                 what                                        read   write
===================  ==========================================  =====  =====
composable-sft       ``pytorch_diff.bin``                        exact  exact
spiel                fork of PEFT, ``peft_type: "SFT"``          exact  exact
peft-shira           PEFT SHiRA                                  exact  exact
peft-sparseft        `sparseft.peft`, the method in PEFT         exact  exact
peft-supertuning     PEFT Super-Tuning                           exact  exact
rosa                 fork of PEFT; its sparse part               exact
lora                 PEFT LoRA; its largest entries              lossy
masks                boolean masks by name                       masks
===================  ==========================================  =====  =====

`detect` says what lies at a path, `read` and `write` convert; `Adapter.load` uses both by itself.
Every file is taken for hostile: no pickle runs code, and shapes, positions, counts and values are
checked before they are used. What cannot be represented is refused with what and why.
"""

from __future__ import annotations

from sparseft.io.foreign.base import Base
from sparseft.io.foreign.found import Conversion, Found, Written
from sparseft.io.foreign.registry import (
    FORMATS,
    detect,
    load,
    read,
    read_masks,
    without,
    writable,
    write,
)

__all__ = [
    "FORMATS",
    "Base",
    "Conversion",
    "Found",
    "Written",
    "detect",
    "load",
    "read",
    "read_masks",
    "without",
    "writable",
    "write",
]
