"""`SparseFtConfig`: which layers, which entries of them, and what they start from."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import PeftConfig

from sparseft._text import did_you_mean
from sparseft.errors import OptionError
from sparseft.peft import _shim
from sparseft.peft.base_samples import check_samples

__all__ = ["SparseFtConfig"]

# Given to make an adapter; a file holds what came of them.
_TRANSIENT = ("masks", "adapter")
_SCOPES = ("global", "tensor", "row")


@dataclass
class SparseFtConfig(PeftConfig):
    """Configuration of a sparse adapter of PEFT.

    Args:
        target_modules: names or ends of names of modules, a regular expression, or
            ``"all-linear"``; None: the modules of ``masks`` or ``adapter`` where those are given,
            else all linear layers. ``nn.Linear`` (quantised ones too), ``Conv1D``, ``nn.Embedding``
            and ``nn.LayerNorm`` can be targets.
        exclude_modules: likewise, to be left out.
        layers_to_transform: indices of the layers of ``target_modules`` to take; not with a
            regular expression.
        layers_pattern: name of the list of layers that these count, where it is unusual.
        modules_to_save: modules trained whole (heads).
        density: fraction of the targets' entries to train, in (0, 1].
        nnz: number of entries to train, instead of ``density``.
        selection: method of `sparseft.select` that needs no data: ``"random"``,
            ``"weight_magnitude"``, ``"low_rank"``, ... Masks by the others go into ``masks``.
        selection_options: options of that method, e.g. ``{"rank": 32}``.
        scope: as in `sparseft.select`: ``"global"``, ``"tensor"`` or ``"row"``.
        seed: of methods that draw.
        biases: whether the biases of the targets are candidates, too.
        masks: what `sparseft.select` returns or a mapping from parameter name to mask, or a file
            of `Masks.save`; instead of a selection. Not saved.
        adapter: a sparseft `Adapter`, or its path: its entries, values and heads are what the new
            adapter starts from. Not saved.
        entries: parameter name -> ``{"nnz": ..., "shape": [...]}``, filled in when the adapter is
            made: what an adapter is laid out from when it is loaded.
        base_samples: parameter name -> ``{"dtype": ..., "samples": [...]}``, filled in likewise: 16
            values of each target's base (quantised ones aside). Loading compares them; None: it
            does not.

    Raises:
        OptionError: a number out of range, or arguments that exclude each other.

    Example:
        >>> from sparseft.peft import SparseFtConfig
        >>> SparseFtConfig(target_modules=["q_proj", "v_proj"], density=0.01).peft_type.value
        'SPARSEFT'
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to leave out, or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to take."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, where it is unusual."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole and saved."}
    )
    density: float | None = field(
        default=None, metadata={"help": "Fraction of the targets' entries to train, in (0, 1]."}
    )
    nnz: int | None = field(default=None, metadata={"help": "Number of entries to train."})
    selection: str = field(
        default="random", metadata={"help": "Method of sparseft.select that needs no data."}
    )
    selection_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the selection method."}
    )
    scope: str = field(default="global", metadata={"help": "'global', 'tensor' or 'row'."})
    seed: int = field(default=0, metadata={"help": "Seed of methods that draw."})
    biases: bool = field(default=False, metadata={"help": "Whether biases are candidates, too."})
    entries: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Number of entries and shape by parameter; filled in."}
    )
    base_samples: dict[str, dict[str, Any]] | None = field(
        default=None, repr=False, metadata={"help": "Samples of the base by parameter; filled in."}
    )
    masks: Any = field(default=None, repr=False, compare=False, metadata={"help": "Ready masks."})
    adapter: Any = field(
        default=None, repr=False, compare=False, metadata={"help": "What to start from."}
    )

    # Embeddings are stored as the few entries that changed: PEFT then leaves their tables out of
    # the file, which it else adds for targets called embed_tokens.
    trainable_token_indices: ClassVar[dict[str, list[int]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _TRANSIENT:
            if isinstance(getattr(self, name), str) and getattr(self, "peft_type", None):
                raise OptionError(
                    f"a saved configuration gives {name}={getattr(self, name)!r}: what is read "
                    "from a file opens no other one. Take it out of adapter_config.json."
                )
        self.peft_type = _shim.member()
        self._chosen_here = False  # whether `entries` come from a selection in this process
        for name in ("target_modules", "exclude_modules"):
            given = getattr(self, name)
            if isinstance(given, list | tuple):
                setattr(self, name, set(given))
        self._check_layers()
        self._check_source()

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"{name} cannot be used with target_modules={self.target_modules!r}, a "
                        "regular expression. Put the layers into it, or give a list of names."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise OptionError(
                f"layers_pattern={self.layers_pattern!r} is given without layers_to_transform, "
                "the indices that count in it."
            )

    def _check_source(self) -> None:
        counted = [n for n in ("density", "nnz") if getattr(self, n) is not None]
        ready = [n for n in ("masks", "adapter", "entries") if getattr(self, n) is not None]
        if len(ready) > 1:
            raise OptionError(
                f"{' and '.join(ready)} are given; each says which entries there are: give one."
            )
        if ready and ready != ["entries"] and counted:
            raise OptionError(
                f"{counted[0]} is given together with {ready[0]}, whose entries are taken as they "
                f"are. Leave {counted[0]} out."
            )
        if len(counted) == 2 and not ready:
            raise OptionError(
                f"density={self.density} and nnz={self.nnz} are both given; give one of the two."
            )
        if not ready and not counted:
            raise OptionError(
                "how many entries? density and nnz are both None; give one (density=0.01, say), "
                "or masks=..., or adapter=..."
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise OptionError(f"density is {self.density}, wanted a fraction in (0, 1].")
        if self.nnz is not None and (isinstance(self.nnz, bool) or self.nnz < 1):
            raise OptionError(f"nnz is {self.nnz}, wanted a number of entries, 1 or more.")
        if self.scope not in _SCOPES:
            raise OptionError(
                f"scope is {self.scope!r}, wanted one of {', '.join(map(repr, _SCOPES))}."
                f"{did_you_mean(str(self.scope), _SCOPES)}"
            )
        try:
            json.dumps(self.selection_options, allow_nan=False)
        except (TypeError, ValueError) as bad:
            raise OptionError(
                f"selection_options cannot be saved ({bad}). Select first: "
                "masks=sparseft.select(model, ...), and give those."
            ) from None
        if self.entries is not None:
            _check_entries(self.entries)
        if self.base_samples is not None:
            check_samples(self.base_samples)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read a saved configuration; says of itself that it was saved."""
        return {**super().from_json_file(path_json_file, **kwargs), "peft_type": _shim.KIND}

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: sets as sorted lists, without ``masks`` and ``adapter``."""
        saved = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TRANSIENT}
        return {
            name: sorted(value) if isinstance(value, set) else copy.deepcopy(value)
            for name, value in saved.items()
        }


def _check_entries(entries: object) -> None:
    """Refuse a table of entries that a file may have got wrong."""
    from sparseft.errors import AdapterFormatError
    from sparseft.io.foreign.names import checked_shape

    if not isinstance(entries, Mapping):
        raise AdapterFormatError(
            f"entries is {type(entries).__name__}, wanted parameter name -> nnz and shape."
        )
    for name, fact in entries.items():
        what = f"entries of {str(name)[:200]!r}"
        if not isinstance(fact, Mapping) or not isinstance(fact.get("nnz"), int):
            raise AdapterFormatError(f"{what} are {str(fact)[:80]}, wanted nnz and shape.")
        shape, numel = checked_shape(fact.get("shape"), what), 1
        for size in shape:
            numel *= size
        if isinstance(fact["nnz"], bool) or not 0 < fact["nnz"] <= numel:
            raise AdapterFormatError(
                f"{what}: {fact['nnz']} of a tensor of shape {shape}; wanted from 1 to {numel:,}."
            )
