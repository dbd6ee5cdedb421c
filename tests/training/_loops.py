"""Four loops over one small run, killed and resumed as their users would, and what they leave."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from sparseft import Reselection, SparseAdamW, attach, select

STEPS, ACCUMULATE, BATCH = 12, 2, 4
PER_EPOCH = 5  # steps: 40 rows, and every checkpoint below lies inside of an epoch

OPTIMIZERS = {
    "sparse": lambda p: SparseAdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "moments_8": lambda p: SparseAdamW(p, lr=1e-2, moment_bits=8),
    "stochastic": lambda p: SparseAdamW(p, lr=1e-2, stochastic_rounding=True),  # on bf16 weights
}


class Stop(Exception):
    """A crash."""


def build(
    tiny: Any, kind: str = "sparse", *, compact: bool = False, moving: bool = False
) -> SimpleNamespace:
    """Return a classifier with dropout, its masks (everywhere but in the head) and optimizer."""
    model = tiny.tiny_classifier()
    model.accepts_loss_kwargs = False  # its loss is a mean, see test_accumulation.py
    if kind == "stochastic":
        model.bfloat16()
    masks = select(model, "random", nnz=1000, exclude=["classifier.*"])
    sparse = attach(model, masks, full_params=["classifier.*"], compact_state_dict=compact)
    run = SimpleNamespace(model=model, sparse=sparse, kind=kind, start=masks, moving=None)
    run.optimizer = OPTIMIZERS[kind](sparse.parameters())
    run.schedule = cosine(run.optimizer)
    if moving:  # rounds after 4 and 8 steps
        run.moving = Reselection(sparse, every=4, accumulate=2, rate=0.4, steps=STEPS)
    return run


def cosine(optimizer: Any) -> Any:
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, 3, STEPS)


def everything(run: SimpleNamespace) -> dict[str, Any]:
    """Return copies of all that a run leaves, and a digest of its adapter."""
    optimizer = run.optimizer.state_dict()
    for group in optimizer["param_groups"]:
        group.pop("differentiable", None)  # torch adds it, False, with the second load
    return {
        "weights": {n: p.detach().clone() for n, p in run.model.named_parameters()},
        "leaves": {n: p.detach().clone() for n, p in run.sparse.leaves.items()},
        "masks": {n: p.indices.clone() for n, p in run.sparse.patterns.items()},
        "optimizer": optimizer,
        "schedule": run.schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "digest": run.sparse.adapter().digest,
    }


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Return where two nested states differ first, by a bit or a key; None: nowhere."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else where
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            return f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"
        pairs = [(key, a[key], b[key]) for key in a]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)}"
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else f"{where}: {a} and {b}"
    found = (difference(x, y, f"{where}/{key}") for key, x, y in pairs)
    return next((text for text in found if text), None)


def rows_of(tiny: Any) -> Any:
    return tiny.Rows(n=PER_EPOCH * ACCUMULATE * BATCH)


# -- plain ---


def plain(
    tiny: Any, run: SimpleNamespace, file: Path, *, save_at: int = 0, stop: Any = None,
    resume: bool = False, leave_out: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Train; a checkpoint after ``save_at`` steps, a crash in the step after ``stop``."""
    torch.manual_seed(99 if resume else 1)
    parts = {"model": run.model, "optimizer": run.optimizer, "schedule": run.schedule}
    done = 0
    if resume:
        content = torch.load(file, weights_only=True)
        done = content["done"]
        for name, part in parts.items():
            if name != leave_out:
                strict = {"strict": False} if name == "model" else {}
                part.load_state_dict(content[name], **strict)
        if leave_out != "rng":
            torch.set_rng_state(content["rng"])
    run.model.train()
    micro = 0
    for epoch in itertools.count():
        order = torch.Generator().manual_seed(epoch)
        batches = DataLoader(
            rows_of(tiny), BATCH, shuffle=True, generator=order, collate_fn=tiny.collate
        )
        for batch in batches:
            micro += 1
            if micro <= done * ACCUMULATE:
                continue
            (run.model(**batch).loss / ACCUMULATE).backward()
            if micro % ACCUMULATE:
                if done == stop:
                    raise Stop
                continue
            torch.nn.utils.clip_grad_norm_(run.sparse.parameters(), 1.0)
            if run.moving is not None:
                run.moving.step(run.optimizer)
            run.optimizer.step()
            run.schedule.step()
            run.optimizer.zero_grad()
            done += 1
            if done == save_at:
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"done": done, "rng": torch.get_rng_state(), **states}, file)
            if done == STEPS:
                return everything(run)


