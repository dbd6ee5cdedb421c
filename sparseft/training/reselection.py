"""`Reselection`: masks that move in training, so that no dense phase has to choose them.

Every so many steps the least useful entries are dropped and the best candidates by accumulated
gradient are grown (SpIEL, RigL). Here: when, how many, what is kept between steps, and the events
of the trainers. Not here: what moving a mask does to a model and an optimizer
(`Attachment.reselect_`), which entries go (`sparseft.training.drop_and_grow`), gradients outside of
a mask (`sparseft.modules.gradient_scores`).
"""

from __future__ import annotations

import json
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from sparseft._text import did_you_mean
from sparseft.attachment import Attachment
from sparseft.diff import SparsePattern
from sparseft.errors import AttachError, MaskError, ResumeError
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.ranks import processes
from sparseft.modules.riders import board, leave
from sparseft.modules.transplant import check_optimizer
from sparseft.training.candidates import Window
from sparseft.training.drop_and_grow import (
    DROP,
    RATES,
    Found,
    candidate_counts,
    drop_and_grow,
)

__all__ = ["Reselection"]

logger = logging.getLogger(__name__)

_FORMAT = 1


class Reselection:
    """Moves the masks of an attachment while it trains.

    A callback: ``trainer.add_callback(Reselection(attachment, steps=...))`` for `LoopTrainer` and
    ``transformers.Trainer``. In a loop of your own, call `step` right before ``optimizer.step()``.

    Over the last ``accumulate`` steps before a round, gradients of candidates are summed: the first
    of these steps (its first micro-batch) names the candidates, the largest gradients outside of
    the mask, the others add theirs at the same places. In the round, between the last backward and
    its optimizer step, the least useful entries go back to their base and as many candidates with
    the largest sums take their place, from any start mask. An entry just dropped is no candidate:
    it was in the mask while candidates were named.

    Args:
        attachment: whose masks move; a leaf that does not require grad keeps its mask.
        every: steps between rounds.
        accumulate: steps whose gradients are summed before a round, at most ``every``.
        rate: share of the entries that move in a round, at first; below 1.
        schedule: how the rate falls to 0 at ``stop``: "linear", "cosine", or "constant" (it stays).
        steps: optimizer steps of the run; a transformers Trainer says it itself.
        stop: no round from this step on; default ``steps``.
        scope: "tensor": each tensor keeps its count; "global": all compete, the total is kept (not
            with several processes, whose buckets have the leaves' sizes).
        drop: "diff" drops the smallest ``|diff|`` (SpIEL), "weight" the smallest ``|base + diff|``.
        candidates: candidates of a tensor, as a multiple of the entries that it may grow.
        group: process group whose gradients are summed; default the world, where there is one.

    Raises:
        ValueError: an option of another type, or out of range.
        AttachError: masks that were detached; scope "global" with several processes; another
            Reselection on the model.

    Numerics: exactly as many entries are grown as dropped; ties go to the lower flat index. Grown
        entries start at diff 0 with zero moments, while AdamW's step count stays the tensor's:
        with betas (0.9, 0.999) their first steps are 3 to 6.5 times lr long where the gradient
        keeps its sign, as RigL's are. Ranks agree bit for bit. A resumed run equals the
        uninterrupted one: patterns, sums and the step are in ``model.state_dict()`` (checkpoints of
        both trainers hold them), and in `state_dict`. With loss scaling, a step whose gradients
        overflow inside a window skips that round.

    Memory: no dense gradient. A candidate takes 8 bytes between the steps of a window (int32 index,
    fp32 sum), 4 more during a step, up to 32 while those of one tensor are named; nothing is kept
    outside of windows. A step of a window takes the tile of `GradientScores`, a round 4 bytes for
    each entry of one mask (scope "global": of all).

    Example:
        >>> import torch, sparseft
        >>> model = torch.nn.Linear(8, 4)
        >>> sparse = sparseft.attach(model, {"weight": torch.eye(4, 8) > 0})
        >>> optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        >>> moving = Reselection(sparse, every=2, accumulate=1, rate=0.5, steps=8)
        >>> for _ in range(8):
        ...     model(torch.randn(3, 8)).pow(2).sum().backward()
        ...     moving.step(optimizer)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> moving.rounds, sparse.nnz
        (2, 4)

    Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models" (SpIEL), 2024,
    arXiv 2401.16405; Evci et al., "Rigging the Lottery" (RigL), ICML 2020, arXiv 1911.11134.
    """

    def __init__(
        self,
        attachment: Attachment,
        *,
        every: int = 20,
        accumulate: int = 5,
        rate: float = 0.2,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        steps: int | None = None,
        stop: int | None = None,
        scope: Literal["tensor", "global"] = "tensor",
        drop: Literal["diff", "weight"] = "diff",
        candidates: float = 4.0,
        group: Any = None,
    ) -> None:
        if not isinstance(attachment, Attachment):
            raise AttachError(
                f"a Reselection moves the masks of an Attachment, got {type(attachment).__name__}. "
                "In lottery_ticket, only the sparse phase has one: phase.attachment."
            )
        attachment._check_active("Reselection")
        every, accumulate = _integer("every", every), _integer("accumulate", accumulate)
        steps = None if steps is None else _integer("steps", steps)
        stop = None if stop is None else _integer("stop", stop, low=0)
        rate, candidates = _number("rate", rate), _number("candidates", candidates)
        if accumulate > every:
            raise ValueError(
                f"accumulate={accumulate} steps do not fit between rounds {every} steps apart."
            )
        if not 0.0 < rate < 1.0:
            raise ValueError(f"rate={rate}; it should be above 0 and below 1.")
        if not 1.0 <= candidates < math.inf:
            raise ValueError(f"candidates={candidates}; it should be at least 1, and finite.")
        for name, choice, known in (
            ("schedule", schedule, list(RATES)),
            ("scope", scope, ["tensor", "global"]),
            ("drop", drop, list(DROP)),
        ):
            if choice not in known:
                raise ValueError(
                    f"{name}={choice!r} is not one of {', '.join(known)}."
                    f"{did_you_mean(str(choice), known)}"
                )
        self.attachment = attachment
        self.every, self.accumulate, self.rate, self.schedule = every, accumulate, rate, schedule
        self.steps, self.stop, self.scope, self.drop = steps, stop, scope, drop
        self.candidates, self.group = candidates, group
        self.rounds = 0
        self.moved = 0
        self._done = 0  # optimizer steps begun
        self._window = Window(attachment.model, group)
        self._optimizer: Callable[[], Any] = lambda: None
        self._given = self._settings()
        self._check_scope()
        board(attachment.model, self)
        attachment._at_detach.append(self.close)
        self._open_window()

    def _settings(self) -> dict[str, Any]:
        names = (
            "every", "accumulate", "rate", "schedule", "steps", "stop", "scope", "drop",
            "candidates",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def _check_scope(self) -> None:
        if self.scope == "global" and processes(self.group) > 1:
            raise AttachError(
                f"scope='global' changes the sizes of leaves, but {processes(self.group)} "
                "processes train together and DistributedDataParallel has buckets for those sizes. "
                "Use scope='tensor'."
            )

    def _masks(self) -> dict[str, MaskedParameter]:
        """Return what moves: a mask whose leaf is frozen stays."""
        masked = self.attachment._masked
        return {n: m for n, m in masked.items() if m.leaf.requires_grad}

    # -- when ---

    def _end(self) -> int | None:
        return self.steps if self.stop is None else self.stop

    def _next_round(self) -> int:
        """Return after how many steps the next round is."""
        return (self._done // self.every + 1) * self.every

    def _rate_at(self, step: int) -> float:
        """Return the share that moves in a round after ``step`` steps; 0 where there is none."""
        end = self._end()
        if end is None:  # not told yet, or never: a constant rate needs no end
            return self.rate if self.schedule == "constant" else 0.0
        return self.rate * RATES[self.schedule](step / end) if step < end else 0.0

    def step(self, optimizer: Any) -> None:
        """Count a step and, where one is due, move the masks.

        Call after each backward (the last one, where gradients are accumulated) and clipping,
        right before ``optimizer.step()``.

        Args:
            optimizer: the one that trains the leaves; an accelerate-prepared one will do.

        Raises:
            ValueError: ``steps`` is not known, and the schedule needs it.
            AttachError: no optimizer, and as `Attachment.reselect_`.
        """
        if self._end() is None and self.schedule != "constant":
            raise ValueError(
                f"Reselection(schedule={self.schedule!r}) falls to 0 over the run, whose length "
                "this trainer does not say: pass steps=."
            )
        check_optimizer(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._window.count()
        self._done += 1
        if self._done % self.every == 0 and self._window.found:
            self._round(optimizer)
        self._open_window()

    def _open_window(self) -> None:
        """Look at the gradients of the coming step, if it is in the window of a round."""
        at = self._next_round()
        rate = self._rate_at(at)
        first = at - self.accumulate
        if self._done < first or not rate:
            return
        patterns = {n: m.pattern for n, m in self._masks().items()}
        counts = None
        if self._done == first:
            counts = candidate_counts(patterns, rate, self.scope, self.candidates)
        self._window.open(patterns, counts)

    # -- the round ---

    @torch.no_grad()
    def _round(self, optimizer: Any) -> None:
        masks = self._masks()
        found = {n: f for n, f in self._window.take().items() if n in masks}
        if not all(bool(torch.isfinite(f.scores).all()) for f in found.values()):
            logger.warning(
                "step %d: gradients of candidates are NaN or infinite (a loss scale that was too "
                "large?); the masks stay until the next round.", self._done
            )  # fmt: skip
            return
        rate = self._rate_at(self._done)
        new = drop_and_grow(masks, found, rate=rate, scope=self.scope, drop=self.drop)
        moved = self.attachment.reselect_(new, optimizer=optimizer)
        self.rounds += 1
        self.moved += moved
        logger.info("step %d: %d of %d entries moved", self._done, moved, self.attachment.nnz)

    # -- going on later ---

    def state_dict(self) -> dict[str, Any]:
        """Return patterns, sums, counters and options: tensors and plain containers, not copied."""
        return {
            "format": _FORMAT,
            "step": self._done,
            "rounds": self.rounds,
            "moved": self.moved,
            "settings": dict(self._given),
            "indices": {n: p.indices for n, p in self.attachment.patterns.items()},
            "candidates": {n: f.indices for n, f in self._window.found.items()},
            "scores": {n: f.scores for n, f in self._window.found.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave: the masks move there at once.

        Load it before the model's state dict and the optimizer's; a model's own state dict has
        done it already. Entries of both the present and the loaded mask keep their diffs meanwhile.

        Raises:
            ResumeError: no state, a damaged one, or one of another format, of other options or of
                other masked parameters.
            MaskError: indices that are no pattern.
        """
        _check_state(state)
        masks = self.attachment.patterns
        settings = state["settings"]
        odd = [k for k in self._given if settings.get(k) != self._given[k]]
        if odd:
            raise ResumeError(
                f"the run began with Reselection({odd[0]}={settings.get(odd[0])!r}), this one has "
                f"{self._given[odd[0]]!r}. Use the options that it began with."
            )
        if set(state["indices"]) != set(masks) or not set(state["candidates"]) <= set(masks):
            given = set(state["indices"]), set(state["candidates"])
            odd = sorted((given[0] ^ set(masks)) | (given[1] - set(masks)))
            raise ResumeError(
                f"the Reselection's state and the model mask other parameters; {len(odd)} differ, "
                f"first {odd[0]!r}. Attach the masks that the run began with."
            )
        new = {n: _pattern(state["indices"][n], n, masks[n]) for n in masks}
        found = {}
        for name, indices in state["candidates"].items():
            pattern, scores = _pattern(indices, name, masks[name]), state["scores"].get(name)
            if scores is None or scores.shape != indices.shape:
                raise ResumeError(f"candidates of {name!r} lack scores; the state is damaged.")
            found[name] = Found(pattern.indices, scores.to(masks[name].device, copy=True))
        optimizer = self._optimizer()
        self.attachment.reselect_(new, optimizer=optimizer)
        self._window.close()
        self._done, self.rounds, self.moved = state["step"], state["rounds"], state["moved"]
        self._window.found = found
        self._open_window()

    def tensors(self) -> dict[str, Tensor]:
        """Return `state_dict` as tensors alone, for the model's state dict."""
        state = self.state_dict()
        plain = {k: v for k, v in state.items() if not isinstance(v, dict) or k == "settings"}
        text = json.dumps(plain, sort_keys=True).encode()
        out = {"state": torch.tensor(list(text), dtype=torch.uint8)}
        for name, pattern in self.attachment.patterns.items():
            out[f"indices.{name}"] = pattern.indices
            # Always the same keys: empty between windows. No views: safetensors refuses those.
            none = Found(
                pattern.indices.new_empty(0), pattern.indices.new_empty(0, dtype=torch.float32)
            )
            for part, tensor in self._window.found.get(name, none)._asdict().items():
                out[f"{part if part == 'scores' else 'candidates'}.{name}"] = tensor
        return out

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        try:
            state = json.loads(bytes(tensors["state"].tolist()))
        except (KeyError, TypeError, ValueError, RecursionError):
            state = None
        if not isinstance(state, dict):
            raise ResumeError("the Reselection's part of the model's state dict is damaged.")
        for part in ("indices", "candidates", "scores"):
            state[part] = {
                key.removeprefix(f"{part}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{part}.") and (part == "indices" or tensor.numel())
            }
        self.load_state_dict(state)

    def close(self) -> None:
        """End the looking and the riding; `Attachment.detach` does it, too."""
        self._window.close()
        self._window.found = {}
        leave(self.attachment.model, self)

    def __getstate__(self) -> dict[str, Any]:
        # For deepcopy and pickle of an attached model: hooks and the optimizer belong to this one.
        return {**self.__dict__, "_optimizer": None, "group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._optimizer = lambda: None

    # -- events of trainers ---

    def on_pre_optimizer_step(
        self,
        args: Any = None,
        state: Any = None,
        control: Any = None,
        *,
        optimizer: Any,
        step: int | None = None,
        **others: Any,
    ) -> None:
        """`LoopTrainer`'s and transformers' event of this name."""
        if state is not None:
            step = state.global_step
        if step is not None and step != self._done:
            raise ResumeError(
                f"the trainer is at step {step}, its Reselection at {self._done}: it was resumed "
                "from a checkpoint without this Reselection, or trains a second time. Make a new "
                "one for each run, before train() is called."
            )
        self.step(optimizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Transformers' event: tells the length of the run."""
        if self.steps is None:
            self.steps = state.max_steps
            self._window.close()
            self._open_window()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Transformers' event."""
        self._window.close()

    def __getattr__(self, name: str) -> Any:
        # Every other event of a transformers callback, whichever a version has.
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _integer(name: str, value: Any, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}.")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    return float(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(t, Tensor) for t in value.values())


# What a state holds: a test of each part, and what was wanted.
_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "settings": (lambda value: isinstance(value, Mapping), "a mapping"),
    **dict.fromkeys(("step", "rounds", "moved"), (_is_count, "an int of 0 or more")),
    **dict.fromkeys(("indices", "candidates", "scores"), (_has_tensors, "a mapping to tensors")),
}


def _check_state(state: Any) -> None:
    """Raise ResumeError for what `Reselection.state_dict` cannot have given."""
    if not isinstance(state, Mapping):
        raise ResumeError(
            f"a Reselection's state is a {type(state).__name__}, wanted what its state_dict() gave."
        )
    if state.get("format") != _FORMAT:
        raise ResumeError(
            f"a Reselection's state of format {state.get('format')!r} cannot be loaded, wanted "
            f"{_FORMAT}."
        )
    for part, (fits, wanted) in _PARTS.items():
        if part not in state:
            got = "is missing"
        elif fits(state[part]):
            continue
        else:
            got = f"is {state[part]!r:.40}, wanted {wanted}"
        raise ResumeError(
            f"the Reselection's state is damaged: {part!r} {got}. Load what state_dict() "
            "gave, whole."
        )


def _pattern(indices: Tensor, name: str, now: SparsePattern) -> SparsePattern:
    try:
        return SparsePattern.from_indices(indices.to(now.device), now.shape)
    except MaskError as bad:
        raise MaskError(f"Reselection's state of {name!r}: {bad}") from None
