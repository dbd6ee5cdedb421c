"""Run a function of an optimizer while torch.compile traces a step, once, instead of inside it.

For what a graph cannot hold and no later step changes: registering, checking, making state. What
it reads is not guarded on; what is traced besides has to notice when it would come out otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["once_while_traced"]

# From here on torch hands such a function the optimizer itself. Before, it takes constants alone:
# there the call is a graph break, and the function runs at every step.
_TAKES_OBJECTS = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"


def once_while_traced(function: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Mark ``function``, which takes the optimizer and returns True.

    (torch.compiler's decorators do the same, but import the compiler, a second or more.)
    """
    mark = "_dynamo_marked_constant" if _TAKES_OBJECTS else "_torchdynamo_disable"
    setattr(function, mark, True)
    return function
