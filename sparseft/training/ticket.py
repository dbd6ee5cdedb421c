"""The lottery-ticket algorithm on an open state: looked up on disk before it is computed.

`lottery_ticket` checks its arguments and hands over to `TicketRun`.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparseft._integrity import bits_equal
from sparseft.adapter import Adapter
from sparseft.errors import ResumeError
from sparseft.modules._collective import Ranks
from sparseft.selection import Masks
from sparseft.training.hooks import PhaseHooks
from sparseft.training.mask_choice import Batches, MaskChoice
from sparseft.training.parameters import Trainables
from sparseft.training.phase1 import THETA0, Phase1
from sparseft.training.phases import MakeTrainer, Phase, run_phase, trainer_batches
from sparseft.training.rng import derive_seed
from sparseft.training.state import RunState, TensorFile, save_tensors

__all__ = ["LotteryTicketResult", "TicketRun"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LotteryTicketResult:
    """What a run gives for one nnz.

    Args:
        adapter: the trained diffs, relative to the base with the source adapters applied, and the
            full parameters.
        masks: which entries were chosen. Where a `Reselection` moves them in the sparse phase, the
            adapter has the last ones.
        history: log of the phases behind it: the trainer's entries, each with ``"phase"`` added.
        state_dir: the run's folder.
        path: the adapter's file.
        dense_path: safetensors file with the result of the last dense phase (full fine-tuning);
            None where the selection needed none and none was shared.
    """

    adapter: Adapter
    masks: Masks = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    state_dir: Path
    path: Path
    dense_path: Path | None

    @property
    def nnz(self) -> int:
        """Number of trained entries."""
        return self.masks.nnz


@dataclass
class TicketRun:
    """The algorithm on an open state: everything is looked up on disk before it is computed."""

    make_trainer: MakeTrainer
    model: nn.Module
    parts: Trainables
    folder: Path
    state: RunState
    iterations: int
    l1: tuple[float, float]
    seed: int
    choice: MaskChoice
    phase1: Phase1 | None = None
    ranks: Ranks = field(default_factory=lambda: Ranks(False))
    theta0: Mapping[str, Tensor] = field(init=False, repr=False)

    # -- theta0 -----------------------------------------------------------------------------------

    def remember_theta0(self, known: Path | None = None) -> None:
        """Write theta0, or put the model at the theta0 that an earlier process wrote.

        Args:
            known: a safetensors file of the base; what it holds bit for bit is not written again.
        """
        path = (self.folder if self.phase1 is None else self.phase1.folder) / THETA0
        if path.exists():
            own = TensorFile(path)
        elif self.state.phases or self.phase1 is not None:
            raise ResumeError(
                f"{path} is gone but the run had begun; pass resume=False to start over."
            )
        else:
            base = TensorFile(known) if known is not None else {}
            save_tensors(path, {n: t for n, t in self.parts.kept.items() if not _in(base, n, t)})
            own = TensorFile(path)
        lacking = [n for n in self.parts.kept if n not in own]
        if lacking:
            if known is None:
                raise ResumeError(
                    f"{path} leaves {lacking[0]!r} and {len(lacking) - 1} more to a file of the "
                    "base; pass the same theta0 as when the run began."
                )
            base = TensorFile(known)
            for name in lacking:
                if not _in(base, name, self.parts.kept[name]):
                    raise ResumeError(
                        f"{known} does not hold {name!r} as the model has it; the run began with "
                        "another file or another base."
                    )
            self.theta0 = ChainMap(cast(Any, own), cast(Any, base))
        else:
            self.theta0 = own
        self.parts.load(self.theta0)

    def rewind_to_base(self) -> None:
        """Put theta0 back, bit for bit."""
        self.parts.load(self.theta0)

    # -- the algorithm ---

    def results(
        self, budgets: list[int], finish: Callable[[Adapter, int], Adapter]
    ) -> list[LotteryTicketResult]:
        """Run what is missing and return a result for each budget."""
        last: Adapter | None = None
        for iteration in range(self.iterations):
            final = iteration == self.iterations - 1
            # Grown in equal shares; the last iteration brings the mask to exactly nnz.
            counts = [k if final else k * (iteration + 1) // self.iterations for k in budgets]
            out, previous = [], last
            for budget, count in zip(budgets, counts, strict=True):
                if count == 0:  # fewer entries than iterations: nothing to train yet
                    continue
                result = self._ticket(iteration, count, counts, previous, finish, budget)
                last = result.adapter
                out.append(result)
        return out

    def _ticket(
        self,
        iteration: int,
        count: int,
        counts: list[int],
        previous: Adapter | None,
        finish: Callable[[Adapter, int], Adapter],
        budget: int,
    ) -> LotteryTicketResult:
        home = self.folder / f"iteration-{iteration}"
        dense_key = f"iteration-{iteration}/dense"
        sparse_key = f"iteration-{iteration}/sparse-nnz-{count}"
        adapter_path = home / f"adapter-nnz-{count}" / "adapter.safetensors"
        masks_path = home / f"masks-nnz-{count}.safetensors"
        dense = self.dense_path(iteration)
        if not self.state.done(sparse_key):
            missing = not masks_path.exists()
            self.ranks.wait("all have looked for masks")
            if missing:
                if dense is not None and self.phase1 is None and not self.state.done(dense_key):
                    self.dense_phase(iteration, previous)
                self._select(dense, iteration, counts, previous)
            self._sparse_phase(
                iteration,
                sparse_key,
                home / f"sparse-nnz-{count}",
                Masks.load(masks_path),
                previous,
                lambda adapter: finish(adapter, budget).save(adapter_path),
            )
        if not adapter_path.is_file():
            raise ResumeError(
                f"{adapter_path} is gone but the run had finished; put it back, or delete "
                f"{self.folder} to train it anew."
            )
        before = self._history(dense_key)
        if self.phase1 is not None and self.choice.needs_dense:
            before = self.phase1.history
        history = [{"phase": dense_key, **entry} for entry in before]
        history += [{"phase": sparse_key, **entry} for entry in self._history(sparse_key)]
        return LotteryTicketResult(
            adapter=Adapter.load(adapter_path),
            masks=Masks.load(masks_path),
            history=history,
            state_dir=self.folder,
            path=adapter_path,
            dense_path=dense,
        )

    def _history(self, key: str) -> list[dict[str, Any]]:
        return self.state.phases.get(key, {}).get("history", [])

    def dense_path(self, iteration: int) -> Path | None:
        """Return where the result of an iteration's dense phase lies, None if there is none."""
        if self.phase1 is not None:
            return self.phase1.dense
        if not self.choice.needs_dense:
            return None
        return self.folder / f"iteration-{iteration}" / "dense.safetensors"

    def _begin(self, previous: Adapter | None) -> None:
        """Put the model where an iteration begins: at theta0, or where the last iteration ended."""
        self.rewind_to_base()
        if previous is None:
            return
        with torch.no_grad():
            for name, diff in previous.diffs.items():
                flat = self.parts.candidates[name].detach().view(-1)
                at = diff.indices.to(flat.device, torch.int64)
                flat[at] = (flat[at].float() + diff.values.to(flat.device)).to(flat.dtype)
            for name, value in previous.dense.items():
                self.parts.full[name].copy_(value)

    def dense_phase(self, iteration: int, previous: Adapter | None) -> None:
        """Train every candidate, and keep the result in the run's folder."""
        key = f"iteration-{iteration}/dense"
        folder = self.folder / key
        self._begin(previous)
        trained = self.parts.trained
        ids = {id(p) for p in trained.values()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in ids)
        hooks = PhaseHooks(
            "dense",
            [(p, self._delta(n, p)) for n, p in self.parts.candidates.items()],
            self.l1[0],
        )
        phase = Phase(
            name="dense",
            iteration=iteration,
            index=2 * iteration,
            output_dir=folder,
            seed=derive_seed(self.seed, key),
            parameters=trained,
        )
        logger.info("phase %s: training %s entries", key, f"{self.parts.numel:,}")
        history = run_phase(
            self.make_trainer, self.model, phase, key=key, state=self.state, hooks=hooks,
            ranks=self.ranks,
        )  # fmt: skip
        self._finish(key, history, lambda: self.parts.save(folder.with_suffix(".safetensors")))

    def _delta(self, name: str, parameter: nn.Parameter) -> Callable[[], Tensor]:
        return lambda: parameter.detach() - self.theta0[name].to(parameter.device)

    def _select(
        self, dense: Path | None, iteration: int, counts: list[int], previous: Adapter | None
    ) -> None:
        """Choose the masks of all budgets, and keep them in the run's folder."""
        # Differences are theta1 - theta0; weights and gradients are looked at where training
        # begins.
        if dense is not None and self.choice.needs_dense:
            self.parts.load_file(dense)
        else:
            self._begin(previous)
        base: Mapping[str, Tensor] = self.theta0
        if previous is not None:
            base = _FarFromOld(self.parts, self.theta0, previous)
        home = self.folder / f"iteration-{iteration}"
        counts = [c for c in counts if not (home / f"masks-nnz-{c}.safetensors").exists()]
        self.ranks.wait("all have looked for masks")
        batches = self._batches(iteration) if self.choice.needs_batches else None
        found = self.choice.masks(
            self.model,
            counts,
            base=base,
            include=list(self.parts.candidates),
            seed=self.seed,
            batches=batches,
        )
        for count, masks in zip(counts, found, strict=True):
            if self.ranks.leads:
                masks.save(home / f"masks-nnz-{count}.safetensors")
            logger.info("selected %s entries", f"{masks.nnz:,}")
        self.ranks.wait("masks are written")

    def _batches(self, iteration: int) -> Batches:
        """Return the training batches, from a trainer as the dense phase would have it."""
        key = f"iteration-{iteration}/dense"
        phase = Phase(
            name="dense",
            iteration=iteration,
            index=2 * iteration,
            output_dir=self.folder / key,
            seed=derive_seed(self.seed, key),
            parameters=self.parts.trained,
        )
        return trainer_batches(self.make_trainer(self.model, phase), self.model)

    def _sparse_phase(
        self,
        iteration: int,
        key: str,
        folder: Path,
        masks: Masks,
        previous: Adapter | None,
        save: Callable[[Adapter], Any],
    ) -> None:
        from sparseft.attachment import attach

        self._begin(previous)
        if previous is not None:
            # The diff is relative to theta0: weights start there, with the diff so far in leaves.
            with torch.no_grad():
                for name, weight in self.parts.candidates.items():
                    weight.copy_(self.theta0[name])
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        attachment = attach(
            self.model,
            {n: p for n, p in masks.items() if p.nnz},
            full_params=list(self.parts.full),
        )
        try:
            if previous is not None:
                attachment.load_adapter_(previous)
            hooks = PhaseHooks(
                "sparse",
                [(leaf, leaf.detach) for leaf in attachment.leaves.values()],
                self.l1[1],
            )
            phase = Phase(
                name="sparse",
                iteration=iteration,
                index=2 * iteration + 1,
                output_dir=folder,
                seed=derive_seed(self.seed, key),
                parameters=dict(attachment.named_parameters()),
                attachment=attachment,
                nnz=attachment.nnz,
            )
            logger.info("phase %s: training %s entries", key, f"{attachment.nnz:,}")
            history = run_phase(
                self.make_trainer, self.model, phase, key=key, state=self.state, hooks=hooks,
                ranks=self.ranks,
            )  # fmt: skip
            adapter = attachment.adapter()
        finally:
            attachment.detach(restore=True)
        self._finish(key, history, lambda: save(adapter))

    def _finish(self, key: str, history: list[dict[str, Any]], save: Callable[[], Any]) -> None:
        """Have one process write a phase's result, then note that the phase is done."""
        if self.ranks.leads:
            save()
        self.state.finish(key, history=history)
        if self.ranks.leads:
            _clear_loop_checkpoints(self.folder / key)
        self.ranks.wait(f"phase {key} is written")


def _in(file: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    return name in file and bits_equal(file[name], tensor.detach().cpu())


class _FarFromOld(Mapping[str, Tensor]):
    """theta0, moved far away at the entries of an earlier mask, so that those rank first."""

    def __init__(self, parts: Trainables, theta0: Mapping[str, Tensor], old: Adapter) -> None:
        self.parts, self.theta0, self.old = parts, theta0, old

    def __getitem__(self, name: str) -> Tensor:
        base = self.theta0[name]
        if name not in self.old.diffs:
            return base
        base = base.float().clone()
        at = self.old.diffs[name].indices.long()
        tuned = self.parts.candidates[name].detach().view(-1)[at].float().cpu()
        far = torch.finfo(torch.float32).max / 2
        base.view(-1)[at] = torch.where(tuned > 0, -far, far)
        return base

    def __iter__(self) -> Iterator[str]:
        return iter(self.theta0)

    def __len__(self) -> int:
        return len(self.theta0)


def _clear_loop_checkpoints(folder: Path) -> None:
    """Delete `LoopTrainer`'s checkpoints of a finished phase; a Trainer has its own options."""
    for path in folder.glob("*.pt"):
        path.unlink(missing_ok=True)
