"""A run with moving masks, killed anywhere, goes on to the same bits; other states are refused."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
import torch

from sparseft import SparseAdamW, attach
from sparseft.errors import MaskError, ResumeError
from sparseft.training import Reselection

_spec = importlib.util.spec_from_file_location("_moving", Path(__file__).with_name("_moving.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_run_killed_anywhere_resumes_bit_for_bit(scope, tmp_path):
    """Rounds after 6, 12, ... steps, windows of 3: checkpoints in, at and between them."""

    def build(folder, **options):
        student, teacher, _, start = kit.teacher_and_student()
        sparse = attach(student, start)
        trainer = kit.loop(student, teacher, folder, steps=20, accumulate=2, **options)
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
        assert kit.same(kit.bits(student), kit.bits(whole))
        assert again.adapter().digest == first.digest


def test_a_loop_of_ones_own_resumes_through_state_dicts():
    def build():
        student, teacher, _, start = kit.teacher_and_student()
        sparse = attach(student, start, compact_state_dict=True)
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
        moving = Reselection(sparse, steps=40, every=5, accumulate=3, rate=0.4)
        return student, kit.Pairs(teacher), sparse, optimizer, moving

    def run(student, data, optimizer, moving, steps):
        for step in steps:
            rows = slice(8 * step, 8 * step + 8)
            optimizer.zero_grad()
            kit.mse(student, (data.x[rows], data.y[rows])).backward()
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
        assert kit.same(kit.bits(fresh), kit.bits(student))
        assert again.adapter().digest == sparse.adapter().digest


def test_loading_an_earlier_state_moves_the_masks_back(tmp_path):
    """The best parameters are loaded at the end, with the masks of their time."""
    scores, seen = iter([0.9, 0.1, 0.2, 0.0]), []
    student, teacher, _, start = kit.teacher_and_student()
    sparse = attach(student, start)

    def evaluate(model):
        seen.append((sparse.patterns, kit.bits(model)))
        return next(scores)

    trainer = kit.loop(
        student, teacher, tmp_path, steps=20, evaluate=evaluate, eval_every=6, load_best=True
    )
    trainer.add_callback(Reselection(sparse, steps=20, every=5, accumulate=2, rate=0.4))
    assert trainer.train().best_step == 6
    (masks, weights), (last, _) = seen[0], seen[-1]
    assert all(p.equals(masks[n]) for n, p in sparse.patterns.items())
    assert not all(p.equals(last[n]) for n, p in sparse.patterns.items())
    assert all(torch.equal(t, weights[n]) for n, t in student.named_parameters())


def test_states_of_other_runs_are_refused(tmp_path):
    student, teacher, _, start = kit.teacher_and_student()
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
    with pytest.raises(ResumeError, match="state is a NoneType"):
        moving.load_state_dict(None)
    without = {k: v for k, v in state.items() if k != "settings"}
    with pytest.raises(ResumeError, match="'settings' is missing. Load what"):
        moving.load_state_dict(without)
    for part, value in (("step", "4"), ("moved", -1), ("indices", {"layer.weight": [1]})):
        with pytest.raises(ResumeError, match=f"damaged: '{part}' is .*wanted"):
            moving.load_state_dict({**state, part: value})
    damaged = {**moving.tensors(), "state": torch.tensor(list(b"[1]"), dtype=torch.uint8)}
    with pytest.raises(ResumeError, match="is damaged"):
        moving.load_tensors(damaged)
    candidates = {"layer.weight": state["indices"]["layer.weight"]}
    with pytest.raises(ResumeError, match="candidates of 'layer.weight' lack scores"):
        moving.load_state_dict({**state, "candidates": candidates})
    assert sparse.patterns["layer.weight"].to_mask().equal(start["layer.weight"])
    trainer = kit.loop(student, teacher, tmp_path, steps=4)
    trainer.add_callback(moving)
    trainer.train()
    with pytest.raises(ResumeError, match="trainer is at step 0, its Reselection at 4"):
        trainer.train()


@pytest.mark.parametrize("compact", [False, True])
def test_loading_without_a_reselection_says_what_to_make(compact):
    def build():
        student, teacher, _, start = kit.teacher_and_student()
        return student, kit.Pairs(teacher), attach(student, start, compact_state_dict=compact)

    def options(sparse):
        return Reselection(sparse, steps=40, every=2, accumulate=1, rate=0.4)

    student, data, sparse = build()
    optimizer, moving = torch.optim.SGD(sparse.parameters(), lr=0.5), options(sparse)
    unmoved = {n: t.clone() for n, t in student.state_dict().items()}
    for _ in range(2):
        kit.mse(student, (data.x, data.y)).backward()
        moving.step(optimizer)
        optimizer.step()
    assert moving.moved
    saved = student.state_dict()

    fresh, _, again = build()
    before = kit.bits(fresh)
    fresh.load_state_dict(unmoved, strict=False)  # no mask differs: nothing to refuse
    with pytest.raises(ResumeError, match=r"masks moved in training .*Make Reselection\(") as error:
        fresh.load_state_dict(saved, strict=False)
    assert "_sparseft_moving.* keys" in str(error.value)
    assert kit.same(kit.bits(fresh), before)
    wrapped = torch.nn.ModuleDict({"inner": fresh})  # as DistributedDataParallel puts a name before
    with pytest.raises(ResumeError, match=r"its inner\._sparseft_moving\."):
        wrapped.load_state_dict({f"inner.{n}": t for n, t in saved.items()}, strict=False)
    options(again)
    fresh.load_state_dict(saved, strict=False)
    assert again.adapter().digest == sparse.adapter().digest
    hooks = fresh._load_state_dict_pre_hooks, fresh._state_dict_hooks
    assert all(hooks)
    again.detach()
    assert not any(hooks)
