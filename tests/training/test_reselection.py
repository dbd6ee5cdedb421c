"""Reselection: finds entries that a fixed mask lacks, and keeps its promises meanwhile."""

from __future__ import annotations

import copy
import gc
import importlib.util
import io
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseft import attach, attachments_of, select
from sparseft.errors import AttachError, NonFiniteLossError
from sparseft.profiling.allocations import Allocations
from sparseft.training import LoopTrainer, Reselection

_spec = importlib.util.spec_from_file_location("_moving", Path(__file__).with_name("_moving.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)


def test_it_finds_entries_that_a_fixed_mask_lacks(tmp_path):
    losses = {}
    for scope in ("fixed", "tensor", "global"):
        student, teacher, right, start = kit.teacher_and_student()
        base = copy.deepcopy(student)
        sparse = attach(student, start)
        trainer = kit.loop(student, teacher, tmp_path / scope, steps=200, batch_size=64)
        if scope != "fixed":
            trainer.add_callback(
                Reselection(sparse, steps=200, every=8, accumulate=2, rate=0.3, scope=scope)
            )
        trainer.train()
        assert sparse.nnz == 160
        data = kit.Pairs(teacher)
        with torch.no_grad():
            losses[scope] = float(kit.mse(student, (data.x, data.y)))
        found = {n: len(right[n] & set(sparse.patterns[n].indices.tolist())) for n in right}
        assert all(n == 0 if scope == "fixed" else n >= 32 for n in found.values()), found
        for name in right:
            now, then = student.get_parameter(name), base.get_parameter(name)
            outside = ~sparse.patterns[name].to_mask()
            assert torch.equal(now[outside], then[outside]), "dropped entries are the base's"
        sparse.detach()
        assert kit.same(kit.bits(student), kit.bits(base))
    assert max(losses["tensor"], losses["global"]) < losses["fixed"] / 5, losses


@pytest.mark.parametrize("method", ["random", "weight_magnitude"])
@pytest.mark.parametrize("drop", ["diff", "weight"])
def test_any_selectors_masks_are_a_start(method, drop, tmp_path):
    student, teacher, _, _ = kit.teacher_and_student()
    masks = select(student, method=method, nnz=203)
    sparse = attach(student, masks)
    before = {n: p.nnz for n, p in sparse.patterns.items()}
    moving = Reselection(sparse, steps=30, every=5, accumulate=2, rate=0.4, drop=drop)
    trainer = kit.loop(student, teacher, tmp_path)
    trainer.add_callback(moving)
    trainer.train()
    assert {n: p.nnz for n, p in sparse.patterns.items()} == before
    assert moving.rounds == 5
    changed = sum(
        len(set(p.indices.tolist()) - set(masks[n].indices.tolist()))
        for n, p in sparse.patterns.items()
    )
    assert 0 < changed <= moving.moved
    adapter = sparse.adapter()
    assert all(d.pattern.equals(sparse.patterns[n]) for n, d in adapter.diffs.items())


def test_grown_entries_are_the_largest_sums_of_the_window():
    """By hand: dense gradients of the window, ranked at the candidates of its first step."""
    student, teacher, _, start = kit.teacher_and_student()
    sparse = attach(student, start)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    moving = Reselection(sparse, steps=100, every=4, accumulate=2, rate=0.5, candidates=3.0)
    data, name = kit.Pairs(teacher), "scale.weight"
    old_pattern, sums = sparse.patterns[name], []
    for step in range(4):
        rows = slice(16 * step, 16 * step + 16)
        twin = nn.Linear(32, 32)
        twin.load_state_dict({"weight": student.scale.weight, "bias": student.scale.bias})
        with torch.no_grad():
            h = torch.tanh(student.layer(data.x[rows]))
        nn.functional.mse_loss(torch.cat([h, twin(h)], -1), data.y[rows]).backward()
        sums.append(twin.weight.grad.flatten())
        optimizer.zero_grad()
        kit.mse(student, (data.x[rows], data.y[rows])).backward()
        if step == 3:
            old, diff = sparse.patterns[name], sparse.leaves[name].detach().clone()
        moving.step(optimizer)
        if step < 3:
            assert sparse.patterns[name].equals(old_pattern)
            optimizer.step()
    count = int(0.5 * (1 - 4 / 100) * 80)
    first = sums[2].abs()
    first[old.indices.long()] = -1
    candidates = first.topk(3 * count).indices
    total = (sums[2] + sums[3])[candidates].abs()
    grown = set(candidates[total.topk(count).indices].tolist())
    dropped = set(old.indices[diff.abs().topk(count, largest=False).indices].tolist())
    new = set(sparse.patterns[name].indices.tolist())
    assert new == (set(old.indices.tolist()) - dropped) | grown
    assert len(new) == 80


def test_rates_follow_the_schedule_to_the_end_and_none_comes_after():
    def rates(**options):
        student, _, _, start = kit.teacher_and_student()
        moving = Reselection(attach(student, start), every=10, accumulate=1, **options)
        return [moving._rate_at(step) for step in (10, 50, 90, 100, 110)]

    linear = rates(steps=100, rate=0.2)
    assert linear == pytest.approx([0.18, 0.1, 0.02, 0.0, 0.0])
    cosine = rates(steps=100, schedule="cosine", rate=0.5)
    assert cosine[1] == pytest.approx(0.25)
    assert cosine[0] == pytest.approx(0.25 * (1 + math.cos(0.1 * math.pi)))
    assert cosine[3:] == [0.0, 0.0]
    assert rates(steps=200, stop=50, rate=0.2)[1:] == [0.0] * 4
    assert rates(schedule="constant", rate=0.2) == [0.2] * 5


def test_micro_batches_count_as_one_step(tmp_path):
    masks = []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        student, teacher, _, start = kit.teacher_and_student()
        student, teacher = student.double(), teacher.double()
        sparse = attach(student, start)
        data = kit.Pairs(teacher.float())
        data.x, data.y = data.x.double(), data.y.double()
        trainer = LoopTrainer(
            student, data, output_dir=tmp_path, steps=12, batch_size=batch_size,
            accumulate=accumulate, collate=kit.collate, loss_fn=kit.mse, shuffle=False,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.5),  # AdamW's first diffs are all equal
        )  # fmt: skip
        # Every free entry is a candidate: the first micro-batch alone would name others.
        trainer.add_callback(
            Reselection(sparse, steps=12, every=4, accumulate=2, rate=0.1, candidates=1e4)
        )
        trainer.train()
        masks.append(sparse.patterns)
    assert all(p.equals(masks[1][n]) for n, p in masks[0].items())


def test_a_compiled_model_is_compiled_once():
    gc.collect()  # windows that other tests left open
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    digests = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend=backend)):
        student, teacher, _, start = kit.teacher_and_student()
        sparse = attach(student, start)
        model, data = wrap(student), kit.Pairs(teacher)
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
        moving = Reselection(sparse, steps=40, every=5, accumulate=2, rate=0.4)
        for step in range(40):
            optimizer.zero_grad()
            rows = slice(4 * step, 4 * step + 32)
            kit.mse(model, (data.x[rows], data.y[rows])).backward()
            moving.step(optimizer)
            optimizer.step()
            if step == 0:
                first = len(compiled)
        assert moving.rounds == 7
        digests.append(sparse.adapter().digest)
    assert digests[0] == digests[1]
    assert len(compiled) == first > 0


