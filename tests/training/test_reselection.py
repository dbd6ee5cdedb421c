"""Reselection: finds entries that a fixed mask lacks, keeps its promises, resumes bit for bit."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from sparseft import SparseAdamW, attach, attachments_of, select
from sparseft.errors import AttachError, MaskError, NonFiniteLossError, ResumeError
from sparseft.modules import repattern
from sparseft.training import LoopTrainer, Reselection, reselection


class Student(nn.Module):
    """What a teacher with some entries changed has to be found in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 32)
        self.scale = nn.Linear(32, 32)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return torch.cat([h, self.scale(h)], dim=-1)


def teacher_and_student(seed=0):
    """Return student, teacher, {name: positions that differ}, a start mask without any of them."""
    torch.manual_seed(seed)
    student, right, start = Student(), {}, {}
    teacher = copy.deepcopy(student)
    for name in ("layer.weight", "scale.weight"):
        weight = teacher.get_parameter(name).data.view(-1)
        order = torch.randperm(weight.numel())
        changed, others = order[:40], order[40:120]
        weight[changed] += torch.randn(40).sign() * 0.8
        right[name] = set(changed.tolist())
        start[name] = torch.zeros(weight.numel(), dtype=torch.bool)
        start[name][others] = True
        start[name] = start[name].view(teacher.get_parameter(name).shape)
    return student, teacher, right, start


class Pairs(torch.utils.data.Dataset):
    """Inputs and the teacher's outputs."""

    def __init__(self, teacher, rows=256):
        self.x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            self.y = teacher(self.x)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def collate(rows):
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def loop(model, teacher, folder, **options):
    defaults = {
        "steps": 30, "batch_size": 16, "lr": 1e-2, "collate": collate, "loss_fn": mse, "seed": 5,
    }  # fmt: skip
    return LoopTrainer(model, Pairs(teacher), output_dir=folder, **{**defaults, **options})


