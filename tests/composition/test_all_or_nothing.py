"""A change that fails leaves no trace, and nobody undoes out of order."""

from __future__ import annotations

import gc

import pytest
import torch

import sparseft.composition.writer as writer_module
from sparseft import Composer, attach
from sparseft.composition import placement
from sparseft.errors import StackOrderError
from sparseft.modules import bottom_value
from sparseft.modules.storage_stack import holders, parents_of
from sparseft.ops import _compose_cpu


class Broken(RuntimeError):
    pass


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def composer(model, make_adapter):
    composer = Composer(
        model,
        {
            "a": make_adapter(model, 0, dense=True),
            "b": make_adapter(model, 1, names=("embed.weight", "body.0.weight")),
            "c": make_adapter(model, 2, names=("body.0.weight", "body.2.weight")),
        },
    )
    for name in "abc":  # read, fingerprint and plan now, so that only writes fail below
        composer.switch(name)
    composer.switch(["b", "c"])
    composer.revert()
    return composer


def all_holders(model):
    return {n: holders(p) for n, p in model.named_parameters()}


PLAIN = ("gather_entries", "write_entries_")  # of the way every device has
BLOCKS = ("apply", "rewrite", "restore", "_add_up")  # of the CPU's
WRITERS = (*PLAIN, *BLOCKS, "pop", "push")


def module_of(function: str, monkeypatch):
    if function in ("pop", "push"):
        return placement
    if function in BLOCKS:
        return _compose_cpu
    monkeypatch.setattr(_compose_cpu, "suits", lambda *args: False)
    monkeypatch.setattr(_compose_cpu, "restore", writer_module.put_back)
    return writer_module


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("interrupt", [Broken, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize(
    ("start", "change"),
    [
        ({}, lambda c: c.apply(["a", "b"])),
        ({"a": 1.0}, lambda c: c.switch({"b": 0.5, "c": 2})),
        ({"b": 1.0, "c": 1.0}, lambda c: c.switch({"b": 0.25, "c": -1})),
        ({"b": 1.0}, lambda c: c.apply({"a": -1})),
        ({"a": 0.5, "c": 1.0}, lambda c: c.revert()),
    ],
    ids=["apply", "switch", "reweight", "add", "revert"],
)
def test_failure_at_any_step(
    composer, snapshot, same, monkeypatch, writer, interrupt, start, change
):
    composer.switch(start)
    before, stacks = snapshot(composer.model), all_holders(composer.model)
    module = module_of(writer, monkeypatch)
    real = getattr(module, writer)
    calls = 0
    with monkeypatch.context() as counting:

        def count(*args, **kwargs):
            nonlocal calls
            calls += 1
            return real(*args, **kwargs)

        counting.setattr(module, writer, count)
        change(composer)
    after, active = snapshot(composer.model), composer.active
    composer.switch(start)
    stacks = all_holders(composer.model)
    for fail_at in range(calls):
        left = fail_at
        done = False

        def fail(*args, **kwargs):
            nonlocal left, done
            left -= 1
            if left == -1 and not done:
                done = True
                if writer.startswith(("write", "apply", "re")):
                    real(*args, **kwargs)  # the write happened, then the signal came
                raise interrupt("injected")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, writer, fail)
            with pytest.raises(interrupt):
                change(composer)
        assert same(snapshot(composer.model), before), f"{writer} call {fail_at}"
        assert composer.active == start
        assert {n: [id(h) for h in hs] for n, hs in all_holders(composer.model).items()} == {
            n: [id(h) for h in hs] for n, hs in stacks.items()
        }
    change(composer)  # and it still works
    assert same(snapshot(composer.model), after)
    assert composer.active == active


@pytest.mark.parametrize("functions", [PLAIN, BLOCKS], ids=["plain", "blocks"])
def test_some_step_is_reached(composer, monkeypatch, functions):
    """The grid above would pass by never failing: every function is called by some change."""
    seen = set()
    for function in (*functions, "pop", "push"):
        module = module_of(function, monkeypatch)
        real = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *a, _w=function, _r=real, **k: (seen.add(_w), _r(*a, **k))[1]
        )
    composer.switch(["a", "b"])
    composer.switch({"a": 0.5, "b": 1})
    composer.revert()
    assert seen == {*functions, "pop", "push"}