def test_frozen_leaves_and_full_parameters_stay_out(tmp_path):
    student, teacher, _, start = kit.teacher_and_student()
    sparse = attach(student, start, full_params=["*.bias"])
    sparse.leaves["layer.weight"].requires_grad_(False)
    still = sparse.patterns["layer.weight"]
    trainer = kit.loop(student, teacher, tmp_path)
    moving = Reselection(sparse, steps=30, every=5, accumulate=2, rate=0.4)
    trainer.add_callback(moving)
    trainer.train()
    assert sparse.patterns["layer.weight"] is still
    assert moving.moved > 0
    assert student.layer._parameters["weight"].requires_grad is False
    assert {n for n, p in student.named_parameters() if p.requires_grad} == {
        "layer.bias", "scale.bias", "scale.diff_weight",
    }  # fmt: skip


@pytest.mark.parametrize("bad", [0, 1], ids=["while_naming", "while_summing"])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_overflown_gradients_leave_the_masks_alone(bad, factor, caplog):
    """GradScaler skips such a step; the round it falls in is skipped as well."""
    student, teacher, _, start = kit.teacher_and_student()
    sparse = attach(student, start)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.0)
    moving = Reselection(sparse, steps=100, every=2, accumulate=2, rate=0.4)
    data, before = kit.Pairs(teacher), sparse.patterns
    for step in range(4):
        loss = kit.mse(student, (data.x, data.y))
        (loss * factor if step == bad else loss).backward()
        moving.step(optimizer)
        optimizer.zero_grad()
        if step == 1:
            assert all(p is before[n] for n, p in sparse.patterns.items())
            assert "NaN" in caplog.text
    assert moving.rounds == 1
    assert moving.moved > 0


def test_candidates_take_eight_bytes_each_and_nothing_between_windows():
    student, teacher, _, start = kit.teacher_and_student()
    sparse = attach(student, start)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    moving = Reselection(sparse, steps=1000, every=5, accumulate=2, rate=0.1, candidates=2.0)
    data, sizes = kit.Pairs(teacher), []
    for _ in range(10):
        kit.mse(student, (data.x, data.y)).backward()
        moving.step(optimizer)
        sizes.append(sum(f.indices.nbytes + f.scores.nbytes for f in moving._window.found.values()))
    grow = int(0.1 * (1 - 5 / 1000) * 80)
    assert sizes[:5] == [0, 0, 0, 2 * 2 * grow * 8, 0]
    assert sizes[9] == 0


