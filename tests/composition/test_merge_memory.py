"""Merging and extracting hold one tensor at a time; measured as the peak of resident memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparseft import Adapter, SparseDiff

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# glibc keeps freed tensors for later, which looks like use; so large blocks go back at once.
_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

# Each step's peak above what was resident before it, in a process of its own. A first merge of
# something small pays for imports and for pools that stay.
_MEASURE = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
from sparseft import extract_adapter
from sparseft.composition import merge_into_checkpoint
from sparseft.io import checkpoint_shards
from sparseft.ops import score_keys

work, small, small_change, base, tuned, change, pickled = sys.argv[1:]

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(l.split()[1]) << 10 for l in lines if l.startswith(field + ":"))

def peak(step):
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the peak so far is forgotten
    before = status("VmRSS")
    kept = step()
    return status("VmHWM") - before

def whole():
    model = transformers.AutoModelForMaskedLM.from_pretrained(base)
    merge_into_checkpoint(model, [change], None, work + "/whole")

def whole_difference():
    old, new = load_file(base_file), load_file(tuned)
    return torch.cat([(new[n] - old[n]).view(-1) for n in sorted(new)]).abs().topk(1000)

# As small beside this model as they are beside a real one.
checkpoint_shards.REMAP, score_keys.CHUNK = 4 << 20, 1 << 16
merge_into_checkpoint(small, [small_change], None, work + "/small-merged")
extract_adapter(small, small)
base_file = work + "/streamed/model.safetensors"
peaks = {
    "merge": peak(lambda: merge_into_checkpoint(base, [change], None, work + "/streamed")),
    "pickle": peak(lambda: merge_into_checkpoint(pickled, [change], None, work + "/unpickled")),
    "all": peak(lambda: extract_adapter(base, tuned, mode="set")),
    "topk": peak(lambda: extract_adapter(base, tuned, nnz=1000)),
}
peaks["whole merge"] = peak(whole)
peaks["whole difference"] = peak(whole_difference)
print(json.dumps(peaks))
"""


def save(folder: Path, layers: int, width: int):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_peak_is_a_tensor_not_the_model(tmp_path):
    small = save(tmp_path / "small", layers=1, width=16)
    name = "bert.encoder.layer.0.output.dense.weight"
    step = SparseDiff.from_dense(torch.ones(small.get_parameter(name).shape))
    Adapter({name: step}, name="small").save(tmp_path / "small-change")
    model = save(tmp_path / "base", layers=8, width=384)
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and "layer." in n]
    generator = torch.Generator().manual_seed(1)
    diffs = {}
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            step = torch.randn(weight.shape, generator=generator)
            step *= torch.rand(weight.shape, generator=generator) < 0.005
            diffs[name] = SparseDiff.from_dense(step)
            weight += step
    change = Adapter(diffs, name="sw")
    change.save(tmp_path / "change")
    model.save_pretrained(tmp_path / "tuned")
    largest = max(p.numel() * 4 for p in model.parameters())
    total = sum(p.numel() * 4 for p in model.parameters())
    assert total > 20 * largest
    where = ("small", "small-change", "base", "tuned/model.safetensors", "change", "pickled")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), *(str(tmp_path / w) for w in where)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **_AT_ONCE},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    # A tensor (two when extracting), the adapter and its copies while it is summed, a few pieces.
    assert peaks["merge"] < 2 * largest + 4 * change.nbytes + (2 << 20), peaks
    for way in ("pickle", "all", "topk"):
        assert peaks[way] < 3 * largest + 4 * change.nbytes + (4 << 20), peaks
    assert max(peaks[w] for w in ("merge", "pickle", "all", "topk")) < total / 4, peaks
    assert peaks["whole merge"] > 0.9 * total, "else the measure sees nothing"
    assert peaks["whole difference"] > 0.9 * total, "else the measure sees nothing"
