"""What a side of a training step shows before it is timed.

Ours: its gradients are as near to the exact ones as torch's dense gradients are, its weights after
steps are the base plus its diff, bit for bit, and the base elsewhere. In fp32 they are also those
of gradient-mask fine-tuning after three steps. Adapters: they start from the base's loss.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseft.benchmarking.checks import Check, as_accurate, equal_bits, rel_rms, worst
from sparseft.benchmarking.suite import Contender, Facts
from sparseft.ops import gather_entries, resolve_backend, sum_entries
from sparseft.profiling.allocations import Allocations
from sparseft.profiling.sides import Built, build
from sparseft.profiling.workload import Unavailable, Way, Workload

__all__ = ["TOLERANCE", "Gates", "contender_of", "largest_difference", "short_collections"]

# Largest difference of any weight from gradient-mask fine-tuning's: three steps at lr 1e-4, fp32.
TOLERANCE = 5e-5
# Entries with a gradient from which on a leaf is judged by itself, and what fewer may be off beside
# twice torch's own error: roundings of its dtype.
_FEW = 64
_ROUNDINGS = 8
_STEPS = 3
_TRIES = 3
_WIDER = {torch.float32: torch.float64}

Gradients = dict[str, Tensor]


@dataclass
class Gates:
    """The base, and its dense gradients in its dtype (theirs) and in a wider one (exact).

    Args:
        base: built to be frozen, so that its weights stay.
        theirs, exact: by name of the masked weight.
    """

    base: Built
    theirs: Gradients
    exact: Gradients

    @classmethod
    def of(cls, workload: Workload, device: torch.device) -> Gates:
        """Build the base and take its gradients."""
        base = build(workload, Way("frozen"), device)
        dense = build(workload, Way("dense", None, "matrices"), device)
        names = [n for n, p in dense.model.named_parameters() if p.requires_grad]
        theirs = _gradients(dense.model, dense.inputs, names)
        dtype = next(dense.model.parameters()).dtype
        dense.model.to(_WIDER.get(dtype, torch.float32))
        return cls(base, theirs, _gradients(dense.model, dense.inputs, names))

    def of_attached(self, built: Built) -> list[Check]:
        """Take `_STEPS` steps and return what they showed."""
        if built.attachment is None or built.optimizer is None:
            raise ValueError(f"{built.way.kind} has no masks to check")
        built.backward(built.forward())
        leaves, patterns = built.attachment.leaves, built.attachment.patterns
        gradients = [
            _gradient_check(
                name,
                leaf.grad,
                self._at(self.theirs, name, built),
                self._at(self.exact, name, built),
                patterns[name].indices,
            )
            for name, leaf in leaves.items()
        ]
        built.optimizer.step()
        for _ in range(_STEPS - 1):
            built.step()
        written = []
        for name, leaf in leaves.items():
            wanted = self.base.model.get_parameter(name).detach().clone()
            at = patterns[name].indices
            sums = sum_entries(gather_entries(wanted, at), leaf.detach(), wanted.dtype)
            wanted.view(-1)[at.long()] = sums
            written.append(equal_bits(name, built.model.get_parameter(name).detach(), wanted))
        moved = sum(float(leaf.detach().abs().sum()) for leaf in leaves.values())
        still = Check("trained nothing", float(moved == 0), 0.0)
        return [worst(gradients), worst(written), still]

    def _at(self, gradients: Gradients, name: str, built: Built) -> Tensor:
        """A tied weight's gradient may go by its other name."""
        if name in gradients:
            return gradients[name]
        aliases = (n for n in gradients if self._same(n, name))
        return gradients[next(aliases)]

    def _same(self, one: str, other: str) -> bool:
        model = self.base.model
        return model.get_parameter(one) is model.get_parameter(other)

    def of_adapters(self, built: Built) -> list[Check]:
        """Adapters start at zero: the same loss, as the same model is being trained."""
        with torch.no_grad():
            apart = float((built.forward().float() - self.base.forward().float()).abs())
        return [Check("loss at the start: distance from the base's", apart, 1e-3)]


def _gradients(model: nn.Module, inputs: dict[str, Tensor], names: list[str]) -> Gradients:
    model.zero_grad()
    model(**inputs).loss.backward()
    found = {}
    for name in names:
        grad = model.get_parameter(name).grad
        found[name] = torch.zeros_like(model.get_parameter(name)) if grad is None else grad
    model.zero_grad()
    return found


