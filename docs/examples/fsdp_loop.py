"""Sparse fine-tuning of a base sharded by FSDP2, stopped and resumed, by any number of processes.

python fsdp_loop.py                                       # one process, seconds on a CPU
torchrun --nproc-per-node 2 fsdp_loop.py                  # two: half of each weight and batch
torchrun --nproc-per-node 2 fsdp_loop.py --stop-after 25; python fsdp_loop.py --resume
torchrun --nproc-per-node 8 fsdp_loop.py --model xlm-roberta-base --data train.tsv --lr 1e-4
"""

from __future__ import annotations

import os
import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from task import accuracy, arguments, load
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import sparseft

parser = arguments(__doc__)
parser.add_argument("--batch-size", type=int, default=8, help="rows of a step, over all processes")
parser.add_argument("--save-every", type=int, default=10)
args = parser.parse_args()
checkpoint = args.out / "checkpoint"

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
if args.batch_size % world:
    raise SystemExit(f"--batch-size {args.batch_size} cannot be cut into {world} equal parts")


def parts(train: list, collate: object, epoch: int) -> DataLoader:
    """Return this rank's rows of the batches of an epoch; the batches know of no ranks."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch)).tolist()
    size = args.batch_size
    whole = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    return DataLoader(train, batch_sampler=[b[rank::world] for b in whole], collate_fn=collate)


def main() -> None:
    model, train, test, collate = load(args)  # seeded: the same new head on every rank
    model.to(device)

    # First the shards, of whole layers and of what is left, then masks: weights in rows over the
    # ranks, compact diffs on each.
    mesh = init_device_mesh(device.type, (world,))
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    masks = sparseft.select(model, "random", density=args.density, exclude=["classifier.*"])
    sparse = sparseft.attach(
        model, masks, full_params=["classifier.*"], compact_state_dict=True
    )  # compact: checkpoints without the base
    # A group of leaves and one of shards, which torch's fast paths want apart.
    optimizer = torch.optim.AdamW(sparse.param_groups(), lr=args.lr)  # or sparseft.SparseAdamW

    per_epoch = len(parts(train, collate, 0))
    total = args.epochs * per_epoch
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, total // 10, total)
    step = 0

    def state() -> dict:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {
            "step": step,
            "schedule": schedule.state_dict(),
            "model": model_state,
            "optimizer": optimizer_state,
        }

    def save() -> None:
        """Each rank writes what it has; the old checkpoint goes once the new one is whole."""
        new = checkpoint.with_suffix(".new")
        if rank == 0:
            shutil.rmtree(new, ignore_errors=True)
        dist.barrier()
        dcp.save(state(), checkpoint_id=new)  # waits for all ranks
        if rank == 0:
            shutil.rmtree(checkpoint, ignore_errors=True)
            new.rename(checkpoint)

    if args.resume:
        saved = state()  # where the numbers go, by name and not by rank
        dcp.load(saved, checkpoint_id=checkpoint)
        set_state_dict(
            model, optimizer,
            model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
        )  # fmt: skip
        schedule.load_state_dict(saved["schedule"])
        step = saved["step"]

    model.train()
    for epoch in range(step // per_epoch, args.epochs):
        for i, batch in enumerate(parts(train, collate, epoch), start=epoch * per_epoch):
            if i < step:
                continue  # done before the checkpoint
            torch.manual_seed(step * world + rank)  # dropout: of its own on each rank
            loss = model(**batch.to(device)).loss
            loss.backward()  # leaves end with the mean over the ranks
            sparse.clip_grad_norm_(1.0)  # torch's takes no mix of leaves and shards
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

    reached = accuracy(model, test, collate)  # on every rank: each has a part of the weights
    adapter = sparse.adapter("fsdp")  # likewise
    sparse.detach(restore=True)  # the base again, bit for bit, on every rank
    if rank == 0:
        print(f"{adapter.nnz} entries trained: accuracy {reached:.3f}")
        adapter.save(args.out / "adapter")

        # Anywhere else: a base that never saw the training, whole or sharded, and the small file.
        fresh = load(args)[0].to(device)
        with sparseft.Composer(fresh, {"task": args.out / "adapter"}).composed(["task"]):
            print(f"adapter on a fresh base: accuracy {accuracy(fresh, test, collate):.3f}")


backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
if world > 1:
    dist.init_process_group(backend)
else:
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
try:
    main()
finally:
    dist.destroy_process_group()
