"""Optimizers that would train nothing: built before attach, of other masks, of another model."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
from torch import nn

from sparseft import attach
from sparseft.errors import AttachError

BEFORE = (
    r"this AdamW was built before attach: it holds 'up.weight'.*attachment.parameters\(\), after "
    r"attach, or call attach\(model, masks, optimizer=optimizer\)"
)


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "sparseft.modules.optimizer_guards"]


def up(model, kit):
    return {"up.weight": kit.masks(model, 0.1)["up.weight"]}


# Built before attach, in each kind of loop.


def plain(model, masks, loss):
    optimizer = torch.optim.AdamW(model.parameters())
    attach(model, masks)
    loss().backward()
    optimizer.step()


def closure(model, masks, loss):
    optimizer = torch.optim.AdamW(model.parameters())
    attach(model, masks)
    optimizer.step(lambda: loss().backward())


def scaler(model, masks, loss, fused=False):
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    attach(model, masks)
    scaler.scale(loss()).backward()
    scaler.step(optimizer)


def scaler_fused(model, masks, loss):
    scaler(model, masks, loss, fused=True)  # which unscales in its step


def accelerate(model, masks, loss):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    attach(model, masks)
    accelerator.backward(loss())
    optimizer.step()


def trainer(model, masks, loss):
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return {"loss": loss()}

    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    attach(model, masks)
    options = {"max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    data = [{"ids": torch.ones(3)}]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, save_strategy="no", **options)
        Trainer(Model(), arguments, train_dataset=data, optimizers=(optimizer, scheduler)).train()


def sharded_wrapper(model, masks, loss):
    """As ZeroRedundancyOptimizer does: an Optimizer that has the stepping done by another one."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, parameters):
            parameters = list(parameters)
            self.inner = torch.optim.AdamW(parameters)
            super().__init__(parameters, {})

        def step(self, closure=None):
            self.param_groups = []  # its own are elsewhere
            return self.inner.step(closure)

    wrapper = Wrapper(model.parameters())
    attach(model, masks)
    loss().backward()
    wrapper.param_groups = []
    wrapper.step()


LOOPS = [
    plain,
    closure,
    scaler_fused,
    accelerate,
    trainer,
    sharded_wrapper,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_built_before_attach(loop, tiny, ids, kit):
    base = kit.snapshot(tiny)
    with pytest.raises(AttachError, match=BEFORE):
        loop(tiny, up(tiny, kit), lambda: kit.loss(tiny, ids))
    now = kit.snapshot(tiny)
    assert all(torch.equal(now[n], t) for n, t in base.items())


@pytest.mark.slow
def test_built_before_attach_in_lightning(tiny, ids, kit):
    lightning = pytest.importorskip(
        "lightning", reason="Lightning is not installed: pip install lightning"
    )

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = tiny

        def training_step(self, batch, number):
            return kit.loss(self.inner, batch)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.inner.parameters())
            attach(self.inner, up(self.inner, kit))
            return optimizer

    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(AttachError, match=BEFORE):
        trainer.fit(Module(), torch.utils.data.DataLoader(ids, batch_size=3))


def test_a_scaler_stops_before_the_step(tiny, ids, kit):
    """Torch's own words, which the troubleshooting page explains: no hook comes before them."""
    base, stock = kit.snapshot(tiny), torch.amp.GradScaler.unscale_
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        scaler(tiny, up(tiny, kit), lambda: kit.loss(tiny, ids))
    now = kit.snapshot(tiny)
    assert all(torch.equal(now[n], t) for n, t in base.items())
    assert torch.amp.GradScaler.unscale_ is stock  # no class of torch's is changed


# Handed to attach.


def test_an_optimizer_prepared_by_accelerate_can_be_handed_over(tiny, ids, kit):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(tiny, torch.optim.AdamW(tiny.parameters()))
    sparse = attach(model, up(tiny, kit), optimizer=optimizer)
    accelerator.backward(kit.loss(model, ids))
    optimizer.step()
    assert sparse.leaves["up.weight"].any()
    assert kit.agrees(sparse)