def bits(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items() if t.numel()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# What it is for.


def test_it_finds_entries_that_a_fixed_mask_lacks(tmp_path):
    losses = {}
    for scope in ("fixed", "tensor", "global"):
        student, teacher, right, start = teacher_and_student()
        base = copy.deepcopy(student)
        sparse = attach(student, start)
        trainer = loop(student, teacher, tmp_path / scope, steps=200, batch_size=64)
        if scope != "fixed":
            trainer.add_callback(
                Reselection(sparse, steps=200, every=8, accumulate=2, rate=0.3, scope=scope)
            )
        trainer.train()
        assert sparse.nnz == 160
        data = Pairs(teacher)
        with torch.no_grad():
            losses[scope] = float(mse(student, (data.x, data.y)))
        found = {n: len(right[n] & set(sparse.patterns[n].indices.tolist())) for n in right}
        assert all(n == 0 if scope == "fixed" else n >= 32 for n in found.values()), found
        for name in right:
            now, then = student.get_parameter(name), base.get_parameter(name)
            outside = ~sparse.patterns[name].to_mask()
            assert torch.equal(now[outside], then[outside]), "dropped entries are the base's"
        sparse.detach()
        assert same(bits(student), bits(base))
    assert max(losses["tensor"], losses["global"]) < losses["fixed"] / 5, losses


@pytest.mark.parametrize("method", ["random", "weight_magnitude"])
@pytest.mark.parametrize("drop", ["diff", "weight"])
def test_any_selectors_masks_are_a_start(method, drop, tmp_path):
    student, teacher, _, _ = teacher_and_student()
    masks = select(student, method=method, nnz=203)
    sparse = attach(student, masks)
    before = {n: p.nnz for n, p in sparse.patterns.items()}
    moving = Reselection(sparse, steps=30, every=5, accumulate=2, rate=0.4, drop=drop)
    trainer = loop(student, teacher, tmp_path)
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
    student, teacher, _, start = teacher_and_student()
    sparse = attach(student, start)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    moving = Reselection(sparse, steps=100, every=4, accumulate=2, rate=0.5, candidates=3.0)
    data, name = Pairs(teacher), "scale.weight"
    sums = []
    for step in range(4):
        rows = slice(16 * step, 16 * step + 16)
        twin = nn.Linear(32, 32)
        twin.load_state_dict({"weight": student.scale.weight, "bias": student.scale.bias})
        with torch.no_grad():
            h = torch.tanh(student.layer(data.x[rows]))
        nn.functional.mse_loss(torch.cat([h, twin(h)], -1), data.y[rows]).backward()
        sums.append(twin.weight.grad.flatten())
        optimizer.zero_grad()
        mse(student, (data.x[rows], data.y[rows])).backward()
        if step == 3:
            old, diff = sparse.patterns[name], sparse.leaves[name].detach().clone()
        moving.step(optimizer)
        if step < 3:
            assert sparse.patterns[name].equals(sparse.patterns[name])
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


def test_rates_follow_the_schedule_to_the_end_and_none_comes_after(caplog):
    def rates(**options):
        student, _, _, start = teacher_and_student()
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


# Promises.


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_run_killed_anywhere_resumes_bit_for_bit(scope, tmp_path):
    """Rounds after 6, 12, ... steps, windows of 3: checkpoints in, at and between them."""

    def build(folder, **options):
        student, teacher, _, start = teacher_and_student()
        sparse = attach(student, start)
        trainer = loop(student, teacher, folder, steps=20, accumulate=2, **options)
        trainer._make_optimizer = lambda p: SparseAdamW(p, lr=1e-2, moment_bits=8)
        moving = Reselection(sparse, steps=20, every=6, accumulate=3, rate=0.4, scope=scope)
        trainer.add_callback(moving)
        return student, sparse, trainer, moving

    whole, sparse, trainer, moving = build(tmp_path / "whole")
    trainer.train()
    assert moving.rounds == 3
    first, masks = sparse.adapter(), sparse.patterns

    class Stop(Exception):
        pass

    class Crash:
        def __init__(self, at):
            self.at = at

        def on_pre_optimizer_step(self, *, step, model, optimizer):
            if step == self.at:
                raise Stop

    for at in (2, 4, 5, 6) if scope == "tensor" else (5, 13):
        folder = tmp_path / str(at)
        _, _, trainer, _ = build(folder, save_every=1)
        trainer.add_callback(Crash(at))
        with pytest.raises(Stop):
            trainer.train()
        torch.manual_seed(at)
        student, again, trainer, moving = build(folder, save_every=1)
        assert f"{at:08d}" in str(trainer.latest_checkpoint())
        trainer.train(resume_from_checkpoint=True)
        assert moving.rounds == 3
        assert all(p.equals(masks[n]) for n, p in again.patterns.items())
        assert same(bits(student), bits(whole))
        assert again.adapter().digest == first.digest


def test_a_loop_of_ones_own_resumes_through_state_dicts():
    def build():
        student, teacher, _, start = teacher_and_student()
        sparse = attach(student, start, compact_state_dict=True)
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
        moving = Reselection(sparse, steps=40, every=5, accumulate=3, rate=0.4)
        return student, Pairs(teacher), sparse, optimizer, moving

    def run(student, data, optimizer, moving, steps):
        for step in steps:
            rows = slice(8 * step, 8 * step + 8)
            optimizer.zero_grad()
            mse(student, (data.x[rows], data.y[rows])).backward()
            moving.step(optimizer)
            optimizer.step()

    student, data, sparse, optimizer, moving = build()
    run(student, data, optimizer, moving, range(8))
    file = io.BytesIO()
    state = {"model": student.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "reselection": moving.state_dict()}, file)
    run(student, data, optimizer, moving, range(8, 20))
    for explicit in (False, True):
        content = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        assert content["reselection"]["candidates"], "saved inside a window"
        fresh, data, again, second, other = build()
        if explicit:
            other.load_state_dict(content["reselection"])
            content["model"] = {k: v for k, v in content["model"].items() if "moving" not in k}
        fresh.load_state_dict(content["model"], strict=False)
        second.load_state_dict(content["optimizer"])
        run(fresh, data, second, other, range(8, 20))
        assert same(bits(fresh), bits(student))
        assert again.adapter().digest == sparse.adapter().digest


