"""Sparse fine-tuning in a plain PyTorch loop, stopped and resumed in the middle of an epoch.

python plain_loop.py                                      # seconds on a CPU
python plain_loop.py --stop-after 25; python plain_loop.py --resume     # the same bits
python plain_loop.py --model xlm-roberta-base --data train.tsv --lr 1e-4
"""

from __future__ import annotations

import torch
import transformers
from task import accuracy, arguments, load
from torch.utils.data import DataLoader

import sparseft

parser = arguments(__doc__)
parser.add_argument("--save-every", type=int, default=10)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
args.out.mkdir(parents=True, exist_ok=True)
checkpoint = args.out / "checkpoint.pt"

model, train, test, collate = load(args)
model.to(device)

# The three lines. Only the chosen entries and the new head train; the rest is frozen.
masks = sparseft.select(model, "random", density=args.density, exclude=["classifier.*"])
sparse = sparseft.attach(model, masks, full_params=["classifier.*"])
optimizer = torch.optim.AdamW(sparse.parameters(), lr=args.lr)  # or sparseft.SparseAdamW


def batches(epoch: int) -> DataLoader:
    """Return an epoch in an order of its own, so that skipping batches draws no other numbers."""
    order = torch.Generator().manual_seed(epoch)
    return DataLoader(train, batch_size=8, shuffle=True, generator=order, collate_fn=collate)


per_epoch = len(batches(0))
total = args.epochs * per_epoch
schedule = transformers.get_cosine_schedule_with_warmup(optimizer, total // 10, total)
step = 0


def save() -> None:
    state = {
        "step": step,
        "model": model.state_dict(),  # without the frozen: attach(..., compact_state_dict=True)
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "gpu_rng": torch.cuda.get_rng_state_all(),
    }
    torch.save(state, checkpoint.with_suffix(".tmp"))
    checkpoint.with_suffix(".tmp").replace(checkpoint)  # whole, or not at all


if args.resume:
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    step = state["step"]
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"])  # dropout goes on where it was
    torch.cuda.set_rng_state_all(state["gpu_rng"])

model.train()
for epoch in range(step // per_epoch, args.epochs):
    for i, batch in enumerate(batches(epoch), start=epoch * per_epoch):
        if i < step:
            continue  # done before the checkpoint
        loss = model(**batch.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        if step % args.save_every == 0:
            save()
        if step == args.stop_after:
            raise SystemExit(f"stopped after step {step}; --resume goes on")
    print(f"epoch {epoch}: loss {loss.item():.3f}")

print(sparse, f"accuracy {accuracy(model, test, collate):.3f}")
sparse.adapter("plain").save(args.out / "adapter")
sparse.detach(restore=True)  # the base again, bit for bit

# Anywhere else: a base that never saw the training, and the small file.
fresh = load(args)[0].to(device)
with sparseft.Composer(fresh, {"task": args.out / "adapter"}).composed(["task"]):
    print(f"adapter on a fresh base: accuracy {accuracy(fresh, test, collate):.3f}")
