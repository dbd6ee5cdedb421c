"""The method as one of PEFT's: ``get_peft_model(model, SparseFtConfig(...))``.

Importing this package registers the method ``"sparseft"`` (``PeftType.SPARSEFT``) with the
installed peft; `unregister` undoes that. ``import sparseft`` alone imports no peft.

Belongs here: the configuration, the tuner, its layers, the shim. Does not belong here: files of
PEFT's methods, ours included, which need no peft to be read and written (sparseft/io/foreign).
"""

from sparseft.peft._shim import check_version

check_version()  # before anything is imported that another version may not have

from sparseft.peft._shim import register, registered, unregister  # noqa: E402
from sparseft.peft.config import SparseFtConfig  # noqa: E402
from sparseft.peft.extraction import adapter_of, merged_state_dict  # noqa: E402
from sparseft.peft.layer import SparseFtLayer  # noqa: E402
from sparseft.peft.model import SparseFtModel  # noqa: E402

__all__ = [
    "SparseFtConfig",
    "SparseFtLayer",
    "SparseFtModel",
    "adapter_of",
    "merged_state_dict",
    "register",
    "registered",
    "unregister",
]

register()
