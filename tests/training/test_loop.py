"""LoopTrainer: what one step does, exact resume, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparseft.errors import DataError, NonFiniteLossError, ResumeError
from sparseft.training import LoopTrainer
from sparseft.training.schedule import SCHEDULES, batch_order


class Pairs(torch.utils.data.Dataset):
    def __init__(self, n=20, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(n, 4, generator=g), torch.randn(n, 2, generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def collate(rows):
    return tuple(torch.stack(c) for c in zip(*rows, strict=True))


def mse(model, batch):
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))


def trainer(model, folder, **options):
    defaults = {
        "steps": 12,
        "batch_size": 3,
        "lr": 1e-2,
        "collate": collate,
        "loss_fn": mse,
        "output_dir": folder,
        "seed": 5,
    }
    return LoopTrainer(model, options.pop("dataset", Pairs()), **{**defaults, **options})


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_batch_order_visits_every_example_once_an_epoch_and_starts_anywhere():
    order = batch_order(10, 3, seed=1)
    batches = [next(order) for _ in range(8)]
    assert [len(b) for b in batches] == [3, 3, 3, 1] * 2
    assert sorted(sum(batches[:4], [])) == list(range(10)) == sorted(sum(batches[4:], []))
    assert batches[:4] != batches[4:]
    for start in range(8):
        again = batch_order(10, 3, seed=1, start=start)
        assert [next(again) for _ in range(8 - start)] == batches[start:]
    plain = batch_order(10, 3, seed=1, shuffle=False)
    assert next(plain) == [0, 1, 2]


def test_one_step_is_clipped_adamw_on_the_mean_gradient(tmp_path):
    model, twin = nn.Linear(4, 2), nn.Linear(4, 2)
    twin.load_state_dict(model.state_dict())
    data = Pairs(4)
    trainer(
        model, tmp_path, dataset=data, steps=1, batch_size=4, max_grad_norm=0.1, shuffle=False
    ).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    mse(twin, (data.x, data.y)).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    optimizer.step()
    assert norm > 0.1  # otherwise clipping was not exercised
    assert equal(state(model), state(twin))


def test_accumulating_gives_the_gradient_of_the_whole_batch(tmp_path):
    seen = []

    class Look:
        def __init__(self, model):
            self.model = model

        def on_pre_optimizer_step(self, *, step, model, optimizer):
            seen.append([p.grad.double().clone() for p in self.model.parameters()])

    for batch_size, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = nn.Linear(4, 2).double()
        data = Pairs(8)
        data.x, data.y = data.x.double(), data.y.double()
        loop = trainer(
            model,
            tmp_path,
            dataset=data,
            steps=1,
            batch_size=batch_size,
            accumulate=accumulate,
            shuffle=False,
            max_grad_norm=0.0,
        )
        loop.add_callback(Look(model))
        loop.train()
    for whole, parts in zip(*seen, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_warm_up_and_stay_in_range(name):
    factors = [SCHEDULES[name](s, 100, 10) for s in range(100)]
    assert factors[0] == 0.0
    assert factors[10] == pytest.approx(1.0, abs=1e-6)
    assert all(0 <= f <= 1 for f in factors)
    if name != "constant":
        assert factors[-1] < 0.02
    assert SCHEDULES[name](0, 100, 0) == 1.0


@pytest.mark.parametrize("stop_at", [1, 4, 7, 11])
def test_a_run_continued_from_its_checkpoint_has_the_same_bits(tmp_path, stop_at):
    whole = net()
    log = trainer(whole, tmp_path / "a", log_every=5).train()

    class Stop(Exception):
        pass

    class Crash:
        def on_pre_optimizer_step(self, *, step, model, optimizer):
            if step == stop_at:
                raise Stop

    broken = net()
    loop = trainer(broken, tmp_path / "b", save_every=3, log_every=5)
    loop.add_callback(Crash())
    with pytest.raises(Stop):
        loop.train()
    torch.manual_seed(99)  # the next process has other generators
    resumed = net(seed=7)  # and whatever initial values
    resumed.load_state_dict(net().state_dict())
    loop = trainer(resumed, tmp_path / "b", save_every=3, log_every=5)
    checkpoint = loop.latest_checkpoint()
    assert (checkpoint is None) == (stop_at < 3)
    again = loop.train(resume_from_checkpoint=True)
    assert equal(state(whole), state(resumed))
    assert again.history == log.history
    assert again.training_loss == log.training_loss


def test_only_the_newest_checkpoints_are_kept_and_cleared(tmp_path):
    loop = trainer(net(), tmp_path, save_every=2, keep_checkpoints=2)
    loop.train()
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == [
        "checkpoint-00000008.pt",
        "checkpoint-00000010.pt",
    ]
    loop.clear_checkpoints()
    assert not list(tmp_path.glob("*.pt"))


def test_the_best_parameters_are_loaded_and_evaluating_changes_nothing(tmp_path):
    scores = iter([0.1, 0.9, 0.5, 0.2])
    kept = []

    def evaluate(model):
        torch.rand(3)  # a metric may draw
        assert not model.training
        kept.append(state(model))
        return next(scores)

    model, plain = net(), net()
    result = trainer(model, tmp_path / "a", evaluate=evaluate, eval_every=3, load_best=True).train()
    trainer(plain, tmp_path / "b").train()
    assert result.best_step == 6
    assert equal(state(model), kept[1])
    assert equal(state(plain), kept[3])
    assert model.training


@pytest.mark.parametrize("bad_step", [0, 5])
def test_a_nan_loss_stops_before_the_step_and_names_the_last_good_checkpoint(tmp_path, bad_step):
    calls = []

    def loss(model, batch):
        calls.append(None)
        value = mse(model, batch)
        return value * math.nan if len(calls) - 1 == bad_step else value

    model = net()
    with pytest.raises(NonFiniteLossError, match=rf"nan at step {bad_step} of 12") as caught:
        trainer(model, tmp_path, loss_fn=loss, save_every=2).train()
    assert ("checkpoint-00000004.pt" if bad_step else "No checkpoint") in str(caught.value)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_infinite_gradient_of_a_finite_loss_stops_too(tmp_path):
    def loss(model, batch):
        value = mse(model, batch)
        return value.detach() + torch.sqrt(value - value.detach())  # d sqrt at 0 is infinite

    model = net()
    before = state(model)
    with pytest.raises(NonFiniteLossError, match="gradient norm"):
        trainer(model, tmp_path, loss_fn=loss).train()
    assert equal(before, state(model))


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="empty"):
        trainer(net(), tmp_path, dataset=[])


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="'lineer' is not one of .*Did you mean 'linear'"):
        trainer(net(), tmp_path, schedule="lineer")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        trainer(net(), tmp_path, steps=0)
    with pytest.raises(ValueError, match="load_best needs evaluate"):
        trainer(net(), tmp_path, load_best=True)
    frozen = net().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        trainer(frozen, tmp_path).train()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer(net(), tmp_path, save_every=4).train()
    other = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ResumeError, match="other trainable parameters"):
        trainer(other, tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_carries_code_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"format": 1, "state": Evil()}, tmp_path / "checkpoint-00000003.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        trainer(net(), tmp_path).train(resume_from_checkpoint=True)


def test_autocast_runs_the_forward_in_bfloat16_over_fp32_weights(tmp_path):
    seen = []

    def loss(model, batch):
        out = model(batch[0])
        seen.append(out.dtype)
        return nn.functional.mse_loss(out.float(), batch[1])

    model = net()
    trainer(model, tmp_path, loss_fn=loss, autocast=torch.bfloat16, steps=1).train()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