def test_loading_an_earlier_state_moves_the_masks_back(tmp_path):
    """The best parameters are loaded at the end, with the masks of their time."""
    scores, seen = iter([0.9, 0.1, 0.2, 0.0]), []
    student, teacher, _, start = teacher_and_student()
    sparse = attach(student, start)

    def evaluate(model):
        seen.append((sparse.patterns, bits(model)))
        return next(scores)

    trainer = loop(
        student, teacher, tmp_path, steps=20, evaluate=evaluate, eval_every=6, load_best=True
    )
    trainer.add_callback(Reselection(sparse, steps=20, every=5, accumulate=2, rate=0.4))
    assert trainer.train().best_step == 6
    (masks, weights), (last, _) = seen[0], seen[-1]
    assert all(p.equals(masks[n]) for n, p in sparse.patterns.items())
    assert not all(p.equals(last[n]) for n, p in sparse.patterns.items())
    assert all(torch.equal(t, weights[n]) for n, t in student.named_parameters())


def test_micro_batches_count_as_one_step(tmp_path):
    masks = []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        student, teacher, _, start = teacher_and_student()
        student, teacher = student.double(), teacher.double()
        sparse = attach(student, start)
        data = Pairs(teacher.float())
        data.x, data.y = data.x.double(), data.y.double()
        trainer = LoopTrainer(
            student, data, output_dir=tmp_path, steps=12, batch_size=batch_size,
            accumulate=accumulate, collate=collate, loss_fn=mse, shuffle=False,
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
        student, teacher, _, start = teacher_and_student()
        sparse = attach(student, start)
        model, data = wrap(student), Pairs(teacher)
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
        moving = Reselection(sparse, steps=40, every=5, accumulate=2, rate=0.4)
        for step in range(40):
            optimizer.zero_grad()
            rows = slice(4 * step, 4 * step + 32)
            mse(model, (data.x[rows], data.y[rows])).backward()
            moving.step(optimizer)
            optimizer.step()
            if step == 0:
                first = len(compiled)
        assert moving.rounds == 7
        digests.append(sparse.adapter().digest)
    assert digests[0] == digests[1]
    assert len(compiled) == first > 0


def test_frozen_leaves_and_full_parameters_stay_out(tmp_path):
    student, teacher, _, start = teacher_and_student()
    sparse = attach(student, start, full_params=["*.bias"])
    sparse.leaves["layer.weight"].requires_grad_(False)
    still = sparse.patterns["layer.weight"]
    trainer = loop(student, teacher, tmp_path)
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
    student, teacher, _, start = teacher_and_student()
    sparse = attach(student, start)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.0)
    moving = Reselection(sparse, steps=100, every=2, accumulate=2, rate=0.4)
    data, before = Pairs(teacher), sparse.patterns
    for step in range(4):
        loss = mse(student, (data.x, data.y))
        (loss * factor if step == bad else loss).backward()
        moving.step(optimizer)
        optimizer.zero_grad()
        if step == 1:
            assert all(p is before[n] for n, p in sparse.patterns.items())
            assert "NaN" in caplog.text
    assert moving.rounds == 1
    assert moving.moved > 0


def test_candidates_take_eight_bytes_each_and_nothing_between_windows():
    student, teacher, _, start = teacher_and_student()
    sparse = attach(student, start)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    moving = Reselection(sparse, steps=1000, every=5, accumulate=2, rate=0.1, candidates=2.0)
    data, sizes = Pairs(teacher), []
    for _ in range(10):
        mse(student, (data.x, data.y)).backward()
        moving.step(optimizer)
        sizes.append(sum(f.indices.nbytes + f.scores.nbytes for f in moving._window.found.values()))
    grow = int(0.1 * (1 - 5 / 1000) * 80)
    assert sizes[:5] == [0, 0, 0, 2 * 2 * grow * 8, 0]
    assert sizes[9] == 0


class Memory:
    """Peak of what is allocated inside a ``with`` block, above what was there."""

    def __enter__(self):
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        level = self.peak = 0
        for event in self._profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                self.peak = max(self.peak, level)


