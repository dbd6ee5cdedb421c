"""Training beside untouched weights: gradients, checkpointing, autocast, inference mode before."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparseft import Composer, SeparateComposer, SparseDiff
from sparseft.adapter import Adapter
from sparseft.errors import CompositionError

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 1], [1, 2, 3, 4]])

pytestmark = pytest.mark.usefixtures("untouched")


def test_gradients_of_inputs_and_other_parameters(separate, model, adapters):
    hidden = torch.randn(4, 3, 6, requires_grad=True)
    with separate.rows(["sw", "qu", None, "nli"]):
        model.body(hidden).square().sum().backward()
    got, bias = hidden.grad.clone(), model.body[0].bias.grad.clone()
    model.zero_grad()
    expected, biases = [], 0
    for row, name in enumerate(("sw", "qu", None, "nli")):
        twin = _twin(model, adapters, name)
        leaf = hidden.detach()[row].requires_grad_()
        twin.body(leaf).square().sum().backward()
        expected.append(leaf.grad)
        biases = biases + twin.body[0].bias.grad
    torch.testing.assert_close(got, torch.stack(expected))
    torch.testing.assert_close(bias, biases)


def _twin(model, adapters, name):
    twin = copy.deepcopy(model)
    if name:
        Composer(twin, adapters).switch(name)
    return twin


def learning(adapter):
    """The same adapter, its values leaves that require grad."""
    diffs = {
        n: SparseDiff.from_pattern(d.pattern, d.values.clone().requires_grad_())
        for n, d in adapter.items()
    }
    return Adapter(diffs, name=adapter.name, metadata=adapter.metadata)


def test_gradients_of_values(model, adapters):
    trained = learning(adapters["sw"])
    with SeparateComposer(model, {"sw": trained, "qu": adapters["qu"]}) as handle:
        for _ in range(2):  # summed anew each time: a second backward finds its graph
            with handle.rows([{"sw": 0.5, "qu": 1.0}, "qu", "sw", None]):
                model(IDS).square().sum().backward()
        with pytest.raises(CompositionError, match="requires grad.*linear"):
            with handle.using("sw", method="ties"):
                pass
    model.zero_grad()
    for name, diff in trained.items():
        assert diff.values.grad is not None, name
        assert diff.values.grad.any(), name
    # against finite differences of the loss, along a random direction
    direction = {n: torch.randn(d.nnz) for n, d in trained.items()}
    slope = sum((2 * d.values.grad / 2 * direction[n]).sum() for n, d in trained.items())

    def loss(step):
        moved = {
            n: SparseDiff.from_pattern(
                d.pattern, d.values.detach().double() + step * direction[n].double()
            )
            for n, d in trained.items()
        }
        moved = Adapter(moved, name="sw", metadata=trained.metadata)
        with SeparateComposer(model, {"sw": moved, "qu": adapters["qu"]}) as handle:
            with handle.rows([{"sw": 0.5, "qu": 1.0}, "qu", "sw", None]), torch.no_grad():
                return model(IDS).double().square().sum()

    numeric = 2 * (loss(1e-2) - loss(-1e-2)) / 2e-2
    torch.testing.assert_close(slope.double(), numeric, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(separate, model, reentrant):
    def run(hidden, use):
        if use:
            out = checkpoint(model.body, hidden, use_reentrant=reentrant)
        else:
            out = model.body(hidden)
        out.square().sum().backward()
        return hidden.grad

    hidden = torch.randn(4, 3, 6)
    with separate.rows(["sw", "qu", None, "nli"]):
        plain = run(hidden.clone().requires_grad_(), False)
        assert torch.equal(run(hidden.clone().requires_grad_(), True), plain)
    separate.switch("sw")
    out = checkpoint(model.body, hidden.clone().requires_grad_(), use_reentrant=reentrant)
    out.sum().backward()
    separate.revert()
    with separate.using("qu"):
        out = checkpoint(model.body, hidden.clone().requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(CompositionError, match=r"outside of the using.*backward\(\) inside"):
        out.sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("blocks", [1, 2])
def test_checkpointing_where_backward_has_a_thread_of_its_own(separate, model, blocks):
    """As on CUDA: that thread has no context, so one open block is taken, and two are refused."""
    hidden = torch.randn(4, 3, 6, requires_grad=True)
    raised = []

    def backward(out):
        try:
            out.square().sum().backward()
        except CompositionError as error:
            raised.append(str(error))

    with separate.rows(["sw", "qu", None, "nli"]):
        model.body(hidden).square().sum().backward()
        plain, hidden.grad = hidden.grad, None
        out = checkpoint(model.body, hidden, use_reentrant=False)
        with contextlib.ExitStack() as stack:
            if blocks == 2:
                stack.enter_context(separate.using("sw"))
            thread = threading.Thread(target=backward, args=(out,))
            thread.start()
            thread.join()
    if blocks == 1:
        assert not raised
        assert torch.equal(hidden.grad, plain)
    else:
        assert "2 blocks are open" in raised[0]
    model.zero_grad()


def test_autocast(separate, model):
    hidden = torch.randn(4, 3, 6, requires_grad=True)
    with separate.rows(["sw", "qu", None, "nli"]):
        exact = model.body(hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model.body(hidden)
            assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.05)
        got.sum().backward()
    assert hidden.grad.isfinite().all()
    model.zero_grad()


def test_training_after_inference_mode(model, adapters):
    hidden = torch.randn(4, 3, 6)
    with SeparateComposer(model, adapters) as handle:
        found = []
        for _ in range(2):
            with torch.inference_mode(), handle.rows(["sw", "qu", None, "nli"]):
                found.append(model(IDS))
                found.append(model.body(hidden))
            with handle.rows(["sw", "qu", None, "nli"]):
                out = model.body(hidden.clone().requires_grad_())
                out.sum().backward()
                assert torch.equal(out, found[1])
            with torch.inference_mode():
                with handle.rows(["sw", "qu", None, "nli"]):
                    assert torch.equal(model(IDS), found[0])
    model.zero_grad()