class TestStack:
    def test_two_composers(self, model, make_adapter, snapshot, same):
        below = Composer(model, {"sw": make_adapter(model, 0)})
        above = Composer(model, {"nli": make_adapter(model, 1, dense=True)})
        base = snapshot(model)
        below.apply("sw")
        middle = snapshot(model)
        above.apply("nli")
        top = snapshot(model)
        for action in (below.revert, lambda: below.switch([]), lambda: below.switch({"sw": 2})):
            with pytest.raises(
                StackOrderError, match=r"Composer\(nli\) changed it after Composer\(sw\)"
            ):
                action()
            assert same(snapshot(model), top)
        above.revert()
        assert same(snapshot(model), middle)
        below.revert()
        assert same(snapshot(model), base)

    def test_fingerprints_see_the_bottom(self, model, make_adapter):
        """The second adapter was made on the bare base and meets it through the first one."""
        first, second = make_adapter(model, 0), make_adapter(model, 1)
        Composer(model, {"a": first}).apply("a")
        Composer(model, {"b": second}).apply("b")

    def test_bottom_value_and_parents(self, composer, model):
        base = model.body[0].weight.detach().clone()
        composer.apply({"b": 1, "c": 0})
        assert torch.equal(bottom_value(model.body[0].weight), base)
        assert parents_of(model.body[0].weight) == (composer["b"].digest,)
        composer.switch({"b": 0, "c": 1})
        assert parents_of(model.body[0].weight) == (composer["c"].digest,)
        composer.revert()
        assert parents_of(model.body[0].weight) == ()

    def test_under_attach(self, composer, model, snapshot, same):
        base = snapshot(model)
        composer.apply("b")
        composed = snapshot(model)
        sparse = attach(model, {"body.0.weight": torch.ones(8, 6, dtype=torch.bool)})
        with torch.no_grad():
            sparse.leaves["body.0.weight"].fill_(0.5)
        sparse.sync_()
        with pytest.raises(StackOrderError, match=r"cannot revert 'body.0.weight': attach"):
            composer.revert()
        assert composer.active == {"b": 1.0}
        assert sparse.adapter().metadata.parents == (composer["b"].digest,)
        sparse.detach(restore=True)
        assert same(snapshot(model), composed)
        composer.revert()
        assert same(snapshot(model), base)

    def test_over_attach(self, composer, model, snapshot, same):
        """A language adapter tried on a task in training: put on, scored, taken off, trained on."""
        mask = torch.zeros(8, 6, dtype=torch.bool)
        mask[::2] = True
        sparse = attach(model, {"body.0.weight": mask})
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2, weight_decay=0.1)

        def step():
            optimizer.zero_grad()
            model(torch.tensor([[1, 2, 3]])).square().sum().backward()
            optimizer.step()

        step()
        trained = snapshot(model)
        with composer.composed("b"):
            assert not same(snapshot(model), trained)
            with pytest.raises(StackOrderError, match=r"Composer\(b\)"):
                sparse.detach()
        assert same(snapshot(model), trained)
        step()
        assert not same(snapshot(model), trained)
        sparse.detach(restore=True)

    def test_adapter_trained_over_a_source_composes_without_it(self, composer, model):
        """LT-SFT: the task is trained over the source language and used with the target's."""
        composer.apply("b")
        sparse = attach(model, {"body.0.weight": torch.ones(8, 6, dtype=torch.bool)})
        with torch.no_grad():
            sparse.leaves["body.0.weight"].fill_(0.25)
        task = sparse.adapter("task")
        sparse.detach(restore=True)
        composer.add("task", task)
        composer.switch(["task", "c"])
        assert composer.active == {"task": 1.0, "c": 1.0}
        composer.revert()

    def test_nothing_is_kept_of_a_dropped_model(self, make_model, make_adapter):
        import weakref

        model = make_model()
        composer = Composer(model, {"a": make_adapter(model, 0)})
        composer.apply("a")
        seen = weakref.ref(model.body[0].weight)
        del model, composer
        gc.collect()
        assert seen() is None
