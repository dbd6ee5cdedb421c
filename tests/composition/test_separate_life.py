"""A separate handle's life: adapters added from threads, closing, copies and saved models."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from sparseft import Adapter, SeparateComposer, SparseDiff
from sparseft.errors import CompositionError, UnknownNameError

X = torch.ones(2, 4)


def adapter(value: float = 1.0) -> Adapter:
    shapes = {"0.weight": (3, 4), "0.bias": (3,)}
    return Adapter({n: SparseDiff.from_dense(torch.full(s, value)) for n, s in shapes.items()})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())


def test_nothing_is_added_to_a_closed_handle(model):
    handle = SeparateComposer(model, {"a": adapter()})
    handle.close()
    with pytest.raises(CompositionError, match="closed; make a new one"):
        handle.add("b", adapter())
    assert handle.names() == ["a"]
    with pytest.raises(CompositionError, match="closed; make a new one"):
        with handle.rows(["a"]):
            pass


def test_one_name_is_added_once_whatever_the_threads(model, monkeypatch):
    """Loading takes time, in which the name may be taken."""
    meet, added, refused = threading.Barrier(2, timeout=1), [], []

    def load(path, check):
        try:
            meet.wait()  # both here at once, where nothing keeps the second out
        except threading.BrokenBarrierError:
            pass
        return adapter()

    monkeypatch.setattr(Adapter, "load", load)
    with SeparateComposer(model) as handle:

        def add():
            try:
                handle.add("a", "somewhere")
                added.append(1)
            except CompositionError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=add) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(added) == 1
    assert "here already" in refused[0]


def test_an_adapter_removed_while_a_block_is_being_entered_is_unknown(model):
    """Names are looked up before the lock is had; in between, another thread may remove one."""
    with SeparateComposer(model, {"a": adapter(), "b": adapter(2.0)}) as handle:
        with handle._lock:
            found: list[object] = []

            def enter():
                try:
                    with handle.using("b"):
                        found.append("entered")
                except Exception as error:
                    found.append(error)

            thread = threading.Thread(target=enter)
            thread.start()
            thread.join(0.1)
            handle.remove("b")
        thread.join()
    assert isinstance(found[0], UnknownNameError)


WAYS = {
    "torch.save": lambda m: _saved(m),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
}


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_copied_or_saved_model_is_the_stock_model(model, way):
    base = model(X)
    with SeparateComposer(model, {"a": adapter()}) as handle, handle.using("a"):
        moved = model(X)
        twin = way(model)
        assert torch.equal(twin(X), base)
        assert torch.equal(model(X), moved)
        with SeparateComposer(twin, {"a": adapter()}) as other, other.using("a"):
            assert torch.equal(twin(X), moved)
    assert torch.equal(model(X), base)
    assert not torch.equal(moved, base)


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_handle_cannot_be_copied_and_says_what_to_do(model, way):
    with SeparateComposer(model, {"a": adapter()}) as handle:
        with pytest.raises(CompositionError, match="cannot be copied or pickled.*make a new"):
            way(handle)


# Adapters and blocks of inference mode, then training.


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["h"]], ids=str)
def test_adapters_made_in_inference_mode_serve_training(model, names):
    layers = nn.Sequential(model, nn.Embedding(5, 4))  # "0.0.weight", "1.weight"
    with torch.inference_mode():
        made = {
            "a": Adapter({
                "0.0.weight": SparseDiff.from_dense(torch.ones(3, 4)),
                "0.0.bias": SparseDiff.from_dense(torch.ones(3)),
                "1.weight": SparseDiff.from_dense(torch.ones(5, 4)),
            }),
            "b": Adapter({"0.0.weight": SparseDiff.from_dense(torch.eye(3, 4))}),
            "h": Adapter({}, dense={"0.0.weight": torch.ones(3, 4), "0.0.bias": torch.ones(3)}),
        }  # fmt: skip
        handle = SeparateComposer(layers, made)
        with handle.using(names):
            first = layers[0](layers[1](torch.tensor([[1, 2]])))
    with handle, handle.using(names):
        again = layers[0](layers[1](torch.tensor([[1, 2]])))
        again.sum().backward()
        with handle.rows([names, None]):
            layers[0](layers[1](torch.tensor([[1, 2], [3, 4]]))).sum().backward()
    assert torch.equal(first, again)
    assert layers[1].weight.grad.any()


def test_nothing_that_is_kept_is_a_tensor_of_inference_mode(model):
    with torch.inference_mode():
        diffs = {"0.weight": SparseDiff.from_dense(torch.ones(3, 4))}
        handle = SeparateComposer(model, {"a": Adapter(diffs)})
        with handle.rows(["a", None]):
            applied = handle._open[0]
            model(X)
    delta = applied.blends[0]["0.weight"]
    kept = [
        delta.indices,
        delta.values,
        *(t for _, each, _ in applied._orders.values() for t in each),
    ]
    assert not any(t.is_inference() for t in kept)
    handle.close()
