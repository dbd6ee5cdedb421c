"""Sparse fine-tuning in Lightning (pip install lightning), resumed in the middle of an epoch.

python lightning_loop.py                                  # seconds on a CPU
python lightning_loop.py --stop-after 25; python lightning_loop.py --resume     # the same bits
python lightning_loop.py --model xlm-roberta-base --data train.tsv --lr 1e-4
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import transformers
from task import accuracy, arguments, load
from torch.utils.data import DataLoader

import sparseft


class SparseModule(L.LightningModule):
    """What it was before, but for three lines."""

    def __init__(self, model: torch.nn.Module, density: float, lr: float, steps: int) -> None:
        super().__init__()
        masks = sparseft.select(model, "random", density=density, exclude=["classifier.*"])
        self.sparse = sparseft.attach(model, masks, full_params=["classifier.*"])
        self.model, self.lr, self.steps, self.rng = model, lr, steps, None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.sparse.parameters(), lr=self.lr)
        # Not trainer.estimated_stepping_batches: it opens the loader before its state is restored.
        warmup = self.steps // 10
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.model(**batch).loss

    # Lightning's checkpoints leave the random numbers of dropout out.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        if self.rng is not None:
            torch.set_rng_state(self.rng)


class ResumableLoader(DataLoader):
    """A shuffling loader that goes on within an epoch: Lightning saves and loads its state."""

    epoch = done = 0

    def __iter__(self) -> Iterator[Any]:
        if self.done == len(self):
            self.epoch, self.done = self.epoch + 1, 0
        self.generator.manual_seed(self.epoch)
        start = self.done
        for i, batch in enumerate(super().__iter__(), start=1):
            if i > start:
                self.done = i
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]


class Checkpoints(L.Callback):
    """Saves from time to time, always after a step and within an epoch.

    With ModelCheckpoint(every_n_train_steps=...) a run resumes once, but not twice: resumed, it
    saves again after its first micro-batch, whose gradient is in no checkpoint; and resumed from
    the last batch of an epoch, it does not count the next epoch in what it saves.
    """

    step = saved = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        before, self.step = self.step, trainer.global_step
        due = self.step >= self.saved + args.save_every
        if due and self.step > before and not trainer.is_last_batch:
            self.saved = self.step
            unfinished = checkpoint.with_suffix(".tmp")
            trainer.save_checkpoint(unfinished)
            if trainer.is_global_zero:
                unfinished.replace(checkpoint)  # whole, or not at all


class StopAfter(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == args.stop_after:
            raise SystemExit(f"stopped after step {args.stop_after}; --resume goes on")


parser = arguments(__doc__)
parser.add_argument("--save-every", type=int, default=10)
args = parser.parse_args()
checkpoint = args.out / "last.ckpt"
if args.resume and not checkpoint.is_file():
    raise SystemExit(f"--resume: no checkpoint in {args.out}")
L.seed_everything(0)
base, train, test, collate = load(args)
own = torch.Generator()
loader = ResumableLoader(train, batch_size=4, shuffle=True, generator=own, collate_fn=collate)
module = SparseModule(base, args.density, args.lr, steps=args.epochs * len(loader) // 2)
trainer = L.Trainer(
    max_epochs=args.epochs,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    callbacks=[Checkpoints(), StopAfter()],
    enable_checkpointing=False,  # no ModelCheckpoint beside it
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
module.train()
trainer.fit(module, loader, ckpt_path=checkpoint if args.resume else None)

sparse = module.sparse
print(sparse, f"accuracy {accuracy(base, test, collate):.3f}")
sparse.adapter("lightning").save(args.out / "adapter")
sparse.detach(restore=True)  # the base again, bit for bit

# Anywhere else: a base that never saw the training, and the small file.
fresh = load(args)[0]
with sparseft.Composer(fresh, {"task": args.out / "adapter"}).composed(["task"]):
    print(f"adapter on a fresh base: accuracy {accuracy(fresh, test, collate):.3f}")
