"""Walk a model and put masks on its parameters.

Belongs here: names of parameters, who has changed them in place, fingerprints of a model, the class
swap that makes reads of a masked weight differentiable at its mask, the compact leaves, and sums of
gradients of weights that nobody trains. Does not belong here: the user-facing `attach`
(sparseft/attachment.py), optimizers, choosing masks.
"""

from sparseft.modules.fingerprint import fingerprint_model, verify_fingerprint
from sparseft.modules.gradient_scores import GradientScores
from sparseft.modules.names import ParameterIndex, canonical_name, match_patterns
from sparseft.modules.storage_stack import Holder, bottom_value

__all__ = [
    "GradientScores",
    "Holder",
    "ParameterIndex",
    "bottom_value",
    "canonical_name",
    "fingerprint_model",
    "match_patterns",
    "verify_fingerprint",
]
