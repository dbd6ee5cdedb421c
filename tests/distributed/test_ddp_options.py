"""Options of DistributedDataParallel and what is used with it: as one process in each of them.

The tolerance is that of test_ddp.py: as near to a run in float64 as one process.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import sparseft

HERE = Path(__file__).resolve().parent


def beside(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = beside(HERE / "_ddp.py")
accuracy = beside(HERE.parent / "_accuracy.py")

# What is given to DistributedDataParallel, to the model, to attach; and how a step is done.
WAYS = {
    "views": {"ddp": {"gradient_as_bucket_view": True}},
    "copies": {"ddp": {"gradient_as_bucket_view": False, "broadcast_buffers": False}},
    "small_buckets": {"ddp": {"bucket_cap_mb": 1e-4}},
    "static_graph": {"ddp": {"static_graph": True}},
    "untouched": {"model": {"spare": True}, "ddp": {"find_unused_parameters": True}},
    "one_rank": {"model": {"spare": True}, "ddp": {"find_unused_parameters": True}, "spare": True},
    "no_sync": {"accumulate": 2},
    "no_sync_views": {"accumulate": 2, "ddp": {"gradient_as_bucket_view": True}},
    "zero": {"optimizer": ("zero", "adamw")},
    "zero_fused": {"optimizer": ("zero", "sparse_adamw")},
    "clipped": {"clip": 0.1},
    "autocast": {"autocast": torch.bfloat16},
    "scaler": {"autocast": torch.float16},
    "checkpointing": {"model": {"checkpointing": True}},
}
ZERO = {"adamw": torch.optim.AdamW, "sparse_adamw": sparseft.SparseAdamW}


def run(way, rank=None, dtype=torch.float32, steps=3):
    """Train under one of `WAYS`; all rows without DistributedDataParallel where rank is None."""
    options = WAYS[way]
    alone = rank is None
    model = kit.make("causal", dtype, **options.get("model", {}))
    base = kit.bits(model)
    sparse = kit.attached(model, group=False if alone else None)
    kind = options.get("optimizer", "adamw")
    if isinstance(kind, str):
        opt = kit.OPTIMIZERS[kind](sparse.parameters())
    elif alone:
        opt = ZERO[kind[1]](sparse.parameters(), lr=1e-2, weight_decay=0.1)
    else:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # a second, and warns of jit

        opt = ZeroRedundancyOptimizer(
            sparse.parameters(), optimizer_class=ZERO[kind[1]], lr=1e-2, weight_decay=0.1
        )
    wrapped = model if alone else DistributedDataParallel(model, **options.get("ddp", {}))
    cast = options.get("autocast") if dtype == torch.float32 else None
    scaler = torch.amp.GradScaler("cpu", enabled=cast == torch.float16, init_scale=2.0**10)
    for step in range(steps):
        opt.zero_grad()
        pieces = _pieces(kit.batch(step) if alone else kit.part_of(rank, step), options, alone)
        for i, (piece, spare) in enumerate(pieces):
            last = i == len(pieces) - 1
            quiet = contextlib.nullcontext() if alone or last else wrapped.no_sync()
            mixed = torch.autocast("cpu", cast) if cast else contextlib.nullcontext()
            with quiet:
                with mixed:
                    loss = wrapped(*piece, spare=spare and (alone or rank == 0))
                scaler.scale(loss / len(pieces)).backward()
        scaler.unscale_(opt)
        if "clip" in options:
            torch.nn.utils.clip_grad_norm_(list(sparse.parameters()), options["clip"])
        scaler.step(opt)
        scaler.update()
    result = {
        "trained": {name: p.detach().clone() for name, p in sparse.named_parameters()},
        "model": kit.bits(model),
        "written": all(
            torch.equal(
                m.weight.detach().view(-1)[m.indices.long()], m.expected_entries(m.leaf.detach())
            )
            for m in sparse._masked.values()
        ),
        "moments": sum(
            s.numel()
            for o in (getattr(opt, "optim", opt),)
            for per in o.state.values()
            for s in per.values()
            if torch.is_tensor(s) and s.numel() > 1
        ),
        "nnz": sparse.nnz,
        "buffers": [name for name, _ in model.named_buffers()],
    }
    sparse.detach(restore=True)
    return result | {"restored": kit.same(kit.bits(model), base)}


def _pieces(rows, options, alone):
    """The rows in pieces of equal size, each with whether it goes through the spare layer."""
    if options.get("spare") and alone:  # rank 0 has every second row
        return [(tuple(part[i::2] for part in rows), i == 0) for i in range(2)]
    count = 1 if alone else options.get("accumulate", 1)
    return [(tuple(part[i::count] for part in rows), "spare" in options) for i in range(count)]


def compressed(rank):
    model = kit.make("masked_lm")
    sparse = kit.attached(model)
    opt = kit.OPTIMIZERS["sgd"](sparse.parameters())
    wrapped = DistributedDataParallel(model)
    # Under its own name torch takes it with nccl only.
    wrapped.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    for step in range(3):
        opt.zero_grad()
        wrapped(*kit.part_of(rank, step)).backward()
        opt.step()
    return {name: leaf.detach() for name, leaf in sparse.named_parameters()}


def ranks_of(rank, ways):
    return {way: run(way, rank) for way in ways} | {"compressed": compressed(rank)}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.fixture(scope="module")
def trained(run_ranks):
    return run_ranks(ranks_of, 2, list(WAYS))


@pytest.mark.parametrize("way", WAYS)
def test_as_one_process(way, trained):
    zero, one = (ranks[way] for ranks in trained)
    for key in ("trained", "model"):
        assert kit.same(zero[key], one[key]), f"bits of {key} on all ranks"
    for ranks in (zero, one):
        assert ranks["written"], "W = rn(base + diff) on every rank"
        assert ranks["restored"]
        assert ranks["buffers"] == [], "nothing that broadcast_buffers would send"
    alone, exact = run(way), run(way, dtype=torch.float64)
    accuracy.assert_as_accurate(*(flat(r["trained"]) for r in (zero, alone, exact)), name=way)
    moved = zero["trained"].pop("spare.diff_weight", None)
    if moved is not None:
        assert bool(moved.any()) == (way == "one_rank"), "what no rank touches stays"
    assert all(value.any() for value in zero["trained"].values())


@pytest.mark.parametrize("way", ["zero", "zero_fused"])
def test_zero_cuts_the_moments_by_parameter(way, trained):
    shares = [ranks[way]["moments"] for ranks in trained]
    assert sum(shares) == 2 * trained[0][way]["nnz"]
    assert min(shares) > 0


def test_gradients_compressed_to_bf16(trained):
    zero, one = (ranks["compressed"] for ranks in trained)
    assert kit.same(zero, one)
    exact = kit.single("masked_lm", "sgd", torch.float64).trained
    eps = torch.finfo(torch.bfloat16).eps
    error = accuracy.rel_rms(flat(zero), flat(exact))
    assert eps / 100 < error < eps, "gradients were rounded, and no more"