def _gradient_check(
    name: str, got: Tensor | None, theirs: Tensor, exact: Tensor, at: Tensor
) -> Check:
    """Hold a leaf's gradient against the dense ones at its entries, by the rule of accuracy.

    Where few entries have a gradient, what they sum to and how near torch comes to it are luck: the
    error is then taken against the entries of the whole tensor that have one.
    """
    if got is None:
        return Check(f"{name}: no gradient", 1.0, 0.0)
    what = f"gradient of {name}"
    wanted = gather_entries(exact, at)
    if int(wanted.count_nonzero()) >= _FEW:
        return as_accurate(what, got, gather_entries(theirs, at), wanted)
    live = exact.flatten().nonzero().view(-1)
    everything = exact.flatten()[live].double()
    limit = 2 * rel_rms(theirs.flatten()[live], everything)
    limit += _ROUNDINGS * torch.finfo(theirs.dtype).eps
    if not live.numel():
        return Check(f"{what}: entries that are not zero", float(got.count_nonzero()), 0.0)
    error = (got.double() - wanted.double()).norm() / everything.square().mean().sqrt()
    count = max(1, int(wanted.count_nonzero()))
    return Check(f"{what}: error", float(error) / count**0.5, limit)


def largest_difference(theirs: nn.Module, ours: nn.Module) -> float:
    """Return the largest difference of any weight that both models have."""
    named = dict(theirs.named_parameters())
    return max(
        float((parameter.detach() - named[name].detach()).abs().max())
        for name, parameter in ours.named_parameters()
        if name in named
    )


def agreement(workload: Workload, ours: Built, density: float, device: torch.device) -> Check:
    """Hold ours, after `_STEPS` steps, against dense gradients times the same masks."""
    theirs = build(workload, Way("gradient_mask", density), device)
    for _ in range(_STEPS):
        theirs.step()
    apart = largest_difference(theirs.model, ours.model)
    return Check(f"a weight after {_STEPS} steps: distance from masked dense", apart, TOLERANCE)


def contender_of(workload: Workload, way: Way, gates: Gates, device: torch.device) -> Contender:
    """Build one side, measure its memory, and check it.

    Args:
        workload: what is trained.
        way: how.
        gates: of that workload.
        device: where.

    Raises:
        whatever the building raises, but for `Unavailable`: that one is skipped, with the reason.
    """
    try:
        memory = _peak(workload, way, device)
        built = build(workload, way, device)
    except Unavailable as error:
        return Contender(skipped=str(error), density=way.density)
    checks: list[Check] = []
    facts: Facts = {"trained": built.trainable, **_printable(built.facts), **memory}
    if way.kind == "attached" and built.attachment is not None:
        checks = gates.of_attached(built)
        if workload.dtype == "fp32" and not way.variant:
            checks.append(agreement(workload, built, way.share, device))
        leaf = next(iter(built.attachment.leaves.values()))
        facts["backend"] = resolve_backend("sampled_weight_grad", leaf)
        facts["nnz"] = built.attachment.nnz
    elif way.kind in ("lora", "shira"):
        checks = gates.of_adapters(built)
    run: Callable[[], Tensor] = built.step
    return Contender(run, checks, facts, ours=way.kind == "attached", density=way.density)


def _peak(workload: Workload, way: Way, device: torch.device) -> Facts:
    """Build a side, and return the highest bytes of its third step, its model included.

    What is alive besides does not count. The first two steps make what later ones keep.
    """
    for _ in range(_TRIES):
        peak = _recorded(workload, way, device)
        if peak is not None:
            return {"peak MB": peak / 1e6}
    return {"peak": "not measured: the profiler lost events"}


@contextlib.contextmanager
def short_collections() -> Iterator[None]:
    """Keep what is there by now, libraries above all, out of the many collections inside."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _recorded(workload: Workload, way: Way, device: torch.device) -> int | None:
    collecting = gc.isenabled()
    gc.collect()  # attached models hold cycles
    gc.disable()  # what somebody else left would be freed inside the record, and count downwards
    try:
        with Allocations(device) as record:
            built = build(workload, way, device)
            for _ in range(2):
                built.step()
            for parameter in built.model.parameters():
                parameter.grad = None
            record.mark("ready")
            built.step()
    finally:
        if collecting:
            gc.enable()
    storages = (p.untyped_storage() for p in built.model.parameters())
    weights = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    peak = record.stretches[-1].peak
    # A profiler that is overrun loses events of the build and says nothing.
    return peak if record.complete and peak >= weights else None


def _printable(facts: Facts) -> Facts:
    return {
        name: "-".join(map(str, value)) if isinstance(value, list) else value
        for name, value in facts.items()
    }
