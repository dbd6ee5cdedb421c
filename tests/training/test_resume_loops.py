"""Killed within an epoch and resumed, every loop ends in the bits of the run that nothing stopped.

Dropout, shuffling, accumulation, clipping, warm-up and a cosine are on. Compared are weights,
leaves, masks, optimizer state, schedule, random state and the adapter's digest.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sparseft import Adapter, SparseCallback
from sparseft.errors import BaseMismatchError
from sparseft.training import LoopTrainer

pytest.importorskip("transformers", reason="transformers is not installed")

_spec = importlib.util.spec_from_file_location("_loops", Path(__file__).with_name("_loops.py"))
loops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loops)

SLOW = pytest.mark.slow


def some(*quick):
    """Every optimizer; all but a few in the slow lane."""
    return [pytest.param(k, marks=() if k in quick else SLOW) for k in loops.OPTIMIZERS]


def both(*quick):
    """Every optimizer with complete and with compact checkpoints, the same way."""
    return [
        pytest.param(kind, compact, id=case, marks=() if case in quick else SLOW)
        for compact, word in ((False, "complete"), (True, "compact"))
        for kind in loops.OPTIMIZERS
        for case in [f"{kind}-{word}"]
    ]


def moved(run):
    return any(not p.equals(run.start[n]) for n, p in run.sparse.patterns.items())


@pytest.mark.parametrize(("kind", "compact"), both("stochastic-compact"))
def test_a_plain_loop(kind, compact, tiny, tmp_path):
    def build():
        return loops.build(tiny, kind, compact=compact)

    file = tmp_path / "checkpoint.pt"
    whole = loops.plain(tiny, build(), file)
    with pytest.raises(loops.Stop):
        loops.plain(tiny, build(), file, save_at=7, stop=8)
    run = build()
    again = loops.plain(tiny, run, file, resume=True)
    assert loops.difference(again, whole) is None
    assert loops.restored(run, loops.base_of(tiny, kind))


@pytest.mark.parametrize(
    "forgotten",
    ["rng", *(pytest.param(part, marks=SLOW) for part in ("schedule", "optimizer", "model"))],
)
def test_each_part_of_a_checkpoint_matters(forgotten, tiny, tmp_path):
    """What the comparison would not notice could be missing in the tests around."""
    file = tmp_path / "checkpoint.pt"
    whole = loops.plain(tiny, loops.build(tiny), file, save_at=7)
    again = loops.plain(tiny, loops.build(tiny), file, resume=True, leave_out=forgotten)
    assert loops.difference(again["weights"], whole["weights"]) is not None


@pytest.mark.parametrize(("kind", "compact"), both("fused-compact"))
def test_an_accelerate_loop(kind, compact, tiny, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    def build():
        return loops.build(tiny, kind, compact=compact)

    whole = loops.accelerated(tiny, build(), tmp_path)
    with pytest.raises(loops.Stop):
        loops.accelerated(tiny, build(), tmp_path, save_at=7, stop=8)
    run = build()
    again = loops.accelerated(tiny, run, tmp_path, resume=True)
    assert loops.difference(again, whole) is None
    assert loops.restored(run, loops.base_of(tiny, kind))


@SLOW
def test_an_accelerate_loop_without_safetensors(tiny, tmp_path):
    whole = loops.accelerated(tiny, loops.build(tiny), tmp_path, save_at=7, safetensors=False)
    assert (tmp_path / "pytorch_model.bin").is_file()
    again = loops.accelerated(tiny, loops.build(tiny), tmp_path, resume=True)
    assert loops.difference(again, whole) is None


@pytest.mark.parametrize("at", [pytest.param(3, marks=SLOW), 7])
@pytest.mark.parametrize("loop", ["plain", pytest.param("accelerated", marks=SLOW)])
def test_masks_that_move_between_save_and_resume(loop, at, tiny, tmp_path):
    """Rounds after 4 and 8 steps: saved at 7, between them, the masks are not those to begin with.
    Saved at 3, in the window of the first, the resumed run makes both."""
    drive, place = getattr(loops, loop), tmp_path / "checkpoint"
    finished = loops.build(tiny, moving=True)
    whole = drive(tiny, finished, place, save_at=at)
    assert finished.moving.rounds == 2
    assert moved(finished)
    run = loops.build(tiny, moving=True)
    assert loops.difference(drive(tiny, run, place, resume=True), whole) is None
    assert run.moving.rounds == 2


@pytest.mark.parametrize(
    ("kind", "own", "compact"),
    [
        pytest.param("fused", "bf16", False, id="stock-bf16-complete", marks=SLOW),
        pytest.param("fused", True, False, id="stock-complete", marks=SLOW),
        pytest.param("moments_8", False, True, id="moments_8-compact"),
        pytest.param("sparse", False, False, id="sparse-complete", marks=SLOW),
        pytest.param("sparse", False, True, id="sparse-compact", marks=SLOW),
        pytest.param("fused", True, True, id="stock-compact", marks=SLOW),
        pytest.param("moments_8", False, False, id="moments_8-complete", marks=SLOW),
        pytest.param("stochastic", False, False, id="stochastic-complete", marks=SLOW),
        pytest.param("stochastic", False, True, id="stochastic-compact", marks=SLOW),
    ],
)
def test_a_stock_trainer(kind, own, compact, tiny, tmp_path):
    """Killed in step 9, between micro-batches; compact checkpoints as the callback makes them."""

    def build(folder, **options):
        run = loops.build(tiny, kind)
        options["bf16"] = own == "bf16"
        trainer = loops.trainer_of(tiny, run, tmp_path / folder, own=bool(own), **options)
        SparseCallback(run.sparse, compact=compact).add_to(trainer)
        return run, trainer

    run, trainer = build("whole", save_strategy="no")
    trainer.train()
    whole = loops.left_by(trainer, run)
    with pytest.raises(loops.Stop):
        build("killed", stop=8, save_total_limit=1)[1].train()
    checkpoints = sorted(p.name for p in (tmp_path / "killed").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-8"]
    size = (tmp_path / "killed/checkpoint-8/model.safetensors").stat().st_size
    assert (size < 20_000) == compact
    run, trainer = build("killed")
    assert not trainer.args.ignore_data_skip, "the default"
    trainer.train(resume_from_checkpoint=True)
    assert loops.difference(loops.left_by(trainer, run), whole) is None
    adapter = Adapter.load(tmp_path / "killed" / "adapter")
    assert adapter.digest == whole["digest"] == Adapter.load(tmp_path / "whole/adapter").digest
    assert loops.restored(run, loops.base_of(tiny, kind))


@pytest.mark.parametrize("kind", some("stochastic"))
def test_the_loop_trainer(kind, tiny, tmp_path):
    """Its checkpoints hold what trains; after stochastic rounding also what weights it made."""

    def build(folder):
        run = loops.build(tiny, kind)
        trainer = LoopTrainer(
            run.model, loops.rows_of(tiny), output_dir=tmp_path / folder, steps=loops.STEPS,
            batch_size=loops.BATCH, accumulate=loops.ACCUMULATE, collate=tiny.collate,
            optimizer=loops.OPTIMIZERS[kind], schedule="cosine", warmup_steps=3, save_every=7,
            keep_checkpoints=9,
        )  # fmt: skip
        return run, trainer

    run, trainer = build("whole")
    trainer.train()
    whole = loops.everything(run)
    again, trainer = build("again")
    trainer.train(resume_from_checkpoint=next((tmp_path / "whole").glob("*7.pt")))
    for key in ("weights", "leaves", "rng", "digest"):
        assert loops.difference(loops.everything(again)[key], whole[key]) is None
    assert loops.restored(again, loops.base_of(tiny, kind))


def test_rounded_entries_of_another_run_are_refused(tiny):
    run = loops.build(tiny, "stochastic", compact=True)
    run.model(**tiny.collate([loops.rows_of(tiny)[0]])).loss.backward()
    run.optimizer.param_groups[0]["lr"] = 1e-2
    run.optimizer.step()
    state = run.model.state_dict()
    key = "bert.pooler.dense.diff_weight_rounded"
    assert state[key].dtype == torch.bfloat16
    fresh = loops.build(tiny, "stochastic", compact=True)
    state[key] = state[key] + 1
    with pytest.raises(BaseMismatchError, match=r"rounded entries of 'bert\.pooler"):
        fresh.model.load_state_dict(state, strict=False)
