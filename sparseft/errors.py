"""Every error sparseft raises on bad input or bad use.

Each class also derives from the built-in a caller would expect (``ValueError``, ``RuntimeError``),
so ``except ValueError`` keeps working. Messages name the thing, what was got, what was wanted and
the fix.
"""

from __future__ import annotations

__all__ = [
    "AdapterFormatError",
    "AttachError",
    "BackendError",
    "BaseMismatchError",
    "CompositionError",
    "DataError",
    "DecompositionError",
    "DiffError",
    "MaskError",
    "NonFiniteLossError",
    "OptionError",
    "RecipeError",
    "ResumeError",
    "SparseFtError",
    "StackOrderError",
    "UnknownNameError",
]


class SparseFtError(Exception):
    """Base class of all errors raised by sparseft."""


class MaskError(SparseFtError, ValueError):
    """A mask or pattern that does not fit its parameter, or a selection that cannot be made."""


class DiffError(SparseFtError, ValueError):
    """A sparse diff whose indices, values and shape do not belong together."""


class AdapterFormatError(SparseFtError, ValueError):
    """An adapter file that is damaged, hostile, or of another format."""


class BaseMismatchError(SparseFtError, ValueError):
    """An adapter meets a base model other than the one it was made on."""


class CompositionError(SparseFtError, ValueError):
    """Coefficients or adapters that cannot be composed."""


class OptionError(SparseFtError, ValueError):
    """A registered method called without an option it needs, or registered under a taken name."""


class AttachError(SparseFtError, RuntimeError):
    """A mask that cannot be attached, or an attached model used so that it would train nothing."""


class StackOrderError(SparseFtError, RuntimeError):
    """Holders of one weight's storage released out of order (last in, first out)."""


class BackendError(SparseFtError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


class DecompositionError(SparseFtError, ValueError):
    """A matrix that cannot be factorised as asked, or a gradient that does not exist."""


class DataError(SparseFtError, ValueError):
    """A dataset, file, label or language that is missing or malformed."""


class RecipeError(SparseFtError, ValueError):
    """A recipe with an unknown key or a value outside its range."""


class ResumeError(SparseFtError, RuntimeError):
    """A run that cannot be continued from the state found on disk."""


class NonFiniteLossError(SparseFtError, FloatingPointError):
    """Training met a NaN or infinite loss; the last good state is kept."""


class UnknownNameError(SparseFtError, KeyError):
    """A name (parameter, method, adapter) that does not exist; the message lists the nearest."""

    def __str__(self) -> str:
        # KeyError would print repr(message), quotes and escapes included.
        return str(self.args[0]) if self.args else ""
