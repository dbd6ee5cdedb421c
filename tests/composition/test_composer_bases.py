"""Adapters on a model other than the one they were made on."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from sparseft import Composer
from sparseft.adapter import Adapter
from sparseft.errors import BaseMismatchError, CompositionError, UnknownNameError


class TestOtherModels:
    def test_language_adapter_on_a_classifier(self, make_model, make_adapter, caplog):
        """Made under a masked-LM head of its own, which the classifier lacks."""
        model = make_model()
        model.lm_head = nn.Linear(6, 6)
        adapter = make_adapter(model, 0, names=("body.0.weight", "lm_head.weight"))
        del model.lm_head
        composer = Composer(model, {"sw": adapter})
        with caplog.at_level(logging.WARNING):
            composer.apply("sw")
            composer.revert()
            composer.apply("sw")
        assert composer.skipped == {"sw": ("lm_head.weight",)}
        assert len([r for r in caplog.records if "lm_head.weight" in r.message]) == 1
        with pytest.raises(UnknownNameError, match=r"'lm_head.weight'.*missing='skip'"):
            Composer(model, {"sw": adapter}, missing="error").apply("sw")

    def test_a_missing_layer_is_not_a_missing_head(self, make_model, make_adapter):
        model = make_model()
        adapter = make_adapter(model, 0, names=("body.0.weight", "body.2.weight"))
        model.body = model.body[:2]
        composer = Composer(model, {"sw": adapter})
        with pytest.raises(UnknownNameError, match=r"'body.2.weight'.*does not have"):
            composer.apply("sw")
        Composer(model, {"sw": adapter}, missing="skip").apply("sw")

    def test_nothing_fits(self, make_model, make_adapter):
        adapter = make_adapter(make_model(), 0)
        for missing in ("auto", "skip"):
            with pytest.raises(UnknownNameError, match="none of the 5 parameters"):
                Composer(nn.Sequential(nn.Linear(2, 2)), {"a": adapter}, missing=missing).apply("a")

    def test_encoder_with_and_without_a_head(self, make_model, make_adapter):
        class Wrapped(nn.Module):
            base_model_prefix = "net"

            def __init__(self, net):
                super().__init__()
                self.net = net

        class Bare(type(make_model())):
            base_model_prefix = "net"

        plain = make_model()
        adapter = make_adapter(plain, 0)
        base = plain.body[0].weight.detach().clone()
        wrapped = Wrapped(plain)
        Composer(wrapped, {"a": adapter}).apply("a")
        moved = plain.body[0].weight.detach().clone()
        assert not torch.equal(moved, base)

        bare = Bare()
        bare.load_state_dict(make_model().state_dict())
        prefixed = Adapter({f"net.{n}": d for n, d in adapter.diffs.items()})
        Composer(bare, {"a": prefixed}).apply("a")
        assert torch.equal(bare.body[0].weight, moved)

    def test_shape(self, make_model, make_adapter):
        model = make_model()
        adapter = make_adapter(model, 0, fingerprint=False)
        model.body[0] = nn.Linear(6, 9)
        with pytest.raises(BaseMismatchError, match=r"\(8,\).*\(9,\)"):
            Composer(model, {"a": adapter}).apply("a")

    def test_another_base(self, make_model, make_adapter, snapshot, same):
        adapter = make_adapter(make_model(), 0)
        other = make_model(seed=1)
        base = snapshot(other)
        composer = Composer(other, {"a": adapter})
        with pytest.raises(BaseMismatchError, match=r"'a' was made on another base \(net\)") as e:
            composer.apply("a")
        wanted = adapter.metadata.fingerprint.tensors["body.0.bias"].digest[:12]
        assert wanted in str(e.value)
        assert str(e.value).count("digest") == 2
        assert same(snapshot(other), base)
        Composer(other, {"a": adapter}, check_base=False).apply("a")

    def test_a_cast_of_the_base_is_accepted(self, make_model, make_adapter):
        adapter = make_adapter(make_model(), 0)
        Composer(make_model(torch.bfloat16), {"a": adapter}).apply("a")

    def test_quantised_weight(self, make_model, make_adapter):
        model = make_model()
        adapter = make_adapter(model, 0, names=("body.0.weight",), fingerprint=False)
        model.body[0].weight = nn.Parameter(
            torch.zeros(8, 6, dtype=torch.int8), requires_grad=False
        )
        with pytest.raises(CompositionError, match=r"torch.int8.*unquantised"):
            Composer(model, {"a": adapter}).apply("a")

    def test_base_is_read_once_per_tensor(self, composer, monkeypatch):
        import sparseft.composition.fit as module

        read = []
        real = module.fingerprint_base
        monkeypatch.setattr(
            module, "fingerprint_base", lambda i, n, own: read.append(own) or real(i, n, own)
        )
        composer.apply("sw")
        composer.switch("qu")
        composer.switch(["qu", "nli"])
        assert len(read) == len(set(read)) == 5