def test_no_dense_gradient_is_formed_in_a_window_or_a_round():
    side, x = 4096, torch.randn(2, 4096)
    model = nn.Linear(side, side, bias=False)
    with Allocations() as dense:
        model(x).pow(2).sum().backward()
    assert dense.peak >= 4 * side * side
    model.weight.grad = None
    mask = torch.zeros(side * side, dtype=torch.bool)
    mask[::400] = True
    sparse = attach(model, {"weight": mask.view(side, side)})
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-4)
    moving = Reselection(sparse, steps=1000, every=3, accumulate=2)
    peaks = []
    for _ in range(3):  # outside, naming candidates, and at candidates with the round
        with Allocations() as memory:
            model(x).pow(2).sum().backward()
            moving.step(optimizer)
            optimizer.step()
        peaks.append(memory.peak / (4 * side * side))
    assert moving.rounds == 1
    # A tile (1/16 of dW) and what the ranking of a piece of 1 Mi entries takes.
    assert max(peaks) < 0.4, peaks


def test_copies_pickles_and_detach_inside_a_window(monkeypatch):
    monkeypatch.setitem(sys.modules, kit.__name__, kit)  # pickle imports the class
    student, teacher, _, start = kit.teacher_and_student()
    sparse = attach(student, start)
    classes = {n: type(m) for n, m in student.named_modules()}
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    moving = Reselection(sparse, steps=100, every=4, accumulate=3, rate=0.4)
    data = kit.Pairs(teacher)
    for _ in range(2):
        kit.mse(student, (data.x, data.y)).backward()
        moving.step(optimizer)
    assert {n: type(m) for n, m in student.named_modules()} != classes, "tapped"
    twin = copy.deepcopy(student)
    file = io.BytesIO()
    torch.save(student, file)
    read = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for other in (twin, read):
        assert kit.same(kit.bits(other), kit.bits(student))
        attachments_of(other)[-1].detach()
        assert type(other.layer) is nn.Linear
        assert not [n for n in other.state_dict() if "moving" in n]
    sparse.detach()
    assert type(student.layer) is nn.Linear
    assert not [n for n in student.state_dict() if "moving" in n]
    again = Reselection(attach(student, start), steps=10)
    again.close()


def test_options_out_of_range_are_named():
    student, _, _, start = kit.teacher_and_student()
    sparse = attach(student, start)
    for options, message in (
        ({"every": 0}, "every must be at least 1"),
        ({"every": 3, "accumulate": 4}, "accumulate=4 steps do not fit"),
        ({"rate": 1.0}, "rate=1.0"),
        ({"candidates": 0.5}, "candidates=0.5"),
        ({"schedule": "lineer"}, "schedule='lineer' is not one of .*'linear'"),
        ({"scope": "row"}, "scope='row'"),
        ({"drop": "grad"}, "drop='grad'"),
        ({"drop": None}, "drop=None is not one of"),
        ({"schedule": None}, "schedule=None is not one of"),
        ({"every": "20"}, "every must be an integer, got '20'"),
        ({"accumulate": True}, "accumulate must be an integer, got True"),
        ({"rate": "0.2"}, "rate must be a number, got '0.2'"),
        ({"candidates": math.inf}, "candidates=inf; it should be .*finite"),
        ({"steps": "100"}, "steps must be an integer, got '100'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": -4}, "steps must be at least 1, got -4"),
        ({"stop": -1}, "stop must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Reselection(sparse, **{"steps": 10, **options})
    with pytest.raises(AttachError, match="got NoneType. In lottery_ticket"):
        Reselection(None, steps=10)
    moving = Reselection(sparse)
    with pytest.raises(AttachError, match="a Reselection moves masks of this model already"):
        Reselection(sparse, steps=10)
    with pytest.raises(ValueError, match="pass steps="):
        moving.step(torch.optim.SGD(sparse.parameters(), lr=0.1))
    moving.close()
    moving = Reselection(sparse, steps=10)
    for given, name in ((None, "NoneType"), ("adam", "'adam'"), ([], "list")):
        with pytest.raises(AttachError, match=f"wanted the optimizer .*, got {name}"):
            moving.step(given)
    assert moving.state_dict()["step"] == 0
    sparse.detach()
    with pytest.raises(AttachError, match="Reselection: these masks were detached"):
        Reselection(sparse, steps=10)


def test_options_may_be_numbers_of_other_types():
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    student, _, _, start = kit.teacher_and_student()
    moving = Reselection(
        attach(student, start), every=np.int64(4), steps=np.int32(8), rate=np.float32(0.5),
        accumulate=2, candidates=4,
    )  # fmt: skip
    moving.load_tensors(moving.tensors())  # JSON inside
    assert moving.state_dict()["settings"]["every"] == 4


def test_a_diverged_run_is_stopped_by_the_trainer(tmp_path):
    student, teacher, _, start = kit.teacher_and_student()
    sparse = attach(student, start)
    trainer = kit.loop(student, teacher, tmp_path, loss_fn=lambda m, b: kit.mse(m, b) * math.nan)
    trainer.add_callback(Reselection(sparse, steps=30, every=5, accumulate=2))
    with pytest.raises(NonFiniteLossError):
        trainer.train()
