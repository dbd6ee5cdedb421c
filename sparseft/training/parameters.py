"""What a lottery ticket trains, and how it is put back: candidates, full parameters, buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseft._integrity import hash_tensor
from sparseft.errors import MaskError, ResumeError
from sparseft.modules import ParameterIndex
from sparseft.selection.patterns import match_names, names_between
from sparseft.training.state import TensorFile, save_tensors

__all__ = ["Trainables", "base_digest", "saved_training_mode"]


@dataclass(frozen=True)
class Trainables:
    """The parameters of a run by canonical name (tied ones once), split by their role.

    Args:
        candidates: floating parameters the mask may choose from.
        full: parameters trained fully in both phases (heads).
        frozen: everything else.
        buffers: persistent buffers, rewound together with the parameters.
    """

    candidates: dict[str, nn.Parameter]
    full: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        full_params: Sequence[str],
    ) -> Trainables:
        """Split the parameters of ``model``; patterns are globs, as in `select`.

        Raises:
            UnknownNameError: a pattern that matches nothing.
            MaskError: no candidate is left.
        """
        index = ParameterIndex(model)
        full = set(match_names(index, full_params, "full_params"))
        chosen = set(names_between(index, include, exclude)) - full
        parameters = {n: index.get(n) for n in index.names}
        candidates = {n: p for n, p in parameters.items() if n in chosen and p.is_floating_point()}
        if not candidates:
            raise MaskError(
                f"no parameter is left to select from: include={include!r}, "
                f"exclude={list(exclude)!r}, "
                f"full_params={list(full_params)!r} rule out all {len(index)}."
            )
        keys = set(model.state_dict().keys())
        return cls(
            candidates=candidates,
            full={n: p for n, p in parameters.items() if n in full},
            frozen={n: p for n, p in parameters.items() if n not in candidates and n not in full},
            buffers={n: b for n, b in model.named_buffers() if n in keys},
        )

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Candidates and full parameters."""
        return {**self.candidates, **self.full}

    @property
    def kept(self) -> dict[str, Tensor]:
        """Everything that is saved and put back: what is trained, and the buffers."""
        return {**self.trained, **self.buffers}

    @property
    def numel(self) -> int:
        """Entries the mask chooses from."""
        return sum(p.numel() for p in self.candidates.values())

    def save(self, path: Path) -> None:
        """Write the present values of everything trained, and the buffers."""
        save_tensors(path, self.kept)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Put values that `save` wrote back, bit for bit.

        Raises:
            ResumeError: a tensor is missing or has another shape or dtype.
        """
        for name, target in self.kept.items():
            value = values.get(name)
            if value is None or value.shape != target.shape or value.dtype != target.dtype:
                got = "nothing" if value is None else f"{tuple(value.shape)} {value.dtype}"
                raise ResumeError(
                    f"the saved values hold {got} for {name!r}, but the model has "
                    f"{tuple(target.shape)} {target.dtype}; the model is another one. "
                    "Use another output_dir."
                )
            target.copy_(value)

    def load_file(self, path: Path) -> None:
        """`load` from a file, one tensor at a time."""
        self.load(TensorFile(path))


def base_digest(parts: Trainables) -> str:
    """Return 32 hex digits over names, shapes, dtypes of all and bytes of all but the full
    parameters.

    Heads are initialised at random, anew in each process; theta0 on disk has their values.
    """
    digest = hashlib.blake2b(digest_size=16)
    everything = {**parts.candidates, **parts.full, **parts.frozen, **parts.buffers}
    for name in sorted(everything):
        tensor = everything[name]
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        if name not in parts.full:
            hash_tensor(digest, tensor)
    return digest.hexdigest()


@contextmanager
def saved_training_mode(model: nn.Module) -> Iterator[None]:
    """Put every ``requires_grad`` and every module's train/eval mode back at the end."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
