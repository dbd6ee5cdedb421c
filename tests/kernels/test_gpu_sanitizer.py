"""The kernels under NVIDIA's compute-sanitizer: no access out of bounds, no shared-memory race."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_interpret_attach.py", "training_equals and (fp32 or bf16 or low)"),
        ("test_interpret_compose.py", "every_rule and bfloat16 or gradients"),
        ("test_interpret_spmm.py", "gpu"),
    ],
    ids=["training", "compositions", "spmm"],
)
def test_the_kernels_are_clean(file, chosen, tool):
    """Small models only: a checked kernel runs ten to a hundred times as long."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the path (it comes with the CUDA toolkit)")
    # Without torch's cache each tensor is an allocation of its own: a step past its end is seen.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SPARSEFT_REQUIRE_GPU": "1"}
    lane = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all", *lane,
         "-k", chosen, str(HERE / file)],
        cwd=HERE.parent.parent, env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    report = done.stdout[-4000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    assert " passed" in done.stdout, report
