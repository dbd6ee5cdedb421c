"""Canonical parameter names: one name per parameter, the same inside any wrapper.

A tied group has one canonical name: the embedding's if an embedding is in it, else the first in
registration order. Its other names are aliases.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from sparseft._text import did_you_mean
from sparseft.errors import UnknownNameError

__all__ = ["STATE_KEY", "ParameterIndex", "canonical_name", "end_embeddings", "match_patterns"]

# Where a module with masked parameters keeps them: `module.__dict__[STATE_KEY]`, attribute name ->
# `MaskedParameter`. Their compact leaves are no parameters of the model one could mask or compose.
STATE_KEY = "_sparseft"

# Put in by wrappers at any depth.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}


def canonical_name(name: str) -> str:
    """Return a parameter's name in the bare model, without the parts that wrappers add.

    Args:
        name: as in ``named_parameters()`` of a model that may be wrapped by DDP (``module.``),
            ``torch.compile`` (``_orig_mod.``), FSDP, activation checkpointing or PEFT
            (``base_layer.``).
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    # Only in front: deeper down "module" is somebody's own attribute.
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def match_patterns(
    patterns: str | Iterable[str], names: Sequence[str], *, what: str = ""
) -> list[str]:
    """Return the ``names`` that match any of the glob ``patterns``, in the order of ``names``.

    Args:
        patterns: globs as in ``fnmatch`` (``*`` crosses dots), or one of them.
        names: what they choose from.
        what: the argument that they were given as, for the message.

    Raises:
        UnknownNameError: a pattern that matches nothing; the message has the nearest names.
    """
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            inside = f"{pattern}.*"
            hint = did_you_mean(pattern, names)
            if any(fnmatch.fnmatchcase(name, inside) for name in names):
                hint = f" Did you mean {inside!r}?"
            said = f"{what}: pattern" if what else "pattern"
            raise UnknownNameError(f"{said} {pattern!r} matches none of {len(names)} names.{hint}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def end_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input and output embeddings that a transformers model names, those there are."""
    found = []
    for end in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, end, lambda: None)()
        except (NotImplementedError, AttributeError):  # what models without them do
            continue
        if isinstance(module, nn.Module):
            found.append(module)
    return found


def _entries(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (full name, owner, attribute, parameter) of every name, leaves of masks aside."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        masked = module.__dict__.get(STATE_KEY, {})
        leaves = {id(state.leaf) for state in masked.values()}
        for attr, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in leaves:
                yield f"{prefix}.{attr}" if prefix else attr, module, attr, parameter


class ParameterIndex:
    """The parameters of a model by canonical name, in registration order, ties resolved.

    Args:
        model: any module, wrapped or not, with masks attached or not.

    Example:
        >>> from torch import nn
        >>> ParameterIndex(nn.Linear(2, 2)).names
        ['weight', 'bias']
    """

    def __init__(self, model: nn.Module) -> None:
        entries = list(_entries(model))
        by_short: dict[str, set[int]] = {}
        for full, _, _, parameter in entries:
            by_short.setdefault(canonical_name(full), set()).add(id(parameter))
        self._parameters: dict[str, nn.Parameter] = {}
        self._canonical: dict[str, str] = {}  # every name, wrapped or not -> canonical
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {}
        self._aliases: dict[str, list[str]] = {}
        chosen: dict[int, str] = {}
        in_embedding: set[int] = set()
        # A full name stays where the model itself has a part called like a wrapper.
        shorts = [canonical_name(full) for full, *_ in entries]
        shorts = [
            f if len(by_short[s]) > 1 else s for (f, *_), s in zip(entries, shorts, strict=True)
        ]
        for short, (_, module, _, parameter) in zip(shorts, entries, strict=True):
            chosen.setdefault(id(parameter), short)
            # A head tied to the embedding may be registered first (transformers 5: lm_head before
            # the encoder), but only the embedding's name is there under another head, too.
            if isinstance(module, nn.Embedding) and id(parameter) not in in_embedding:
                in_embedding.add(id(parameter))
                chosen[id(parameter)] = short
        for short, (full, module, attr, parameter) in zip(shorts, entries, strict=True):
            name = chosen[id(parameter)]
            if name not in self._parameters:
                self._parameters[name] = parameter
                self._owners[name], self._aliases[name] = [], []
            if short != name and short not in self._aliases[name]:
                self._aliases[name].append(short)
            if not any(m is module and a == attr for m, a in self._owners[name]):
                at = 0 if short == name else len(self._owners[name])
                self._owners[name].insert(at, (module, attr))
            self._canonical[short] = self._canonical[full] = name

    @property
    def names(self) -> list[str]:
        """Canonical names, in registration order."""
        return list(self._parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._canonical

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (canonical name, parameter)."""
        return iter(self._parameters.items())

    def resolve(self, name: str) -> str:
        """Return the canonical name behind a canonical, tied or wrapped ``name``.

        Raises:
            UnknownNameError: there is none; the message has the nearest names.
        """
        found = self._canonical.get(name) or self._canonical.get(canonical_name(name))
        if found is None:
            raise UnknownNameError(
                f"the model has no parameter {name!r}.{did_you_mean(name, self._canonical)}"
            )
        return found

    def get(self, name: str) -> nn.Parameter:
        """Return the parameter behind any of its names."""
        return self._parameters[self.resolve(name)]

    def aliases(self, name: str) -> list[str]:
        """Return the other names of a tied or shared parameter."""
        return list(self._aliases[self.resolve(name)])

    def owners(self, name: str) -> list[tuple[nn.Module, str]]:
        """Return every (module, attribute) that holds the parameter, the canonical one first."""
        return list(self._owners[self.resolve(name)])

    def match(self, patterns: str | Iterable[str], *, what: str = "") -> list[str]:
        """Return the canonical names matched by globs, which may also speak of aliases.

        ``what`` names the argument that they were given as, for the message.
        """
        every = [n for name in self._parameters for n in (name, *self._aliases[name])]
        found = {self._canonical[n] for n in match_patterns(patterns, every, what=what)}
        return [name for name in self._parameters if name in found]
