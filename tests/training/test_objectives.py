"""The masked-LM loss at the predicted positions, and the untied head."""

from __future__ import annotations

import torch

from sparseft.training.objectives import masked_lm_loss, untie_output_embeddings


def batch(tiny, rate=0.3, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(5, tiny.VOCAB, (4, 9))
    labels = torch.where(torch.rand(4, 9) < rate, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_it_is_the_models_own_loss_and_gradient(tiny):
    model = tiny.tiny_masked_lm().double().eval()
    data = batch(tiny)
    own = model(**data).loss
    own.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = masked_lm_loss(model)(model, data)
    loss.backward()
    # The logits are taken in fp32, as the models do themselves.
    torch.testing.assert_close(loss.double(), own, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-8)


def test_the_head_sees_the_predicted_rows_only_and_ordinary_calls_are_untouched(tiny):
    model = tiny.tiny_masked_lm().eval()
    seen = []
    loss = masked_lm_loss(model)
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape))
    )
    data = batch(tiny)
    loss(model, data)
    count = int((data["labels"] != -100).sum())
    assert seen == [(count, tiny.VOCAB)]
    assert model(**data).logits.shape == (4, 9, tiny.VOCAB)
    assert set(data) == {"input_ids", "attention_mask", "labels"}


def test_a_model_without_output_embeddings_gets_its_own_loss(tiny):
    model = tiny.plain_classifier()
    ids = torch.randint(5, tiny.VOCAB, (4, 9))
    data = {"input_ids": ids, "labels": ids[:, 0] % tiny.LABELS}

    class Wrapped(torch.nn.Module):
        def forward(self, **inputs):
            return type("Output", (), model(**inputs))

    loss = masked_lm_loss(Wrapped())(Wrapped(), data)
    assert torch.isfinite(torch.as_tensor(loss))


def test_untying_leaves_the_function_and_frees_the_output_side(tiny):
    model = tiny.tiny_masked_lm().eval()
    data = batch(tiny)
    before = model(**data).logits
    assert untie_output_embeddings(model)
    assert not untie_output_embeddings(model)
    assert torch.equal(model(**data).logits, before)
    model.requires_grad_(True)
    model.get_output_embeddings().weight.requires_grad_(False)
    model(**data).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    used = set(data["input_ids"].flatten().tolist())
    assert {i for i in range(tiny.VOCAB) if gradient[i].any()} <= used
    assert model.get_output_embeddings().weight.grad is None
