"""The two sides of the composition cases: copies of one model, adapters, what both must show."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparseft.adapter import Adapter
from sparseft.benchmarking.cases import composable_sft as peer
from sparseft.benchmarking.cases.model_step import BASE, TINY
from sparseft.benchmarking.checks import Check, as_accurate, equal_bits, worst
from sparseft.benchmarking.masks import sectors_touched
from sparseft.benchmarking.suite import Facts
from sparseft.composition import Composer
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.ops import gather_entries, resolve_backend, write_entries_

__all__ = ["DTYPES", "MODELS", "Active", "Sides", "build_model", "random_adapters"]

SMALL = {
    "vocab_size": 25_000,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 514,
}
MODELS = {"xlmr_base": BASE, "small": SMALL, "tiny": TINY}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Place of an adapter -> its coefficient.
Active = Mapping[int, float]


class Sides:
    """Two copies of one model, the adapters, and a composer on one of the copies."""

    def __init__(
        self, count: int, model: str, dtype: str, density: float, device: torch.device
    ) -> None:
        self.device, self.dtype = device, DTYPES[dtype]
        self.ours = build_model(model, device).to(self.dtype)
        self.theirs = build_model(model, device).to(self.dtype)
        self.theirs.load_state_dict(self.ours.state_dict())
        shapes = {n: p.shape for n, p in self.ours.named_parameters()}
        self.adapters = random_adapters(count, shapes, self.dtype, density, device)
        self.diffs: list[peer.Diffs] = [peer.as_coo(a, device) for a in self.adapters.values()]
        self.composer = Composer(self.ours, self.adapters)
        self._unions: dict[tuple[int, ...], dict[str, SparsePattern]] = {}

    def names(self, active: Active) -> dict[str, float]:
        keys = list(self.adapters)
        return {keys[i]: coeff for i, coeff in active.items()}

    def unions(self, active: Active) -> dict[str, SparsePattern]:
        """Return the union of the adapters' entries, by parameter."""
        key = tuple(active)
        if key not in self._unions:
            chosen = [list(self.adapters.values())[i] for i in active]
            self._unions[key] = {
                name: SparsePattern.from_indices(
                    torch.unique(torch.cat([a[name].indices for a in chosen])),
                    chosen[0][name].shape,
                )
                for name in chosen[0]
            }
        return self._unions[key]

    @torch.no_grad()
    def checked(self, compositions: list[Active]) -> tuple[list[Check], Facts]:
        """Go through the compositions and back to the base on both sides.

        Returns:
            What ours showed, and what is left of the competitor's round trip.
        """
        base = {n: p.detach().clone() for n, p in self.ours.named_parameters()}
        near, kept, undone = [], [], []
        before: Active = {}
        for active in compositions:
            self.composer.switch(self.names(active))
            peer.subtract_and_add(self.theirs, before, active, self.diffs)
            before = active
            for name, pattern in self.unions(active).items():
                at = pattern.indices
                exact = gather_entries(base[name], at).double()
                for i, coeff in active.items():
                    diff = list(self.adapters.values())[i][name]
                    place = torch.searchsorted(at, diff.indices)
                    exact.index_add_(0, place, diff.values.double() * coeff)
                ours = gather_entries(self.ours.get_parameter(name).detach(), at)
                theirs = gather_entries(self.theirs.get_parameter(name).detach(), at)
                near.append(as_accurate(f"composed {name}", ours, theirs, exact))
                wanted = base[name].clone()
                write_entries_(wanted, at, ours)
                whole = self.ours.get_parameter(name).detach()
                kept.append(equal_bits(f"untouched {name}", whole, wanted))
        self.composer.revert()
        peer.revert(self.theirs, before, self.diffs)
        for name, parameter in self.ours.named_parameters():
            undone.append(equal_bits(f"undone {name}", parameter.detach(), base[name]))
        drifted, furthest = 0, 0.0
        for name, parameter in self.theirs.named_parameters():
            away = (parameter.detach() - base[name]).abs()
            drifted += int(away.count_nonzero())
            furthest = max(furthest, float(away.max()))
        self.theirs.load_state_dict(base)
        facts: Facts = {"entries changed by going there and back": drifted, "by at most": furthest}
        return [worst(near), worst(kept), worst(undone)], facts

    def facts(self, active: Active) -> Facts:
        weights = [p.detach() for p in self.ours.parameters()]
        union = sum(p.nnz for p in self.unions(active).values())
        return {"backend": resolve_backend("compose_many_", *weights), "union": union}

    def bytes_applied(self, active: Active) -> float:
        """What memory must move at least: per entry of the union an index, the saved value and how
        many adapters share it; per entry of an adapter value and adapter; and each 32-byte piece of
        the weights that holds an entry, in and out.
        """
        union = sum(p.nnz for p in self.unions(active).values())
        entries = sum(list(self.adapters.values())[i].nnz for i in active)
        size = self.dtype.itemsize
        return union * (4 + size + 1) + entries * (size + 1) + 64 * self._sectors(active)

    def bytes_restored(self, active: Active) -> float:
        """Index and saved value per entry, and the touched pieces of the weights in and out."""
        union = sum(p.nnz for p in self.unions(active).values())
        return union * (4 + self.dtype.itemsize) + 64 * self._sectors(active)

    def _sectors(self, active: Active) -> int:
        return sum(sectors_touched(p, self.dtype.itemsize) for p in self.unions(active).values())


def build_model(model: str, device: torch.device) -> nn.Module:
    """Return the encoder with random weights, the same ones every time."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    with torch.device("meta"):
        made = XLMRobertaModel(XLMRobertaConfig(**MODELS[model], type_vocab_size=1))
    if device.type == "meta":
        return made
    made = made.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return made.requires_grad_(False)


def random_adapters(
    count: int,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    density: float,
    device: torch.device,
) -> dict[str, Adapter]:
    made = {}
    for number in range(count):
        generator = torch.Generator(device).manual_seed(number)
        diffs = {}
        for name, shape in shapes.items():
            at = _positions(shape.numel(), density, generator)
            values = torch.randn(at.numel(), device=device, generator=generator).mul_(1e-3)
            diffs[name] = SparseDiff(at, values.to(dtype), shape)
        made[f"adapter{number}"] = Adapter(diffs, name=f"adapter{number}")
    return made


def _positions(numel: int, density: float, generator: torch.Generator) -> Tensor:
    """Return uniformly random positions, ascending: each with the chance ``density``, by steps."""
    if density >= 1:
        return torch.arange(numel, dtype=torch.int32, device=generator.device)
    most = int(numel * density + 10 * (numel * density) ** 0.5 + 10)
    steps = torch.empty(most, dtype=torch.float64, device=generator.device)
    at = steps.geometric_(density, generator=generator).long().cumsum(0) - 1
    return at[at < numel].int()
