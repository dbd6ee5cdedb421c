"""Registry of named functions: the decorator, the look-up, the options a signature declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparseft._text import did_you_mean
from sparseft.errors import OptionError, UnknownNameError

__all__ = ["Registered", "Registry"]


@dataclass(frozen=True)
class Registered:
    """One function under its name.

    Args:
        name: what users type.
        fn: the function; its keyword-only parameters are the options users may give.
        reference: address of the paper or page that describes it.
        traits: facts its registry keeps about it.
    """

    name: str
    fn: Callable[..., Any]
    reference: str
    traits: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default; ``inspect.Parameter.empty`` where the option must be given."""
        parameters = inspect.signature(self.fn).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def required(self) -> list[str]:
        """Options without a default."""
        return [o for o, default in self.options.items() if default is inspect.Parameter.empty]

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.fn) or "").partition("\n")[0]


class Registry:
    """Functions of one kind, in order of names.

    Args:
        what: the kind in error messages, e.g. ``"selection method"``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._entries: dict[str, Registered] = {}

    def register(
        self, name: str, *, reference: str, **traits: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that registers a function and leaves it as it is.

        Raises:
            OptionError: the name is taken.
        """

        def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
            known = self._entries.get(name)
            # A module that is reloaded registers the same function again.
            if known is not None and known.fn.__qualname__ != fn.__qualname__:
                raise OptionError(
                    f"{self._what} {name!r} is registered already, by "
                    f"{known.fn.__module__}.{known.fn.__qualname__}; choose another name."
                )
            self._entries[name] = Registered(name, fn, reference, traits)
            return fn

        return decorate

    def unregister(self, name: str) -> None:
        """Forget one entry (for tests and plug-ins)."""
        self.get(name)
        del self._entries[name]

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> Registered:
        """Return one entry.

        Raises:
            UnknownNameError: nothing has that name; the message lists the nearest and all.
        """
        if name not in self._entries:
            raise UnknownNameError(
                f"no {self._what} {name!r}.{did_you_mean(str(name), self._entries)} "
                f"There are: {', '.join(self.names())}."
            )
        return self._entries[name]

    def check_options(self, name: str, given: Iterable[str]) -> None:
        """Check that a method knows every option given and got those it needs.

        Raises:
            UnknownNameError: an option it does not have; the message lists those it has.
            OptionError: an option without a default is missing.
        """
        entry = self.get(name)
        known, given = entry.options, list(given)
        for option in given:
            if option not in known:
                have = f"it has {', '.join(known)}" if known else "it has none"
                raise UnknownNameError(
                    f"{self._what} {name!r} has no option {option!r}; {have}."
                    f"{did_you_mean(option, known)}"
                )
        for option in entry.required:
            if option not in given:
                got = f"got only {', '.join(given)}" if given else "got no option"
                raise OptionError(
                    f"{self._what} {name!r} needs {option}=...; {got}. What it does: "
                    f"{entry.summary}"
                )
