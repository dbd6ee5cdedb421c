"""What a training step costs before it is run and when it is: memory by part, time, tokens/s.

`memory` defines the parts; `workload` says what is trained, `sizes` and `models` which model that
is, `trained` which of its entries, `sides` builds the ways to train; `predict` says their memory
without allocating it, `measure` runs them; `profile` does both for several densities, as `sparseft
profile` shows it:

    from sparseft.profiling import Workload, profile

    found = profile(Workload(model="7b", dtype="bf16"), [0.01], predict_only=True, fits=["24GiB"])
    found.rows[0].predicted.peak, found.fits[0].density

The functions `predict` and `measure` are imported from the modules of their names. `allocations`
holds the record of torch's allocators that all measurements here go by.
"""

from sparseft.profiling.allocations import Allocations, peak_of
from sparseft.profiling.measure import Measurement
from sparseft.profiling.memory import MemoryUse
from sparseft.profiling.predict import Prediction
from sparseft.profiling.profiles import Profile, ProfileRow, profile
from sparseft.profiling.sides import Built, build, load_config
from sparseft.profiling.workload import Unavailable, Way, Workload

__all__ = [
    "Allocations",
    "Built",
    "Measurement",
    "MemoryUse",
    "Prediction",
    "Profile",
    "ProfileRow",
    "Unavailable",
    "Way",
    "Workload",
    "build",
    "load_config",
    "peak_of",
    "profile",
]
