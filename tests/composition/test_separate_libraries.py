"""Adapters trained beside quantised bases at inference: beside them again, never merged."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import sparseft
from sparseft import Composer, SeparateComposer
from sparseft.errors import CompositionError
from sparseft.modules.dequantise import stored_tensors

_spec = importlib.util.spec_from_file_location(
    "_quantised", Path(__file__).parent.parent / "_quantised.py"
)
q = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(q)


@pytest.mark.parametrize("scheme", q.SCHEMES)
def test_an_adapter_trained_on_it_runs_beside_it(scheme):
    model = q.net(scheme).train()
    before = {n: t.clone() for n, t in stored_tensors(model[0]).items()}
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    sparse = sparseft.attach(model, q.draw_masks(model))
    with torch.no_grad():
        for p in sparse.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    sparse.sync_()
    trained, adapter = model(x).detach(), sparse.adapter()
    sparse.detach()
    plain = model(x).detach()
    with SeparateComposer(model, {"a": adapter}) as composer:
        with composer.using("a"):
            assert (model(x) - trained).abs().max() <= 1e-5
        with composer.rows(["a", None, "a", None]):
            mixed = model(x)
    assert (mixed[::2] - trained[::2]).abs().max() <= 1e-5
    assert (mixed[1::2] - plain[1::2]).abs().max() <= 1e-5
    with pytest.raises(
        CompositionError, match=r"'0.weight' is quantised \(.*Separate.*save_merged"
    ):
        Composer(model, {"a": adapter}).switch(["a"])
    assert all(torch.equal(t, before[n]) for n, t in stored_tensors(model[0]).items())
