"""Predictions against sums taken by hand, and each reckoned workspace against the profiler."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from sparseft.errors import OptionError
from sparseft.modules.leaves import MaskedParameter
from sparseft.ops import sampled_embedding_grad, sampled_weight_grad
from sparseft.optim import SparseAdamW
from sparseft.pattern import SparsePattern
from sparseft.profiling import workspace
from sparseft.profiling.allocations import peak_of
from sparseft.profiling.masks import exact_pattern
from sparseft.profiling.predict import predict
from sparseft.profiling.workload import Unavailable, Way, Workload

CPU = torch.device("cpu")
KIB = 1 << 10


def pattern(rows, cols, density) -> SparsePattern:
    return exact_pattern((rows, cols), density, device=CPU)


def close(reckoned, measured):
    """Within a tenth, or the size of a few small vectors."""
    assert reckoned == pytest.approx(measured, rel=0.1, abs=64 * KIB)


# ---- workspaces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "density"),
    [
        (256, 2048, 512, 0.01),  # dot products, panels of rows
        (1024, 256, 1024, 0.05),  # dot products, no copy of the left operand, two slabs
        (300, 512, 512, 0.5),  # tiles
        (256, 384, 2048, 0.0005),  # few active columns
    ],
    ids=["panels", "slabs", "tiles", "columns"],
)
def test_sampled_grad(tokens, rows, cols, density, dtype):
    mask = pattern(rows, cols, density)
    grad, x = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, cols).to(dtype)
    sampled_weight_grad(grad, x, mask, backend="reference")  # lays out, and keeps its tile
    seen = peak_of(lambda: sampled_weight_grad(grad, x, mask, backend="reference"))
    found = workspace.sampled_grad_on_cpu(
        tokens, rows, cols, mask.nnz, dtype.itemsize, 4, torch.get_num_threads()
    )
    close(found.inside + 4 * mask.nnz, seen)


def test_the_tile_buffer_is_kept():
    found = workspace.sampled_grad_on_cpu(300, 512, 512, 512 * 256, 4, 4, 1)
    assert found.kept == 512 * 512 * 4
    assert workspace.sampled_grad_on_cpu(300, 512, 512, 512, 4, 4, 1).kept == 0


@pytest.mark.parametrize("padding", [None, 1], ids=["plain", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampled_embedding(dtype, padding):
    mask = pattern(4000, 128, 0.05)
    ids = torch.randint(2, 4000, (8, 64))
    grad = torch.randn(8, 64, 128).to(dtype)
    seen = peak_of(
        lambda: sampled_embedding_grad(grad, ids, mask, padding_idx=padding, backend="reference")
    )
    found = workspace.sampled_embedding_on_cpu(
        512, 4000, 128, mask.nnz, dtype.itemsize, padding is not None
    )
    assert found.inside + 4 * mask.nnz == pytest.approx(seen, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nnz", [30_000, 100_000, 300_000])
def test_writing_the_diff(nnz, dtype):
    weight = torch.nn.Parameter(torch.randn(1024, 1024).to(dtype), requires_grad=False)
    masked = MaskedParameter("w", weight, pattern(1024, 1024, nnz / 2**20))
    seen = peak_of(masked.write_)
    close(workspace.write_sum_on_cpu(masked.pattern.nnz, dtype.itemsize).inside, seen)
    masked.release_(restore=True)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("nnz", [30_000, 300_000])
def test_the_sparse_optimizer(nnz, bits):
    weight = torch.nn.Parameter(torch.randn(1024, 1024), requires_grad=False)
    masked = MaskedParameter("w", weight, pattern(1024, 1024, nnz / 2**20), backend="reference")
    optimizer = SparseAdamW([masked.leaf], moment_bits=bits)
    masked.leaf.grad = torch.randn_like(masked.leaf)
    optimizer.step()
    seen = peak_of(optimizer.step)
    found = workspace.sparse_step_on_cpu(masked.pattern.nnz, 4, True, bits == 8)
    assert found.inside == pytest.approx(seen, rel=0.25)
    masked.release_(restore=True)


def test_softmax_of_masked_scores():
    x = torch.randn(4, 4, 64, 64)
    seen = peak_of(lambda: torch.ops.aten._safe_softmax(x, -1))
    close(workspace.safe_softmax_on_cpu(x.numel(), 64).inside + x.numel() * 4, seen)


# ---- predictions

WORK = Workload(model="decoder:2x64x500", batch=2, length=32)


def test_per_trained_entry_twelve_bytes_of_diff_and_eight_of_state():
    way = Way("attached", 1.0)
    tile = 500 * 64 * 4  # the buffer that a CPU keeps, as large as the output layer here
    use = predict(WORK, way)
    nnz = use.trainable
    # index, base and leaf; exp_avg and exp_avg_sq, and a count per leaf
    assert use.use.diff == 12 * nnz + tile
    assert 8 * nnz <= use.use.optimizer < 8 * nnz + 200
    half = predict(Workload(**{**vars(WORK), "dtype": "bf16"}), way).use
    assert half.diff == 10 * nnz + tile, "the base has the weight's dtype"
    assert half.weights * 2 == pytest.approx(use.use.weights, abs=1024)


def test_parts_of_ways_that_hold_no_diff():
    dense, frozen = predict(WORK, Way("dense")), predict(WORK, Way("frozen"))
    assert dense.use.diff == frozen.use.diff == frozen.use.optimizer == frozen.use.gradients == 0
    assert dense.use.weights == frozen.use.weights
    # AdamW: twice the weights, and a count of four bytes per tensor
    assert 0 <= dense.use.optimizer - 8 * dense.trainable < 500
    assert frozen.trainable == 0
    masked = predict(WORK, Way("gradient_mask", 0.1)).use
    assert masked.diff > 0.9 * masked.weights, "a 0/1 mask of each weight's size"


def test_checkpointing_trades_activations():
    deep = Workload(model="decoder:4x64x100", batch=4, length=64)
    plain = predict(deep, Way("attached", 0.01)).use
    saved = predict(Workload(**{**vars(deep), "checkpointing": True}), Way("attached", 0.01)).use
    assert saved.activations < plain.activations / 2
    assert saved.weights == plain.weights


def test_optimizers_by_their_state():
    way = Way("attached", 0.5)
    state = {
        name: predict(Workload(**{**vars(WORK), "optimizer": name}), way).use.optimizer
        for name in ("adamw", "adamw_8bit", "sparse_adamw", "sgd")
    }
    nnz = predict(WORK, way).trainable
    assert state["sgd"] == 0
    assert state["sparse_adamw"] == state["adamw"]
    assert 2 * nnz < state["adamw_8bit"] < 2.2 * nnz


def test_cuda_needs_no_gpu_and_rounds_blocks():
    cpu, cuda = (predict(WORK, Way("attached", 0.1), device) for device in ("cpu", "cuda"))
    assert cuda.use.weights % 512 == 0
    assert cuda.use.optimizer % 512 == 0
    assert cpu.use.weights <= cuda.use.weights < cpu.use.weights + 512 * 40
    assert cuda.use.peak > workspace.CUBLAS
    assert any("H200" in text for text in cuda.assumed)
    assert not cpu.assumed


def test_attention_on_cuda_is_fused_whatever_its_dropout():
    work = Workload(model="encoder:2x64x300", batch=2, length=256, task="mlm")
    cpu, cuda = (predict(work, Way("frozen"), device).use for device in ("cpu", "cuda"))
    scores = 2 * 1 * 256 * 256 * 4  # one layer's, kept several times over by the eager form
    assert cpu.activations > cuda.activations - workspace.CUBLAS + 2 * scores


@pytest.mark.parametrize(("base", "per_weight"), [("4bit", 0.5 + 4 / 64), ("8bit", 1.0)])
def test_a_quantised_base(base, per_weight):
    plain = Workload(model="decoder:2x128x500", batch=2, length=32, dtype="bf16")
    work = Workload(**{**vars(plain), "base": base})
    quantised = 2 * (4 * 128 * 128 + 3 * 128 * 352)
    rows = 2 * (4 * 128 + 2 * 352 + 128) * 4 if base == "8bit" else 0
    for way in (Way("attached", 0.01), Way("lora", 0.01), Way("frozen")):
        before, after = predict(plain, way).use, predict(work, way).use
        saved = quantised * (2 - per_weight) - rows
        assert before.weights - after.weights == pytest.approx(saved, rel=0.01), way.kind
    found, whole = predict(work, Way("attached", 0.01)), predict(plain, Way("attached", 0.01))
    assert found.trainable == whole.trainable
    assert found.use.optimizer == whole.use.optimizer


def test_what_cannot_be_predicted_says_so():
    with pytest.raises(OptionError, match=r"tpu|'cpu' or 'cuda'"):
        predict(WORK, Way("dense"), "meta")
    with pytest.raises(OptionError, match="at least one rank"):
        predict(WORK, Way("dense"), world_size=0)
    with pytest.raises(Unavailable, match="attached, lora and frozen"):
        predict(Workload(**{**vars(WORK), "base": "4bit"}), Way("dense"))


_SEVEN = """
import resource
from sparseft.profiling.predict import predict
from sparseft.profiling.workload import Way, Workload
predict(Workload(model="tiny-decoder"), Way("attached", 0.01))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
use = predict(Workload(model="7b", dtype="bf16", batch=1), Way("attached", 0.01)).use
assert 13e9 < use.weights < 14e9, use
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_classifiers_last_layer_has_one_live_row_per_sequence():
    """Measured for 2x256x6000, bf16: without this rule the prediction was 16 % too high."""
    inside = workspace.Workspace("cpu")
    mask = pattern(256, 1024, 0.05).indices
    grad, x = torch.zeros(512, 256), torch.zeros(512, 1024)
    inside.live = 4
    few = inside._sampled(grad, x, mask).inside
    inside._mix()
    assert few < inside._sampled(grad, x, mask).inside / 4


@pytest.mark.slow
def test_seven_billion_parameters_take_no_memory_here():
    done = subprocess.run(
        [sys.executable, "-c", _SEVEN], capture_output=True, text=True, check=True
    )
    grown = int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else KIB)
    assert grown < 1.5e9


def test_a_billion_parameters_take_no_memory_here():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = Workload(model="decoder:2x5120x50000", batch=1, length=16)
    assert predict(work, Way("frozen")).use.weights > 4e9
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KIB
    assert grown < 3e8