def test_lbfgs_trains_the_leaves_it_was_handed(tiny, ids, kit):
    """It keeps the very list of its group, and how many entries that has."""
    optimizer = torch.optim.LBFGS(tiny.parameters(), lr=0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = kit.loss(tiny, ids)
        loss.backward()
        return loss

    optimizer.step(closure)  # dense first
    sparse = attach(tiny, up(tiny, kit), optimizer=optimizer)
    optimizer.step(closure)
    assert sparse.leaves["up.weight"].any()


def test_what_is_no_optimizer_changes_nothing(tiny, kit):
    with pytest.raises(AttachError, match="got 'adamw'"):
        attach(tiny, up(tiny, kit), optimizer="adamw")
    assert type(tiny.up) is nn.Linear


# Built for other masks, or for another model.


def test_leaves_of_masks_that_were_detached(tiny, ids, kit):
    masks = up(tiny, kit)
    sparse = attach(tiny, masks)
    optimizer = torch.optim.AdamW(sparse.parameters())
    sparse.detach()
    attach(tiny, masks)
    kit.loss(tiny, ids).backward()
    with pytest.raises(AttachError, match=r"AdamW holds the leaf of 'up.weight'.*were detached"):
        optimizer.step()


def test_leaves_of_detached_masks_beside_others_that_train(tiny, ids, kit, caplog):
    sparse = attach(tiny, up(tiny, kit), full_params=["norm.*"])
    optimizer = torch.optim.AdamW(sparse.parameters())
    sparse.detach(restore=True)
    tiny.norm.requires_grad_(True)
    for _ in range(2):
        kit.loss(tiny, ids).backward()
        optimizer.step()
    [message] = said(caplog)
    assert "AdamW holds the leaf of 'up.weight' whose masks were detached; its steps" in message


def test_masks_that_came_later(tiny, ids, kit, caplog):
    attach(tiny, up(tiny, kit))
    optimizer = torch.optim.AdamW(tiny.parameters())
    attach(tiny, {"down.weight": kit.masks(tiny)["down.weight"]})
    for _ in range(2):
        kit.loss(tiny, ids).backward()
        optimizer.step()
    (message,) = said(caplog)
    assert "this AdamW holds 'down.weight' but not the leaves" in message


def test_only_the_full_parameters(tiny, ids, kit, caplog):
    optimizer = torch.optim.AdamW(tiny.norm.parameters())
    attach(tiny, up(tiny, kit), full_params=["norm.*"])
    for _ in range(3):
        kit.loss(tiny, ids).backward()
        optimizer.step()
    (message,) = said(caplog)
    assert "trained full_params, and no optimizer has stepped a leaf of the 1 masks" in message


def test_full_parameters_by_an_optimizer_of_their_own(tiny, ids, kit, caplog):
    sparse = attach(tiny, up(tiny, kit), full_params=["norm.*"])
    head = torch.optim.AdamW(tiny.norm.parameters())
    body = torch.optim.AdamW(sparse.leaves.values())
    for _ in range(3):
        kit.loss(tiny, ids).backward()
        head.step()
        body.step()
    assert said(caplog) == []


@pytest.mark.parametrize("change", ["copied", "frozen"])
def test_gradients_that_stop(change, tiny, ids, kit, caplog):
    sparse = attach(tiny, up(tiny, kit), full_params=["norm.*"])
    optimizer = torch.optim.AdamW(sparse.parameters())
    model = tiny
    for step in range(4):
        if step == 1:
            assert said(caplog) == []
            if change == "copied":
                model = copy.deepcopy(tiny)
            else:
                sparse.leaves["up.weight"].requires_grad_(False)
        optimizer.zero_grad()
        kit.loss(model, ids).backward()
        optimizer.step()
    (message,) = said(caplog)
    assert "AdamW took a step, but no gradient had reached any of its 1 masked" in message
    assert ("1 of the leaves were frozen" in message) == (change == "frozen")
    assert "attachments_of(copy)[-1].parameters()" in message
