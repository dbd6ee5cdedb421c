"""`Attachment.report`: rows, their total and their table."""

from __future__ import annotations

import math

import pytest
import torch

from sparseft import Adapter, Composer, SparseDiff, attach
from sparseft.modules.seen_entries import watch_entries


@pytest.fixture
def sparse():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3).to(torch.bfloat16))
    return attach(model, {"0.weight": torch.eye(4, 6) > 0, "1.weight": torch.eye(3, 4) > 0})


def put(sparse, **values):
    for name, leaf in sparse.leaves.items():
        with torch.no_grad():
            leaf.copy_(torch.tensor(values[f"at{name[0]}"]))
    sparse.sync_()


def test_rows_and_their_total(sparse):
    put(sparse, at0=[3.0, 0.0, -4.0, 0.0], at1=[0.0, 1e-9, -12.0])
    watch_entries(sparse._masked["1.weight"]).look(sparse._masked["1.weight"])
    report = sparse.report()
    first, second = report
    assert isinstance(report, list)
    assert first[:6] == ("0.weight", (4, 6), "float32", 4, 4 / 24, 2)
    assert first[6:] == (7.0, 4.0, 5.0, 0, None)
    assert second[:6] == ("1.weight", (3, 4), "bfloat16", 3, 3 / 12, 2)
    assert (second.max_abs, second.rounded_away, second.no_gradient) == (12.0, 1, 3)
    total = report.total
    assert (total.nnz, total.density, total.changed) == (7, 7 / 36, 4)
    assert total.l1 == pytest.approx(19.0)
    assert total.l2 == pytest.approx(math.hypot(3, 4, 12))
    assert (total.max_abs, total.rounded_away, total.no_gradient) == (12.0, 1, 3)
    assert total.dtype == "bfloat16, float32"


def test_the_table(sparse):
    put(sparse, at0=[3.0, 0.0, -4.0, 0.0], at1=[0.0, 1e-9, -12.0])
    lines = str(sparse.report()).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert lines[0].startswith("parameter")
    assert lines[2].split() == [
        "1.weight", "3x4", "bfloat16", "3", "25%", "2", "12", "12", "12", "1", "-",
    ]  # fmt: skip
    assert lines[3].split()[:5] == ["total", "bfloat16,", "float32", "7", "19.4%"]
    markdown = sparse.report().to_markdown().splitlines()
    assert len(markdown) == 5
    assert all(line.replace(r"\|", "").count("|") == 12 for line in markdown)
    assert markdown[2].startswith("| `0.weight` | 4x6 | float32 | 4 |")
    assert sparse.report()._repr_markdown_() == sparse.report().to_markdown()


def test_what_lies_on_top_does_not_count_as_changed(sparse):
    """Rounding is judged by what the weight holds without it."""
    put(sparse, at0=[3.0, 0.0, -4.0, 0.0], at1=[0.0, 1e-9, -12.0])
    before = sparse.report()
    diff = SparseDiff.from_dense(torch.full((3, 4), 2.0))
    composer = Composer(sparse.model)
    composer.add("shift", Adapter({"1.weight": diff}))
    composer.apply("shift")
    assert sparse.report() == before
    composer.revert()
    assert sparse.report() == before


def test_nothing_is_written(sparse):
    put(sparse, at0=[3.0, 0.0, -4.0, 0.0], at1=[0.0, 1e-9, -12.0])
    versions = {n: p._version for n, p in sparse.model.named_parameters()}
    sparse.report()
    assert {n: p._version for n, p in sparse.model.named_parameters()} == versions


@pytest.mark.gpu
def test_one_transfer_for_all_tensors():
    """A report waits for the device once, whatever the number of tensors."""
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6))).cuda()
    sparse = attach(model, {f"{i}.weight": torch.eye(8) > 0 for i in range(6)})
    sparse.report()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing") as found:
            sparse.report()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 1