def test_no_dense_gradient_is_formed_in_a_window_or_a_round():
    side, x = 4096, torch.randn(2, 4096)
    model = nn.Linear(side, side, bias=False)
    with Memory() as dense:
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
        with Memory() as memory:
            model(x).pow(2).sum().backward()
            moving.step(optimizer)
            optimizer.step()
        peaks.append(memory.peak / (4 * side * side))
    assert moving.rounds == 1
    # A tile (1/16 of dW) and what the ranking of a piece of 1 Mi entries takes.
    assert max(peaks) < 0.4, peaks


def test_copies_pickles_and_detach_inside_a_window():
    student, teacher, _, start = teacher_and_student()
    sparse = attach(student, start)
    classes = {n: type(m) for n, m in student.named_modules()}
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    moving = Reselection(sparse, steps=100, every=4, accumulate=3, rate=0.4)
    data = Pairs(teacher)
    for _ in range(2):
        mse(student, (data.x, data.y)).backward()
        moving.step(optimizer)
    assert {n: type(m) for n, m in student.named_modules()} != classes, "tapped"
    twin = copy.deepcopy(student)
    file = io.BytesIO()
    torch.save(student, file)
    read = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for other in (twin, read):
        assert same(bits(other), bits(student))
        attachments_of(other)[-1].detach()
        assert type(other.layer) is nn.Linear
        assert not [n for n in other.state_dict() if "moving" in n]
    sparse.detach()
    assert type(student.layer) is nn.Linear
    assert not [n for n in student.state_dict() if "moving" in n]
    again = Reselection(attach(student, start), steps=10)
    again.close()


# Refusals.


def test_options_out_of_range_are_named():
    student, _, _, start = teacher_and_student()
    sparse = attach(student, start)
    for options, message in (
        ({"every": 0}, "every must be at least 1"),
        ({"every": 3, "accumulate": 4}, "accumulate=4 steps do not fit"),
        ({"rate": 1.0}, "rate=1.0"),
        ({"candidates": 0.5}, "candidates=0.5"),
        ({"schedule": "lineer"}, "schedule='lineer' is not one of .*'linear'"),
        ({"scope": "row"}, "scope='row'"),
        ({"drop": "grad"}, "drop='grad'"),
    ):
        with pytest.raises(ValueError, match=message):
            Reselection(sparse, steps=10, **options)
    with pytest.raises(AttachError, match="got NoneType. In lottery_ticket"):
        Reselection(None, steps=10)
    moving = Reselection(sparse)
    with pytest.raises(AttachError, match="a Reselection moves masks of this model already"):
        Reselection(sparse, steps=10)
    with pytest.raises(ValueError, match="pass steps="):
        moving.step(torch.optim.SGD(sparse.parameters(), lr=0.1))


def test_states_of_other_runs_are_refused(tmp_path):
    student, teacher, _, start = teacher_and_student()
    sparse = attach(student, start)
    moving = Reselection(sparse, steps=10)
    state = moving.state_dict()
    with pytest.raises(ResumeError, match="format 7"):
        moving.load_state_dict({**state, "format": 7})
    with pytest.raises(ResumeError, match=r"began with Reselection\(rate=0.3\).* 0.2"):
        moving.load_state_dict({**state, "settings": {**state["settings"], "rate": 0.3}})
    fewer = {n: i for n, i in state["indices"].items() if n != "layer.weight"}
    with pytest.raises(ResumeError, match="mask other parameters; 1 differ, first 'layer.weight'"):
        moving.load_state_dict({**state, "indices": fewer})
    wild = {**state["indices"], "layer.weight": torch.tensor([5, 4])}
    with pytest.raises(MaskError, match="state of 'layer.weight'.*not fit"):
        moving.load_state_dict({**state, "indices": wild})
    damaged = {**moving.tensors(), "state": torch.tensor(list(b"[1]"), dtype=torch.uint8)}
    with pytest.raises(ResumeError, match="is damaged"):
        moving.load_tensors(damaged)
    candidates = {"layer.weight": state["indices"]["layer.weight"]}
    with pytest.raises(ResumeError, match="candidates of 'layer.weight' lack scores"):
        moving.load_state_dict({**state, "candidates": candidates})
    assert sparse.patterns["layer.weight"].to_mask().equal(start["layer.weight"])
    trainer = loop(student, teacher, tmp_path, steps=4)
    trainer.add_callback(moving)
    trainer.train()
    with pytest.raises(ResumeError, match="trainer is at step 0, its Reselection at 4"):
        trainer.train()


