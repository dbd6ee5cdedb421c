"""After a dense step on applied weights: the base loaded again, or the weights kept as they are."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from sparseft import Composer, attach
from sparseft.composition import placement
from sparseft.errors import BaseMismatchError, StackOrderError
from sparseft.modules.storage_stack import holders


@pytest.fixture
def composer(model, make_adapter):
    return Composer(
        model, {n: make_adapter(model, i, dense=n == "sw") for i, n in enumerate(("sw", "qu"))}
    )


@pytest.fixture
def base(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def dense_step(model):
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()


def held(model):
    return [n for n, p in model.named_parameters() if holders(p)]


class TestBaseLoadedAgain:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("back", [lambda c: c.revert(), lambda c: c.switch([])])
    def test_revert_accepts_it(self, make_model, make_adapter, snapshot, same, dtype, back):
        model = make_model(dtype)
        composer = Composer(model, {"sw": make_adapter(model, 0, dense=True)})
        base, before = copy.deepcopy(model.state_dict()), snapshot(model)
        composer.apply("sw")
        applied = snapshot(model)
        dense_step(model)
        with pytest.raises(StackOrderError, match=re.escape("load_state_dict() and revert()")):
            back(composer)
        model.load_state_dict(base)
        back(composer)
        assert composer.active == {}
        assert held(model) == []
        assert same(snapshot(model), before)
        with attach(model, {"body.0.weight": torch.ones(8, 6, dtype=torch.bool)}) as sparse:
            assert sparse.adapter("z").metadata.parents == ()
        composer.apply("sw")
        assert same(snapshot(model), applied)
        composer.revert()
        assert same(snapshot(model), before)

    def test_one_parameter_of_several(self, composer, model, base, snapshot, same):
        """Each is judged on its own: what still holds what was written is put back as ever."""
        before = snapshot(model)
        composer.apply("sw")
        with torch.no_grad():
            model.body[0].weight.copy_(base["body.0.weight"])
        composer.revert()
        assert same(snapshot(model), before)
        assert held(model) == []

    def test_one_entry_off_is_refused(self, composer, model, base, snapshot, same):
        composer.apply("qu")
        model.load_state_dict(base)
        at = composer["qu"]["body.2.weight"].indices[-1]
        with torch.no_grad():
            model.body[2].weight.view(-1)[at] *= 1.5
        now = snapshot(model)
        with pytest.raises(StackOrderError, match="'body.2.weight': its values were changed"):
            composer.revert()
        assert same(snapshot(model), now)
        assert composer.active == {"qu": 1.0}

    def test_only_leaving_accepts_it(self, composer, model, base, snapshot, same):
        """Loaded over an adapter that is said to be active: nothing is added to it by guessing."""
        composer.apply("sw")
        model.load_state_dict(base)
        now = snapshot(model)
        for step in (lambda: composer.switch({"sw": 2}), lambda: composer.apply("qu")):
            with pytest.raises(StackOrderError, match="were changed"):
                step()
            assert same(snapshot(model), now)
        composer.revert()
        assert same(snapshot(model), now)

    @pytest.mark.parametrize("leave", [Composer.revert, Composer.forget])
    def test_failing_in_the_middle_leaves_the_loaded_base(
        self, composer, model, base, snapshot, same, monkeypatch, leave
    ):
        composer.apply("sw")
        model.load_state_dict(base)
        now, names = snapshot(model), held(model)
        assert len(names) > 2
        for fail_at in range(len(names)):
            left = fail_at

            def fail(*args, _real=placement.pop, **kwargs):
                nonlocal left
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt
                return _real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(placement, "pop", fail)
                with pytest.raises(KeyboardInterrupt):
                    leave(composer)
            assert same(snapshot(model), now)
            assert held(model) == names
            assert composer.active == {"sw": 1.0}
        leave(composer)
        assert same(snapshot(model), now)
        assert held(model) == []


class TestForget:
    def test_after_a_dense_step(self, composer, model, snapshot, same):
        composer.apply("sw")
        dense_step(model)
        trained = snapshot(model)
        with pytest.raises(StackOrderError, match=re.escape("forget(), which writes nothing")):
            composer.revert()
        composer.forget()
        assert same(snapshot(model), trained)
        assert composer.active == {}
        assert held(model) == []
        with attach(model, {"body.0.weight": torch.ones(8, 6, dtype=torch.bool)}) as sparse:
            assert sparse.adapter("z").metadata.parents == ()
        composer.revert()
        assert same(snapshot(model), trained)

    def test_adapters_meet_the_new_base(self, composer, model, base, make_adapter, snapshot, same):
        """Fits and fingerprints from before would let the old adapters on without a look."""
        composer.apply("sw")
        dense_step(model)
        composer.forget()
        with pytest.raises(BaseMismatchError, match="made on another base"):
            composer.apply("sw")
        now = snapshot(model)
        composer.add("new", make_adapter(model, 5))
        composer.apply("new")
        composer.revert()
        assert same(snapshot(model), now)
        model.load_state_dict(base)
        composer.forget()  # nothing lies on the model: the base is read again, and that is all
        composer.apply("sw")
        composer.revert()

    def test_only_on_top(self, composer, model, make_adapter, snapshot):
        """All or nothing: a holder above one parameter keeps the others as well."""
        composer.apply("sw")
        names = held(model)
        above = Composer(model, {"up": make_adapter(model, 7, names=("body.2.weight",))})
        above.apply("up")
        with pytest.raises(
            StackOrderError, match=r"cannot forget 'body.2.weight': Composer\(up\) changed it after"
        ):
            composer.forget()
        assert held(model) == names
        assert composer.active == {"sw": 1.0}
        above.forget()
        composer.forget()
        assert held(model) == []

    def test_two_composers_and_the_base_loaded(self, composer, model, base, make_adapter):
        """What lay beneath the upper one is not the bottom base: it lets go, the lower reverts."""
        composer.apply("sw")
        above = Composer(model, {"up": make_adapter(model, 7)}, check_base=False)
        above.apply("up")
        model.load_state_dict(base)
        with pytest.raises(StackOrderError, match="were changed"):
            above.revert()
        above.forget()
        composer.revert()
        assert held(model) == []
        assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())

    def test_replaced_parameters(self, composer, model, base):
        composer.apply("sw")
        old = model.body[0].weight
        model.body[0].weight = nn.Parameter(base["body.0.weight"].clone())
        with pytest.raises(StackOrderError, match=r"Load it again and forget\(\)"):
            composer.revert()
        composer.forget()
        assert holders(old) == ()
        model.load_state_dict(base)
        composer.apply("sw")
        composer.revert()
        assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())

    def test_a_cast_model(self, composer, model):
        composer.apply("sw")
        model.to(torch.float64)
        composer.forget()
        assert held(model) == []
        assert composer.active == {}

    def test_a_deep_copy(self, composer, model):
        composer.apply("sw")
        other = copy.deepcopy(composer)
        other.forget()
        assert other.active == {}
        assert composer.active == {"sw": 1.0}
        assert held(model)
        composer.revert()

    def test_inside_composed(self, composer, model, snapshot, same):
        """The block has nothing to go back to, and later blocks work."""
        composer.apply("qu")
        with composer.composed("sw"):
            dense_step(model)
            composer.forget()
            now = snapshot(model)
        assert same(snapshot(model), now)
        assert composer.active == {}
        composer.remove("qu")

    def test_after_blocks_left_out_of_order(self, composer, model, snapshot, same):
        base = snapshot(model)
        first, second = composer.composed("sw"), composer.composed("qu")
        first.__enter__()
        second.__enter__()
        with pytest.raises(StackOrderError, match="Leave the innermost first"):
            first.__exit__(None, None, None)
        composer.revert()
        composer.forget()
        second.__exit__(None, None, None)
        assert same(snapshot(model), base)
        composer.remove("sw")


@pytest.mark.parametrize("whole", [False, True], ids=["entries", "whole"])
@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
def test_a_witness_is_small_and_spread(size, whole):
    weight = torch.arange(1.0, 3001.0)[: size if whole else None].clone()
    indices = None if whole else torch.arange(0, 3 * size, 3, dtype=torch.int32)
    witness = placement.Witness.of(weight, indices)
    at = witness.positions
    assert at.numel() <= 128
    assert at.numel() >= min(size, 64)
    assert torch.equal(weight[at.long()], witness.values)
    assert len(set(at.diff().tolist())) <= 1
    assert witness.agrees(weight)
    weight[at[-1].long()] *= 1.001
    assert not witness.agrees(weight)
