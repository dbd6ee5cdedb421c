"""Loss curves in mixed precision against dense-masked fp32: `run.py amp`, small and whole."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module")
def amp():
    """The modules of the benchmark, by name."""
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    names = ("amp_curves", "amp_study", "amp_ways")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def study(amp, real_data):
    """A random encoder on real sentences."""
    return amp["amp_study"].real_study(
        real_data, steps=24, batch=4, length=12, density=0.15, lr=1e-2, shape=SMALL
    )


def ways_of(amp, *names: str):
    """These ways, and the dense ones that their limits come from."""
    chosen = {way.name: way for name in names for way in amp["amp_curves"].chosen(name)}
    return [way for way in amp["amp_ways"].WAYS if way.name in chosen]


def test_ours_is_as_near_to_fp32_as_dense_training_is(amp, study):
    ways = ways_of(amp, "ours fp32", "ours fp16 autocast", "ours bf16 autocast", "ours bf16 base")
    rows = {row["name"]: row for row in amp["amp_curves"].curves(study, ways)}
    over = {
        (name, check["name"]): (check["got"], check["limit"])
        for name, row in rows.items()
        for check in row["checks"]
        if not check["passed"]
    }
    assert not over
    assert sum(row["ours"] for row in rows.values()) == 4


def failed(row) -> set[str]:
    return {check["name"] for check in row["checks"] if not check["passed"]}


def test_a_diff_in_bf16_and_another_mask_are_caught(amp, study):
    ways = ways_of(amp, "ours*diff kept in bf16", "ours*another mask")
    rows = {row["name"]: row for row in amp["amp_curves"].curves(study, ways)}
    spoilt = {name: row for name, row in rows.items() if row["spoil"]}
    assert len(spoilt) == 2
    assert all(row["good"] for row in spoilt.values())
    assert "lost" in failed(spoilt["ours bf16 base, diff kept in bf16"])
    assert failed(spoilt["ours fp32, another mask"]) >= {
        "diff",
        "loss",
        "entries outside the mask that changed",
    }


@pytest.mark.slow
def test_300_steps_on_the_real_encoder(amp, real_encoder):
    """Without fp16 and the mistakes; `run.py amp` has them too. 10 minutes on one core."""
    whole = amp["amp_study"].real_study(real_encoder.parent, steps=300)
    ways = ways_of(amp, "ours fp32", "ours bf16 autocast", "ours bf16 base")
    rows = amp["amp_curves"].curves(
        whole, ways, progress=lambda text: sys.stderr.write(text + "\n")
    )
    assert {row["name"]: failed(row) for row in rows if failed(row)} == {}
    assert all(row["last"] < row["first"] - 0.2 for row in rows)
