"""Sparse fine-tuning with DistributedDataParallel, stopped and resumed, by any number of processes.

python ddp_loop.py                                        # one process, seconds on a CPU
torchrun --nproc-per-node 2 ddp_loop.py                   # two: the same batches, half each
torchrun --nproc-per-node 2 ddp_loop.py --stop-after 25; python ddp_loop.py --resume
torchrun --nproc-per-node 8 ddp_loop.py --model xlm-roberta-base --data train.tsv --lr 1e-4
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import transformers
from task import accuracy, arguments, load
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import sparseft

parser = arguments(__doc__)
parser.add_argument("--batch-size", type=int, default=8, help="rows of a step, over all processes")
parser.add_argument("--save-every", type=int, default=10)
args = parser.parse_args()
checkpoint = args.out / "checkpoint.pt"

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
if world > 1:  # before attach, which then compares the masks of all ranks
    dist.init_process_group("nccl" if gpu else "gloo")
if args.batch_size % world:
    raise SystemExit(f"--batch-size {args.batch_size} cannot be cut into {world} equal parts")

model, train, test, collate = load(args)  # seeded: the same new head on every rank
model.to(device)

# The three lines; one seed, so one choice on every rank.
masks = sparseft.select(model, "random", density=args.density, exclude=["classifier.*"])
sparse = sparseft.attach(model, masks, full_params=["classifier.*"])
optimizer = torch.optim.AdamW(sparse.parameters(), lr=args.lr)  # or sparseft.SparseAdamW


def parts(epoch: int) -> DataLoader:
    """Return this rank's rows of the batches of an epoch; the batches know of no ranks."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch)).tolist()
    size = args.batch_size
    whole = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    return DataLoader(train, batch_sampler=[b[rank::world] for b in whole], collate_fn=collate)


per_epoch = len(parts(0))
total = args.epochs * per_epoch
schedule = transformers.get_cosine_schedule_with_warmup(optimizer, total // 10, total)
step = 0


def save() -> None:
    """Write what every rank has alike: another number of processes can go on from it."""
    if rank == 0:
        state = {
            "step": step,
            "model": model.state_dict(),  # of the model, not of its wrapper: no "module." in names
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)  # whole, or not at all


if args.resume:
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    step = state["step"]
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])

# After attach: what is reduced in each step is nnz numbers and the head's.
wrapped = DistributedDataParallel(model) if world > 1 else model
wrapped.train()
for epoch in range(step // per_epoch, args.epochs):
    for i, batch in enumerate(parts(epoch), start=epoch * per_epoch):
        if i < step:
            continue  # done before the checkpoint
        torch.manual_seed(step * world + rank)  # dropout: of its own on each rank, and on resume
        loss = wrapped(**batch.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)  # reduced already: as on one
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        if step % args.save_every == 0:
            save()
        if step == args.stop_after:
            raise SystemExit(f"stopped after step {step}; --resume goes on")
    if rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}")

if rank == 0:
    print(sparse, f"accuracy {accuracy(model, test, collate):.3f}")
    sparse.adapter("ddp").save(args.out / "adapter")
sparse.detach(restore=True)  # the base again, bit for bit, on every rank

# Anywhere else: a base that never saw the training, and the small file.
if rank == 0:
    fresh = load(args)[0].to(device)
    with sparseft.Composer(fresh, {"task": args.out / "adapter"}).composed(["task"]):
        print(f"adapter on a fresh base: accuracy {accuracy(fresh, test, collate):.3f}")
if world > 1:
    dist.destroy_process_group()
