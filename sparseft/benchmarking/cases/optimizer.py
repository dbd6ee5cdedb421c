"""One AdamW step at 1 % of a Llama-7B's linear layers against fused dense AdamW on the same layers.

As many of the layers as memory holds beside the competitor's state; nothing is extrapolated to the
rest. A copy timed in the same rounds gives the bandwidth that bytes are compared with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparseft.attachment import Attachment, attach
from sparseft.benchmarking.checks import Check, as_accurate, equal_bits, worst
from sparseft.benchmarking.masks import random_pattern, sectors_touched
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Case, Contender, Facts, Prepared, Target, faster
from sparseft.ops import gather_entries, resolve_backend, sum_entries
from sparseft.optim import SparseAdamW

__all__ = ["optimizer_case"]

_DENSITY = 0.01
_LR = 1e-4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Memory to leave free: the buffers of the copy and of the L2 flush, and the checks' temporaries.
_SPARE_BYTES = 8 << 30
_COPY_BYTES = 1 << 30
# Streams of our step per entry: gradient 4, base 2, index 4; diff and both moments in and out 24.
_STREAM_BYTES = 34
_CHECKED_STEPS = 3


def optimizer_case(
    dtype: str, *, layers: int, hidden: int = 4096, inner: int = 11008
) -> Case:  # fmt: skip
    """Compare with dense parameters, gradients and moments in ``"fp32"`` or ``"bf16"``.

    Args:
        dtype: the competitor's; our weights are bf16, our diff, gradient and moments fp32.
        layers: transformer layers wanted; fewer where memory lacks.
        hidden: width, 4096 in Llama-7B.
        inner: width of the MLP.
    """
    shapes = ((hidden, hidden),) * 4 + ((inner, hidden),) * 2 + ((hidden, inner),)

    def build(device: torch.device) -> Prepared:
        count = _layers_that_fit(sum(r * c for r, c in shapes), _DTYPES[dtype], layers, device)
        ours = _Ours(shapes * count, device)
        checks = ours.check()
        copy = _Copy(device)
        dense = _dense(shapes * count, _DTYPES[dtype], device)
        numel = sum(p.numel() for p in dense.param_groups[0]["params"])
        name = f"torch AdamW fused, {dtype}"
        # parameter and both moments in and out, gradient in
        dense_bytes = 7 * numel * _DTYPES[dtype].itemsize
        moved = {name: dense_bytes, "SparseAdamW": ours.bytes_moved(), "copy": copy.bytes_moved}
        contenders = {
            name: Contender(dense.step, facts={"entries": numel}),
            "SparseAdamW": Contender(ours.optimizer.step, checks, ours.facts()),
            "copy": Contender(copy.run),
        }

        def of_copy(timing: Timing, which: str) -> float:
            bandwidth = moved["copy"] / timing.median("copy")
            return moved[which] / timing.median(which) / bandwidth

        def derive(timing: Timing, which: str, contender: Contender) -> Facts:
            entries = contender.facts.get("nnz") or contender.facts.get("entries")
            facts: Facts = {"GB/s": moved[which] / timing.median(which) * 1e-9}
            if entries is not None:
                facts["bytes per entry"] = moved[which] / entries
                facts["ps per entry"] = timing.median(which) / entries * 1e12
                facts["% of copy"] = 100 * of_copy(timing, which)
            return facts

        targets = [
            Target(
                "SparseAdamW: at least 70 % of the copy's bandwidth",
                lambda timing, _: (
                    of_copy(timing, "SparseAdamW") if "SparseAdamW" in timing.seconds else None
                ),
                0.70,
                True,
            )
        ]
        if dtype == "fp32":
            targets.append(faster(15, "SparseAdamW", name))
        return Prepared(
            contenders,
            name,
            clocks=("device", "wall"),
            targets=tuple(targets),
            derive=derive,
            facts={"layers": count, "of": layers, "entries": numel},
        )

    return Case(f"adamw/{dtype}", build)


def _layers_that_fit(numel: int, dtype: torch.dtype, wanted: int, device: torch.device) -> int:
    if device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(device)
    # dense parameter, gradient, moments; our weight in bf16; index, base, diff, gradient, moments
    per_entry = 4 * dtype.itemsize + 2 + _DENSITY * (4 + 2 + 4 + 4 + 8)
    fit = int((0.95 * free - _SPARE_BYTES) // (per_entry * numel))
    if fit < 1:
        raise MemoryError(f"one layer needs {per_entry * numel / 1e9:.0f} GB and more to spare")
    return min(wanted, fit)


class _Saved(NamedTuple):
    weight: Tensor
    name: str


class _Ours:
    """Masked bf16 layers with a gradient on each leaf."""

    def __init__(self, shapes: tuple[tuple[int, int], ...], device: torch.device) -> None:
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        made = []
        for rows, cols in shapes:
            layer = nn.utils.skip_init(
                nn.Linear, cols, rows, bias=False, device=device, dtype=torch.bfloat16
            )
            with torch.no_grad():
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
            made.append(layer)
        self.layers = nn.ModuleList(made)
        patterns = {
            f"{i}.weight": random_pattern(shape, _DENSITY, device=device, seed=i)
            for i, shape in enumerate(shapes)
        }
        # One of each shape is kept whole, to see that frozen entries stay.
        firsts = {shape: i for i, shape in reversed(list(enumerate(shapes)))}
        self.saved = [
            _Saved(made[i].weight.detach().clone(), f"{i}.weight") for i in firsts.values()
        ]
        self.attachment: Attachment = attach(self.layers, patterns)
        for leaf in self.attachment.leaves.values():
            leaf.grad = torch.randn(leaf.shape, device=device, generator=generator)
        self.optimizer = SparseAdamW(self.attachment.parameters(), lr=_LR)

    def facts(self) -> Facts:
        leaf = next(iter(self.attachment.leaves.values()))
        return {"backend": resolve_backend("sparse_step_", leaf), "nnz": self.attachment.nnz}

    def bytes_moved(self) -> int:
        """The streams, and each 32-byte piece of the weight that holds an entry, in and out."""
        touched = sum(sectors_touched(p, 2) for p in self.attachment.patterns.values())
        return _STREAM_BYTES * self.attachment.nnz + 64 * touched

    def check(self) -> list[Check]:
        """Step, and compare diffs with torch's AdamW, weights with rn(base + diff), the rest with
        what was there.
        """
        for _ in range(_CHECKED_STEPS):
            self.optimizer.step()
        names = self.attachment.names
        theirs, exact = (
            self._by_torch(names, dtype) for dtype in (torch.float32, torch.float64)
        )  # fmt: skip
        leaves = self.attachment.leaves
        diffs = [
            as_accurate(f"diff of {n}", leaves[n].detach(), *pair)
            for n, *pair in zip(names, theirs, exact, strict=True)
        ]
        bases = {s.name: s.weight for s in self.saved}
        written, frozen = [], []
        for name, before in bases.items():
            at = self.attachment.patterns[name].indices
            after = self.layers.get_parameter(name).detach()
            wanted = sum_entries(gather_entries(before, at), leaves[name].detach(), after.dtype)
            written.append(equal_bits(f"weight of {name}", gather_entries(after, at), wanted))
            masked = before.clone()
            masked.view(-1)[at.long()] = wanted
            frozen.append(equal_bits(f"all of {name}", after, masked))
        self.saved.clear()
        return [worst(diffs), worst(written), worst(frozen)]

    def _by_torch(self, names: list[str], dtype: torch.dtype) -> list[Tensor]:
        """Return the diffs after as many steps of torch's own loop."""
        leaves = self.attachment.leaves
        copies = []
        for name in names:
            copy = nn.Parameter(torch.zeros_like(leaves[name], dtype=dtype))
            grad = leaves[name].grad
            copy.grad = None if grad is None else grad.to(dtype)
            copies.append(copy)
        optimizer = torch.optim.AdamW(copies, lr=_LR, foreach=False, fused=False)
        for _ in range(_CHECKED_STEPS):
            optimizer.step()
        return [copy.detach() for copy in copies]


class _Copy:
    def __init__(self, device: torch.device) -> None:
        length = _COPY_BYTES if device.type == "cuda" else 1 << 20
        self.source = torch.zeros(length, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)
        self.bytes_moved = 2 * length

    def run(self) -> None:
        self.target.copy_(self.source)


def _dense(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> torch.optim.AdamW:
    generator = torch.Generator(device).manual_seed(1)
    parameters = []
    for shape in shapes:
        made = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
        parameter = nn.Parameter(made[0].normal_(std=0.02, generator=generator))
        parameter.grad = made[1].normal_(generator=generator)
        parameters.append(parameter)
    return torch.optim.AdamW(parameters, lr=_LR, fused=True)
