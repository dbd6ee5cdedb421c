"""Separate mode and layers with ways of their own: scaled tables, fast paths, masks attached."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from torch import nn

from sparseft import Adapter, Composer, SeparateComposer, SparseDiff, attach
from sparseft.errors import CompositionError


def adapter_of(model: nn.Module, *names: str, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    diffs = {}
    for name in names:
        shape = model.get_parameter(name).shape
        keep = torch.rand(shape, generator=generator) < 0.4
        diffs[name] = SparseDiff.from_dense(torch.randn(shape, generator=generator) * keep)
    return Adapter(diffs, name=f"a{seed}")


def merged(model: nn.Module, adapter: Adapter) -> nn.Module:
    twin = copy.deepcopy(model)
    Composer(twin, {"a": adapter}).switch("a")
    return twin


class Scaled(nn.Embedding):
    """As transformers' BART, M2M100 and Gemma have them."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.embed_scale = 3.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


def test_scaled_embeddings():
    model = nn.Sequential(Scaled(9, 4))
    adapter, ids = adapter_of(model, "0.weight"), torch.randint(0, 9, (3, 5))
    expected = merged(model, adapter)(ids)
    with SeparateComposer(model, {"a": adapter}) as handle:
        with handle.using("a"):
            torch.testing.assert_close(model(ids), expected)
        with handle.rows(["a", None, "a"]):
            got = model(ids)
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]])
    assert torch.equal(got[1], model(ids)[1])


@pytest.mark.parametrize("training", [False, True])
def test_torch_encoder_layers_without_their_fast_path(training):
    """In eval, without gradients, torch's layer reads weights itself, unless a hook is there."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    adapter = adapter_of(model, "linear1.weight", "linear2.weight", "linear2.bias", "norm1.weight")
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        expected = merged(model, adapter)(x)
        with SeparateComposer(model, {"a": adapter}) as handle, handle.using("a"):
            got = model(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, model(x), atol=1e-2)


def test_relative_positions_are_no_batch():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relative_attention_bias = nn.Embedding(4, 2)

        def forward(self, x):
            place = torch.arange(x.shape[1])
            distance = (place[:, None] - place[None]).clamp(0, 3)
            return x.sum() + self.relative_attention_bias(distance)

    model, x = Attention(), torch.randn(3, 3)
    adapter = adapter_of(model, "relative_attention_bias.weight")
    with SeparateComposer(model, {"a": adapter}) as handle:
        with handle.using("a"):
            torch.testing.assert_close(model(x), merged(model, adapter)(x))
        with handle.rows(["a", None, None]):
            with pytest.raises(CompositionError, match=r"relative_attention_bias.*\(3, 3\)"):
                model(x)
        with handle.rows(["a", "a", "a"]):
            torch.testing.assert_close(model(x), merged(model, adapter)(x))


def test_inputs_by_keyword_and_hooks_of_others():
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    adapter, seen = adapter_of(model, "weight", "bias"), []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    with SeparateComposer(model, {"a": adapter}) as handle, handle.using("a"):
        got = model(input=x)
    torch.testing.assert_close(got, merged(model, adapter)(x))
    assert seen[0] is got  # they see what the layer gives, not the base's part


def test_bias_alone_and_rows_that_change_different_parameters():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(4, 2, 4)
    adapters = {
        "bias": adapter_of(model, "0.bias"),
        "weight": adapter_of(model, "0.weight", seed=1),
        "both": adapter_of(model, "0.weight", "0.bias", seed=2),
    }
    rows = ["bias", "weight", "both", None]
    with SeparateComposer(model, adapters) as handle, handle.rows(rows):
        got = model(x)
    for row, name in enumerate(rows):
        twin = merged(model, adapters[name]) if name else model
        torch.testing.assert_close(got[row], twin(x)[row])


def test_a_task_is_trained_beside_an_untouched_language():
    """Masks attached under a diff kept apart: leaves get the gradients of merged weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    language, x = adapter_of(model, "0.weight", "1.weight", "2.bias"), torch.randn(5, 4)
    twin = merged(model, language)
    masks = {n: torch.rand(model.get_parameter(n).shape) < 0.5 for n in ("0.weight", "2.weight")}
    grads = []
    for target, which in ((model, "a"), (twin, [])):
        sparse = attach(target, masks)
        with SeparateComposer(target, {"a": language}, check_base=False) as handle:
            with handle.using(which):
                target(x).square().sum().backward()
        grads.append([p.grad for p in sparse.parameters()])
        sparse.detach(restore=True)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_tasks_of_one_event_loop_do_not_disturb_each_other():
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    adapters = {n: adapter_of(model, "weight", seed=i) for i, n in enumerate("ab")}
    expected = {n: merged(model, a)(x) for n, a in adapters.items()}

    async def serve(handle, name):
        with handle.using(name):
            for _ in range(3):
                await asyncio.sleep(0)
                torch.testing.assert_close(model(x), expected[name])

    async def main(handle):
        await asyncio.gather(*(serve(handle, n) for n in "abab"))

    with SeparateComposer(model, adapters) as handle:
        asyncio.run(main(handle))


def test_a_deep_copy_is_a_stock_model():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    with SeparateComposer(model, {"a": adapter_of(model, "0.weight")}) as handle:
        handle.switch("a")
        twin = copy.deepcopy(model)
        assert not torch.equal(model(x), twin(x))
    assert torch.equal(model(x), twin(x))


def test_replaced_modules_are_found_again():
    model, ids = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3)), torch.tensor([[1, 2]])
    adapter = adapter_of(model, "0.weight", "1.weight")
    with SeparateComposer(model, {"a": adapter}) as handle:
        with handle.using("a"):
            model(ids)
        model[1] = nn.Linear(4, 3)
        with handle.using("a"):
            torch.testing.assert_close(model(ids), merged(model, adapter)(ids))


def test_a_model_that_moves_to_another_dtype():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    adapter = adapter_of(model, "0.weight", "0.bias")
    with SeparateComposer(model, {"a": adapter}) as handle, handle.using("a"):
        model.double()
        got = model(x.double())
        assert got.dtype == torch.float64
    torch.testing.assert_close(got, merged(model, adapter)(x.double()), rtol=1e-6, atol=1e-6)


def test_tokens_picked_for_an_expert_are_not_taken_for_rows():
    """4 picked tokens are two rows of two by their number only."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, picked):
            hidden = self.first(x).flatten(0, 1)
            return self.expert(hidden[picked])

    model, x = Routed(), torch.randn(2, 3, 4)
    adapter = adapter_of(model, "first.weight", "expert.weight")
    with SeparateComposer(model, {"a": adapter}) as handle, handle.rows(["a", None]):
        with pytest.raises(CompositionError, match=r"'expert.weight'.*\(4, 4\).*not 2 rows"):
            model(x, torch.tensor([0, 1, 2, 4]))
        everything = model(x, torch.arange(6)).view(2, 3, 4)
        torch.testing.assert_close(everything[1], model.expert(model.first(x))[1])
