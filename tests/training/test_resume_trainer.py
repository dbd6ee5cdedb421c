"""A stock Trainer's best model and early stopping, with masks that stay or move, also resumed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sparseft import Adapter, SparseCallback

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_spec = importlib.util.spec_from_file_location("_loops", Path(__file__).with_name("_loops.py"))
loops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loops)

SLOW = pytest.mark.slow
BEST, LAST = 6, 10  # the best step, and that at which a patience of 2 evaluations ends
SCORES = {2: 0.1, 4: 0.3, BEST: 0.5, 8: 0.4, LAST: 0.5}


class Keep(transformers.TrainerCallback):
    """Keeps what the run is after the best step."""

    def __init__(self, run):
        self.run, self.kept = run, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == BEST:
            self.kept = loops.everything(self.run)


def best_of(state):
    """What loading the best model brings back: not the optimizer, not the schedule."""
    return {key: state[key] for key in ("weights", "leaves", "masks", "digest")}


@pytest.mark.parametrize(
    ("kind", "compact", "moving"),
    [
        pytest.param("sparse", False, False, id="complete", marks=SLOW),
        pytest.param("sparse", True, True, id="compact-moving"),
        pytest.param("sparse", False, True, id="complete-moving", marks=SLOW),
        pytest.param("sparse", True, False, id="compact", marks=SLOW),
        pytest.param("fused", True, False, id="fused-compact", marks=SLOW),
        pytest.param("moments_8", True, True, id="moments_8-compact-moving", marks=SLOW),
        pytest.param("stochastic", True, True, id="stochastic-compact-moving", marks=SLOW),
        pytest.param("stochastic", False, False, id="stochastic-complete", marks=SLOW),
    ],
)
def test_early_stopping_ends_with_the_best_model(kind, compact, moving, tiny, tmp_path):
    """Also killed after the best step and resumed. Masks move after 4 steps and after 8."""

    def build(folder, **options):
        run = loops.build(tiny, kind, moving=moving)
        keep = Keep(run)
        stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
        trainer = loops.trainer_of(
            tiny, run, tmp_path / folder, scores=SCORES, callbacks=[keep, stopping], **options
        )
        SparseCallback(compact=compact).add_to(trainer)
        return run, keep, trainer

    run, keep, trainer = build("whole", save_total_limit=1)
    trainer.train()
    assert trainer.state.global_step == LAST < trainer.state.max_steps
    assert loops.difference(best_of(loops.everything(run)), best_of(keep.kept)) is None
    digest = keep.kept["digest"]
    assert Adapter.load(tmp_path / "whole/adapter").digest == digest
    checkpoint = tmp_path / "whole" / f"checkpoint-{BEST}"
    assert Adapter.load(checkpoint / "adapter").digest == digest
    if moving:
        first = {n: p.indices for n, p in run.start.items()}
        assert loops.difference(keep.kept["masks"], first) is not None
    with pytest.raises(loops.Stop):
        build("killed", stop=8)[2].train()
    run, _, trainer = build("killed")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == LAST, "patience is counted on from the checkpoint"
    assert loops.difference(best_of(loops.everything(run)), best_of(keep.kept)) is None
    assert Adapter.load(tmp_path / "killed/adapter").digest == digest
    assert loops.restored(run, loops.base_of(tiny, kind))


@SLOW
def test_skipping_no_data_on_resume_is_another_run(tiny, tmp_path):
    """The data order is part of what is compared: with ignore_data_skip the bits are others."""
    run = loops.build(tiny)
    trainer = loops.trainer_of(tiny, run, tmp_path)
    trainer.train()
    whole = loops.left_by(trainer, run)
    run = loops.build(tiny)
    trainer = loops.trainer_of(tiny, run, tmp_path / "again", ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert loops.difference(loops.left_by(trainer, run)["weights"], whole["weights"]) is not None
