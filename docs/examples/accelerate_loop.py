"""Sparse fine-tuning in an accelerate loop, stopped and resumed in the middle of an epoch.

python accelerate_loop.py                                 # seconds on a CPU
python accelerate_loop.py --stop-after 25; python accelerate_loop.py --resume   # the same bits
accelerate launch accelerate_loop.py --model xlm-roberta-base --data train.tsv --lr 1e-4
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from task import accuracy, arguments, load
from torch.utils.data import DataLoader

import sparseft

parser = arguments(__doc__)
parser.add_argument("--save-every", type=int, default=10)
parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
args = parser.parse_args()

accelerator = Accelerator(
    mixed_precision=args.mixed_precision,
    gradient_accumulation_steps=2,
    # An epoch's order is a function of seed and epoch: the same in every process, and on resume.
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
)
model, train, test, collate = load(args)

# The three lines, before anything is prepared.
masks = sparseft.select(model, "random", density=args.density, exclude=["classifier.*"])
sparse = sparseft.attach(model, masks, full_params=["classifier.*"])
optimizer = torch.optim.AdamW(sparse.parameters(), lr=args.lr)  # or sparseft.SparseAdamW

# With a generator of its own, starting an epoch draws nothing from the one dropout draws from.
own = torch.Generator()
loader = DataLoader(train, batch_size=4, shuffle=True, generator=own, collate_fn=collate)
loader = accelerator.prepare(loader)
per_epoch = -(-len(loader) // accelerator.gradient_accumulation_steps)
total = args.epochs * per_epoch
schedule = transformers.get_cosine_schedule_with_warmup(
    optimizer, total // 10 * accelerator.num_processes, total * accelerator.num_processes
)
wrapped, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)


class Progress:
    """How far the loop is; saved and loaded by accelerate with everything else."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


at = Progress()
accelerator.register_for_checkpointing(at)


def checkpoints() -> list[Path]:
    found = args.out.glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save() -> None:
    # save_state writes file by file: killed over an older checkpoint, it would leave a mixture.
    accelerator.save_state(str(args.out / "unfinished"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older, new = checkpoints(), args.out / f"checkpoint-{at.step}"
        if new in older:  # of a run that this one started over
            shutil.rmtree(new)
        (args.out / "unfinished").rename(new)
        for path in older:
            if path != new:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()


if args.resume:  # model, optimizer, schedule, random numbers, progress
    if not checkpoints():
        raise SystemExit(f"--resume: no checkpoint in {args.out}")
    accelerator.load_state(str(checkpoints()[-1]))

wrapped.train()
for epoch in range(at.step // per_epoch, args.epochs):
    loader.set_epoch(epoch)
    done = (at.step - epoch * per_epoch) * accelerator.gradient_accumulation_steps
    for batch in skip_first_batches(loader, done) if done else loader:
        with accelerator.accumulate(wrapped):
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(sparse.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        at.step += 1
        if at.step % args.save_every == 0:
            save()
        if at.step == args.stop_after:
            raise SystemExit(f"stopped after step {at.step}; --resume goes on")
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

accelerator.print(sparse, f"accuracy {accuracy(model, test, collate):.3f}")
if accelerator.is_main_process:
    sparse.adapter("accelerate").save(args.out / "adapter")
sparse.detach(restore=True)  # the base again, bit for bit

# Anywhere else: a base that never saw the training, and the small file.
accelerator.wait_for_everyone()
fresh = load(args)[0].to(accelerator.device)
with sparseft.Composer(fresh, {"task": args.out / "adapter"}).composed(["task"]):
    accelerator.print(f"adapter on a fresh base: accuracy {accuracy(fresh, test, collate):.3f}")