# -- accelerate ---


def accelerated(
    tiny: Any, run: SimpleNamespace, folder: Path, *, save_at: int = 0, stop: Any = None,
    resume: bool = False, safetensors: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The same with `Accelerator.save_state`, `load_state` and `skip_first_batches`."""
    from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(99 if resume else 1)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=ACCUMULATE,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5),
    )  # fmt: skip
    own = torch.Generator()
    batches = DataLoader(rows_of(tiny), BATCH, shuffle=True, generator=own, collate_fn=tiny.collate)
    model, optimizer, schedule, batches = accelerator.prepare(
        run.model, run.optimizer, run.schedule, batches
    )
    done = 0
    if resume:
        accelerator.load_state(str(folder), strict=not run.sparse.compact_state_dict)
        done = int((folder / "done").read_text())
    model.train()
    for epoch in itertools.count(done // PER_EPOCH):
        batches.set_epoch(epoch)
        skip = (done - epoch * PER_EPOCH) * ACCUMULATE
        for batch in skip_first_batches(batches, skip) if skip else batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.sparse.parameters(), 1.0)
                    if run.moving is not None:
                        run.moving.step(optimizer)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                if done == stop:
                    raise Stop
                continue
            done += 1
            if done == save_at:
                accelerator.save_state(str(folder), safe_serialization=safetensors)
                (folder / "done").write_text(str(done))
            if done == STEPS:
                return everything(run)


# -- transformers ---


def trainer_of(
    tiny: Any, run: SimpleNamespace, folder: Path, *, stop: Any = None, own: bool = False,
    scores: Any = None, callbacks: Any = (), **changes: Any,
) -> Any:  # fmt: skip
    """Return a stock Trainer; with its ``own`` optimizer and schedule, or those of the run.

    With ``scores`` (step -> score) it evaluates every second step and ends with the best model.
    """
    import transformers

    class Crash(transformers.TrainerCallback):
        """Between the micro-batches of the step after ``stop``."""

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == stop:
                raise Stop

    options = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2,
        "gradient_accumulation_steps": ACCUMULATE, "weight_decay": 0.1, "warmup_steps": 3,
        "lr_scheduler_type": "cosine", "save_steps": 2, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    more = {} if own else {"optimizers": (run.optimizer, run.schedule)}
    if scores is not None:
        options |= {
            "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
            "metric_for_best_model": "score", "restore_callback_states_from_checkpoint": True,
        }  # fmt: skip
        more["eval_dataset"] = tiny.Rows(n=4, seed=1)
        more["compute_metrics"] = lambda _: {"score": scores[trainer.state.global_step]}
    trainer = transformers.Trainer(
        model=run.model,
        args=transformers.TrainingArguments(output_dir=str(folder), **{**options, **changes}),
        train_dataset=rows_of(tiny),
        data_collator=tiny.collate,
        callbacks=[Crash(), *callbacks],
        **more,
    )
    if run.moving is not None:
        trainer.add_callback(run.moving)
    return trainer


def left_by(trainer: Any, run: SimpleNamespace) -> dict[str, Any]:
    """Return `everything` with the trainer's optimizer and schedule, and the losses it logged."""
    run.optimizer, run.schedule = bare(trainer.optimizer), trainer.lr_scheduler
    logged = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    return {**everything(run), "logged": logged}


def bare(optimizer: Any) -> Any:
    """Return what accelerate wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def base_of(tiny: Any, kind: str) -> dict[str, torch.Tensor]:
    """Return the parameters of the model that `build` puts masks on."""
    return dict(build(tiny, kind).sparse.detach().named_parameters())


def restored(run: SimpleNamespace, base: Mapping[str, torch.Tensor]) -> bool:
    """Detach and tell whether the base is back, bit for bit."""
    model: nn.Module = run.sparse.detach()
    return all(torch.equal(p, base[n]) for n, p in model.named_parameters())
