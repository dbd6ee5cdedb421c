"""What a training step costs before it is run and when it is: memory by part, time, tokens/s.

`memory` defines the parts; `workload` says what is trained, `sizes` and `models` which model that
is, `sides` builds the ways to train; `predict` says their memory without allocating it, `measure`
runs them.
"""

from sparseft.profiling.sides import Built, build, load_config
from sparseft.profiling.workload import Unavailable, Way, Workload

__all__ = ["Built", "Unavailable", "Way", "Workload", "build", "load_config"]
