"""A LightningModule killed within an epoch and resumed, with each optimizer; its import is slow.

docs/examples/lightning_loop.py is the quick twin: a resumable loader, and random numbers in the
checkpoint.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

pytestmark = pytest.mark.slow

_spec = importlib.util.spec_from_file_location("_loops", Path(__file__).with_name("_loops.py"))
loops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loops)


class Batches(DataLoader):
    """Goes on within an epoch; its order is a function of the epoch."""

    epoch = done = 0

    def __iter__(self):
        if self.done == len(self):
            self.epoch, self.done = self.epoch + 1, 0
        self.generator.manual_seed(self.epoch)
        start = self.done
        for i, batch in enumerate(super().__iter__(), start=1):
            if i > start:
                self.done = i
                yield batch

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.epoch, self.done = state["epoch"], state["done"]


def fit(tiny, run, folder, *, stop=None, ckpt_path=None, always=False):
    """Train with Lightning's ModelCheckpoint, or (``always``) a checkpoint after each step."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.rng = run.model, None
            # Lightning loads state dicts strictly, unless told otherwise.
            self.strict_loading = not run.sparse.compact_state_dict

        def configure_optimizers(self):
            return [run.optimizer], [{"scheduler": run.schedule, "interval": "step"}]

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def on_before_optimizer_step(self, optimizer):
            if run.moving is not None:
                run.moving.step(optimizer)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["rng"] = torch.get_rng_state()

        def on_load_checkpoint(self, checkpoint):
            self.rng = checkpoint["rng"]

        def on_train_start(self):
            if self.rng is not None:
                torch.set_rng_state(self.rng)

    class Always(L.Callback):
        """As docs/examples/lightning_loop.py saves, and why not with ModelCheckpoint."""

        step = 0

        def on_train_start(self, trainer, module):
            self.step = trainer.global_step

        def on_train_batch_end(self, trainer, *_):
            before, self.step = self.step, trainer.global_step
            if self.step > before and not trainer.is_last_batch:
                trainer.save_checkpoint(folder / "last.ckpt")

    class Crash(L.Callback):
        """Between the micro-batches of the step after ``stop``."""

        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == stop and index % loops.ACCUMULATE:
                raise loops.Stop

    own = torch.Generator()
    rows = loops.rows_of(tiny)
    batches = Batches(rows, loops.BATCH, shuffle=True, generator=own, collate_fn=tiny.collate)
    saving = Always()
    if not always:
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    trainer = L.Trainer(
        max_steps=loops.STEPS, accumulate_grad_batches=loops.ACCUMULATE, accelerator="cpu",
        enable_checkpointing=not always,
        callbacks=[saving, Crash()], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    torch.manual_seed(99 if ckpt_path else 1)
    run.model.train()
    trainer.fit(Module(), batches, ckpt_path=ckpt_path, weights_only=True)
    return loops.everything(run)


@pytest.mark.filterwarnings("ignore")  # of Lightning's: workers, folders that exist
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
@pytest.mark.parametrize("compact", [False, True], ids=["complete", "compact"])
@pytest.mark.parametrize("kind", loops.OPTIMIZERS)
def test_a_lightning_module(kind, compact, moving, tiny, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")

    def build():
        return loops.build(tiny, kind, compact=compact, moving=moving)

    finished = build()
    whole = fit(tiny, finished, tmp_path / "whole")
    with pytest.raises(loops.Stop):
        fit(tiny, build(), tmp_path / "killed", stop=8)
    run = build()
    again = fit(tiny, run, tmp_path / "killed", ckpt_path=str(tmp_path / "killed/step=7.ckpt"))
    assert loops.difference(again, whole) is None
    if moving:
        assert run.moving.rounds == finished.moving.rounds == 2
    assert loops.restored(run, loops.base_of(tiny, kind))


@pytest.mark.filterwarnings("ignore")
def test_killed_again_and_again(tiny, tmp_path):
    """Twice in one step, and in the first steps of the next two epochs (five steps each)."""
    pytest.importorskip("lightning", reason="lightning is not installed")

    def build():
        return loops.build(tiny, moving=True)

    whole = fit(tiny, build(), tmp_path / "whole", always=True)
    last = None
    for stop in (3, 3, 5, 7, 10, 11):
        with pytest.raises(loops.Stop):
            fit(tiny, build(), tmp_path / "killed", stop=stop, ckpt_path=last, always=True)
        last = str(tmp_path / "killed/last.ckpt")
    again = fit(tiny, build(), tmp_path / "killed", ckpt_path=last, always=True)
    assert loops.difference(again, whole) is None
