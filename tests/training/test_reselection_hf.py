"""Reselection in a stock transformers Trainer, and inside `lottery_ticket`."""

from __future__ import annotations

import pytest
import torch

from sparseft import attach, select
from sparseft.training import LoopTrainer, Reselection, lottery_ticket

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SLOW = pytest.mark.slow


def trainer_of(model, rows, folder, **changes):
    options = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 1,
        "save_strategy": "steps", "logging_steps": 100, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    args = transformers.TrainingArguments(output_dir=str(folder), **{**options, **changes})
    return transformers.Trainer(model=model, args=args, train_dataset=rows)


@pytest.mark.parametrize(
    "compact", [pytest.param(False, id="complete"), pytest.param(True, id="compact", marks=SLOW)]
)
def test_a_stock_trainer_moves_masks_and_resumes_bit_for_bit(compact, tiny, rows, tmp_path):
    """Rounds after 3 and 6 steps, windows of 2; resumed in a window and right after a round."""

    def build(folder, **changes):
        model = tiny.tiny_classifier()
        masks = select(model, method="random", nnz=2000, exclude=["*LayerNorm*", "classifier.*"])
        sparse = attach(model, masks, full_params=["classifier.*"], compact_state_dict=compact)
        trainer = trainer_of(model, rows, folder, **changes)
        moving = Reselection(sparse, every=3, accumulate=2, rate=0.4)
        trainer.add_callback(moving)
        return model, masks, sparse, trainer, moving

    base = tiny.bits(tiny.tiny_classifier())
    model, masks, sparse, trainer, moving = build(tmp_path / "whole")
    trainer.train()
    assert moving.rounds == 2
    assert moving.steps == 8
    assert sparse.nnz == 2000
    adapter = sparse.adapter()
    assert all(d.pattern.equals(sparse.patterns[n]) for n, d in adapter.diffs.items())
    assert any(not p.equals(masks[n]) for n, p in sparse.patterns.items())
    for at in (2, 3):
        _, _, again, trainer, _ = build(tmp_path / f"again-{at}", save_strategy="no")
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
        assert again.adapter().digest == adapter.digest
    sparse.detach()
    assert tiny.same_bits(tiny.bits(model), base)
    assert type(model.bert.embeddings.word_embeddings) is torch.nn.Embedding


def test_a_lottery_ticket_whose_sparse_phase_moves_its_masks(tiny, rows, tmp_path):
    """Killed in the sparse phase, the same call goes on to the same adapter."""

    class Stop(Exception):
        pass

    def factory(crash_at=None):
        def make_trainer(model, phase):
            trainer = LoopTrainer(
                model, rows, output_dir=phase.output_dir, seed=phase.seed, steps=8, batch_size=8,
                lr=1e-2, collate=tiny.collate, save_every=1,
            )  # fmt: skip
            if phase.name == "sparse":
                trainer.add_callback(
                    Reselection(phase.attachment, steps=8, every=3, accumulate=2, rate=0.4)
                )

            class Crash:
                def on_pre_optimizer_step(self, *, step, model, optimizer):
                    if phase.name == "sparse" and step == crash_at:
                        raise Stop

            trainer.add_callback(Crash())
            return trainer

        return make_trainer

    def run(folder, crash_at=None):
        return lottery_ticket(
            factory(crash_at), tiny.plain_classifier(), nnz=300, output_dir=folder,
            full_params=("classifier.*",), exclude=("norm.*",), l1=(0.0, 0.1),
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    assert whole.adapter.nnz == 300
    final = {n: d.pattern for n, d in whole.adapter.diffs.items()}
    assert any(not p.equals(whole.masks[n]) for n, p in final.items()), "masks moved"
    with pytest.raises(Stop):
        run(tmp_path / "killed", crash_at=5)
    assert run(tmp_path / "killed").adapter.digest == whole.adapter.digest
