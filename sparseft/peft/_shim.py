"""The one place that touches peft's tables: the method "sparseft" registered, and taken out again.

`peft.utils.register_peft_method` is open to new methods but for one thing: their name must be in
the enumeration `PeftType`, which is closed. `register` gives it a member while the process runs,
of the kind that the enumeration makes itself (``list``, ``PeftType("SPARSEFT")``, attribute access,
``isinstance``, pickles), and then calls that function; `unregister` leaves all as it was found.

Nothing else of peft is changed. Imported without peft, this module says so when it is used.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

__all__ = ["KIND", "METHOD", "PREFIX", "check_version", "member", "register", "registered",
           "unregister"]  # fmt: skip

METHOD, KIND, PREFIX = "sparseft", "SPARSEFT", "sparseft_"

# Tested from the first to below the second.
LOWEST, BELOW = "0.18", "0.22"

_lock = threading.RLock()
_member: Any = None  # one object for good: configurations hold it across unregister and register


def check_version() -> None:
    """Refuse a peft that is absent, or outside the range that was tested.

    Raises:
        ImportError: with the pip line, and the way that needs no registration.
    """
    from packaging.version import Version

    wanted = f"pip install 'peft>={LOWEST},<{BELOW}'"
    try:
        import peft
    except ImportError as bad:
        raise ImportError(
            f"sparseft.peft needs peft, which cannot be imported ({bad}). Install it: {wanted}."
        ) from bad
    if not Version(LOWEST) <= Version(Version(peft.__version__).base_version) < Version(BELOW):
        raise ImportError(
            f"peft {peft.__version__} is installed, and sparseft.peft has been tested with "
            f"peft>={LOWEST},<{BELOW} alone: it reaches into peft's list of methods. Install one "
            f"of those: {wanted}. Or do without: `sparseft convert ADAPTER OUT --to peft-shira` "
            "writes a folder that peft reads by itself, losslessly for weights of nn.Linear."
        )


def _reduce(protocol: int) -> Any:
    # A process that has not imported us yet learns the member when it reads a pickle of it.
    return member, ()


def _add_member(kinds: Any) -> Any:
    """Give the enumeration its member, as its own metaclass does."""
    global _member
    if _member is None:
        made = str.__new__(kinds, KIND)
        made._name_, made._value_, made.__objclass__ = KIND, KIND, kinds
        made._sort_order_ = len(kinds._member_names_)
        made.__reduce_ex__ = _reduce
        made._made_by_sparseft = True
        _member = made
    type.__setattr__(kinds, KIND, _member)
    kinds._member_map_[KIND] = kinds._value2member_map_[KIND] = _member
    if hasattr(kinds, "_hashable_values_"):  # Python 3.12 and later
        kinds._hashable_values_.append(KIND)
    kinds._member_names_.append(KIND)  # last: `list(kinds)` looks the names up in the map
    return _member


def _remove_member(kinds: Any) -> None:
    kinds._member_names_.remove(KIND)
    if hasattr(kinds, "_hashable_values_"):
        kinds._hashable_values_.remove(KIND)
    del kinds._member_map_[KIND], kinds._value2member_map_[KIND]
    type.__delattr__(kinds, KIND)


def _tables() -> list[dict[Any, Any]]:
    # Read from the module: tests and reloads may have put others in their place.
    mapping = importlib.import_module("peft.mapping")
    kinds = ("CONFIG", "TUNER", "MIXED_MODEL", "PREFIX")
    return [getattr(mapping, f"PEFT_TYPE_TO_{kind}_MAPPING") for kind in kinds]


def registered() -> bool:
    """Whether peft knows the method now."""
    from peft import PeftType

    return _member is not None and PeftType.__members__.get(KIND) is _member


def register() -> None:
    """Register the method with the installed peft; a second time changes nothing.

    Importing `sparseft.peft` does it.

    Raises:
        ImportError: a peft that is absent or outside the tested range.
        RuntimeError: peft has a method of that name already.
    """
    global _member
    check_version()
    from peft import PeftType
    from peft.utils import register_peft_method

    from sparseft.peft.config import SparseFtConfig
    from sparseft.peft.model import SparseFtModel

    with _lock:
        if registered():
            return
        found = PeftType.__members__.get(KIND)
        if getattr(found, "_made_by_sparseft", False):
            # By a copy of this module that was reloaded since: its classes make way for ours.
            _member = found
            for table in _tables():
                table.pop(found, None)
            _remove_member(PeftType)
        elif found is not None:
            raise RuntimeError(
                f"peft has a method {KIND} that is not this one; sparseft.peft cannot be used with "
                "it. `sparseft convert ADAPTER OUT --to peft-shira` needs no registration."
            )
        _add_member(PeftType)
        try:
            register_peft_method(
                name=METHOD, config_cls=SparseFtConfig, model_cls=SparseFtModel, prefix=PREFIX
            )
        except BaseException:
            _remove_member(PeftType)
            raise


def unregister() -> None:
    """Leave peft's tables and its enumeration as they were before `register`.

    Models that were made go on working, but peft neither saves nor loads them until the method is
    registered again.
    """
    from peft import PeftType

    with _lock:
        if not registered():
            return
        for table in _tables():
            table.pop(_member, None)
        _remove_member(PeftType)


def member() -> Any:
    """Return ``PeftType.SPARSEFT``, registering the method if need be."""
    if not registered():
        register()
    return _member