def test_a_diverged_run_is_stopped_by_the_trainer(tmp_path):
    student, teacher, _, start = teacher_and_student()
    sparse = attach(student, start)
    trainer = loop(student, teacher, tmp_path, loss_fn=lambda m, b: mse(m, b) * math.nan)
    trainer.add_callback(Reselection(sparse, steps=30, every=5, accumulate=2))
    with pytest.raises(NonFiniteLossError):
        trainer.train()


# Processes.

SCRIPT = """
import sys
import torch
from torch import nn
from sparseft import attach
from sparseft.errors import AttachError
from sparseft.training.reselection import Reselection

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(31, 12), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 31))
model[3].weight.data.mul_(3)
base = {n: p.detach().clone() for n, p in model.named_parameters()}
masks = {n: torch.rand_like(p) < 0.2 for n, p in model.named_parameters() if p.ndim > 1}
sparse = attach(model, masks)
optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
ddp = nn.parallel.DistributedDataParallel(model)
try:
    Reselection(sparse, steps=12, scope="global")
    refused = ""
except AttachError as error:
    refused = str(error)
moving = Reselection(sparse, steps=12, every=4, accumulate=2, rate=0.4)
torch.manual_seed(rank)
for step in range(12):
    optimizer.zero_grad()
    data = torch.randint(0, 31, (8, 5))  # other data on each rank
    nn.functional.cross_entropy(ddp(data).flatten(0, 1), data.flatten()).backward()
    moving.step(optimizer)
    optimizer.step()
weights = {n: m.weight.detach().clone() for n, m in sparse._masked.items()}
patterns = {n: p.indices for n, p in sparse.patterns.items()}
changed = sum((~masks[n].flatten()[i.long()]).sum().item() for n, i in patterns.items())
try:
    sparse.reselect_({"1.weight": torch.ones(16, 12) > 0}, optimizer=optimizer)
    resized = ""
except AttachError as error:
    resized = str(error)
with torch.no_grad():  # as if rank 1 had gone its own way
    sparse.leaves["1.weight"].add_(rank * torch.randn(sparse.leaves["1.weight"].shape))
apart = ""
moving.close()
moving = Reselection(sparse, steps=12, every=2, accumulate=1, rate=0.4)
try:
    for step in range(2):
        nn.functional.cross_entropy(ddp(data).flatten(0, 1), data.flatten()).backward()
        moving.step(optimizer)
except AttachError as error:
    apart = str(error)
sparse.detach()
restored = all(torch.equal(p, base[n]) for n, p in model.named_parameters())
torch.save({"weights": weights, "patterns": patterns, "changed": changed, "refused": refused,
            "resized": resized, "apart": apart, "restored": restored}, f"{out}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_what_several_processes_cannot_do_is_named(monkeypatch):
    student, _, _, start = teacher_and_student()
    sparse = attach(student, start)
    monkeypatch.setattr(reselection, "processes", lambda group=None: 2)
    with pytest.raises(AttachError, match=r"scope='global' .* 2 processes .* scope='tensor'"):
        Reselection(sparse, steps=10, scope="global")
    monkeypatch.setattr(repattern, "processes", lambda: 2)
    more = ~start["layer.weight"]
    with pytest.raises(AttachError, match=r"'layer.weight': 80 entries cannot become 688"):
        sparse.reselect_({"layer.weight": more}, optimizer=None)


@pytest.mark.slow  # two processes that import torch
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_two_ranks_move_their_masks_alike(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store"), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert zero["changed"] > 20
    for name, weight in zero["weights"].items():
        assert torch.equal(weight, one["weights"][name]), name
        assert torch.equal(zero["patterns"][name], one["patterns"][name]), name
    for result in (zero, one):
        assert "scope='tensor'" in result["refused"]
        assert "'1.weight'" in result["resized"]
        assert "ranks disagree on the new mask of '1.weight'" in result["apart"]
        assert result["restored"]
