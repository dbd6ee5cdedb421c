"""What the two phases of a lottery ticket do: rewind, freeze, shrink, build on sources."""

from __future__ import annotations

import math

import pytest
import torch

import sparseft
from sparseft import Adapter, SparseDiff


def test_phase_two_starts_from_theta0_and_freezes_what_is_outside_the_mask(
    run, tiny, make, tmp_path
):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    starts, ends = {}, {}

    def on_phase(model, phase):
        starts[phase.name] = {n: p.detach().clone() for n, p in model.named_parameters()}
        if phase.name == "sparse":
            assert phase.nnz == phase.attachment.nnz == 500
            trained = {id(p) for p in phase.parameters.values()}
            assert {id(p) for p in model.parameters() if p.requires_grad} == trained

            class End:
                def on_pre_optimizer_step(self, *, step, model, optimizer):
                    ends.update({n: p.detach().clone() for n, p in model.named_parameters()})

            phase_end.append(End())

    phase_end = []
    base_factory = make(on_phase=on_phase, weight_decay=0.5)

    def make_trainer(model, phase):
        trainer = base_factory(model, phase)
        for callback in phase_end:
            trainer.add_callback(callback)
        return trainer

    result = run(make_trainer, model, tmp_path)
    for name, value in before.items():
        if name in starts["dense"]:
            assert torch.equal(starts["dense"][name], value), name
            assert torch.equal(starts["sparse"][name], value), name
    touched = 0
    for name, value in before.items():
        if name.startswith("classifier.") or name not in ends:
            continue
        outside = torch.ones_like(value, dtype=torch.bool)
        if name in result.masks:
            outside = ~result.masks[name].to_mask()
        assert torch.equal(ends[name][outside], value[outside]), name
        touched += int((ends[name] != value).sum())
    assert touched > 250  # and the mask itself did move
    assert not torch.equal(ends["classifier.weight"], before["classifier.weight"])


def test_the_adapter_applied_is_the_model_phase_two_ended_with(run, tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    finals = []

    def make_trainer(model, phase):
        trainer = make()(model, phase)
        inner = trainer.train

        def train(resume_from_checkpoint=None):
            out = inner(resume_from_checkpoint)
            finals.append({n: p.detach().clone() for n, p in model.named_parameters()})
            return out

        trainer.train = train
        return trainer

    result = run(make_trainer, model, tmp_path)
    composer = sparseft.Composer(model, {"task": result.adapter})
    composer.apply(["task"])
    for name, value in model.named_parameters():
        assert torch.equal(value, finals[-1][name]), name
    composer.revert()


def test_density_one_trains_every_candidate_as_dense_fine_tuning_does(run, tiny, make, tmp_path):
    """With the whole mask and no dropout, phase 2 repeats phase 1 up to rounding."""
    # By the configuration: some versions read attention's dropout from it, not from a module.
    model = tiny.tiny_classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = {"shuffle": False, "max_grad_norm": 0.0}
    result = run(make(**options), model, tmp_path, nnz=None, density=1.0, exclude=())
    dense = sparseft.training.state.TensorFile(result.dense_path)
    composer = sparseft.Composer(model, {"t": result.adapter})
    composer.apply(["t"])
    worst = max(
        float((p.detach() - dense[n]).abs().max())
        for n, p in model.named_parameters()
        if n in dense
    )
    composer.revert()
    moved = max(float((dense[n] - p.detach()).abs().max()) for n, p in model.named_parameters())
    assert moved > 1e-3
    assert worst < 2e-2 * moved


@pytest.mark.parametrize("phase_index", [0, 1])
def test_l1_shrinks_the_diff_of_its_phase_and_leaves_the_logged_loss_true(
    run, tiny, make, tmp_path, phase_index
):
    def total(l1):
        strength = [0.0, 0.0]
        strength[phase_index] = l1
        result = run(
            make(steps=12, log_every=1, max_grad_norm=0.0),
            tiny.tiny_classifier(),
            tmp_path / f"{l1}",
            nnz=400,
            l1=tuple(strength),
        )
        if phase_index == 0:
            dense = sparseft.training.state.TensorFile(result.dense_path)
            before = tiny.bits(tiny.tiny_classifier())
            size = sum(
                float((dense[n] - before[n]).abs().sum()) for n in dense if "classifier" not in n
            )
        else:
            size = sum(float(d.values.abs().sum()) for d in result.adapter.values())
        return size, [h["loss"] for h in result.history if "loss" in h]

    without, losses = total(0.0)
    # Strong enough for its gradient, l1 / entries, to beat the loss's on many entries.
    with_l1, penalised = total(1e4)
    assert with_l1 < 0.8 * without
    first = 12 * phase_index  # the penalty is not in the loss: the first step's is the same
    assert penalised[first] == losses[first]
    assert all(math.isfinite(x) and x < 3 for x in penalised)


def test_the_l1_gradient_is_the_sign_over_the_entries_once_a_step(tiny, tmp_path):
    from sparseft.training.hooks import PhaseHooks

    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0, 5.0]))
    other = torch.nn.Parameter(torch.tensor([-3.0]))
    base = torch.tensor([2.0, -2.0, 0.0, 1.0])
    weight.grad = torch.tensor([0.5, 0.5, 0.5, 0.5])
    hooks = PhaseHooks(
        "dense", [(weight, lambda: weight.detach() - base), (other, other.detach)], 10.0
    )
    hooks.add_l1()
    assert weight.grad.tolist() == [0.5 - 2.0, 0.5, 0.5, 0.5 + 2.0]
    assert other.grad.tolist() == [-2.0]


def test_a_source_adapter_lies_beneath_and_is_left_out_of_the_diff(run, tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    name = "bert.encoder.layer.0.output.dense.weight"
    delta = torch.zeros(32, 64)
    delta[::3, ::5] = 0.25
    source = Adapter({name: SparseDiff.from_dense(delta)}, name="src")
    starts = {}

    def on_phase(model, phase):
        starts[phase.name] = dict(model.named_parameters())[name].detach().clone()

    result = run(make(on_phase=on_phase), model, tmp_path / "with", source_adapters=[(source, 2.0)])
    assert torch.equal(starts["dense"], before[name] + 2 * delta)
    assert torch.equal(starts["sparse"], before[name] + 2 * delta)
    assert result.adapter.metadata.parents == (source.digest,)
    assert tiny.same_bits(before, tiny.bits(model))
    plain = run(make(), tiny.tiny_classifier(), tmp_path / "without")
    assert plain.adapter.digest != result.adapter.digest
    assert plain.adapter.metadata.parents == ()
    # The fingerprint is of the bottom base, so both fit the same model.
    composer = sparseft.Composer(model, {"src": source, "task": result.adapter})
    composer.apply({"src": 2.0, "task": 1.0})
    composer.revert()
    assert tiny.same_bits(before, tiny.bits(model))


def test_a_masked_lm_adapter_fits_a_classifier_of_the_same_encoder(run, tiny, make, tmp_path):
    """The tied embedding is named after the encoder, wherever the head is registered."""

    class Tokens(torch.utils.data.Dataset):
        inner = tiny.Rows()

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, i):
            row = self.inner[i]
            return {**row, "labels": row["input_ids"]}

    lm = tiny.tiny_masked_lm()
    # Not "cls.*", which speaks of the decoder too, and so of the embedding it is tied to.
    head = ("*LayerNorm*", "cls.predictions.transform.*", "cls.predictions.bias")
    result = run(make(dataset=Tokens()), lm, tmp_path, exclude=head, full_params=())
    assert "bert.embeddings.word_embeddings.weight" in result.adapter
    assert all(name.startswith("bert.") for name in result.adapter)
    classifier = tiny.tiny_classifier()
    classifier.bert.load_state_dict(lm.bert.state_dict(), strict=False)
    composer = sparseft.Composer(classifier, {"language": result.adapter})
    composer.apply(["language"])
    composer.revert()


def test_a_trainer_without_callbacks_works_until_it_is_asked_for_l1(run, tiny, rows, tmp_path):
    class Plain:
        def __init__(self, model):
            self.model = model

        def train(self, resume_from_checkpoint=None):
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=1e-3)
            self.model.train()
            for i in range(3):
                self.model(**tiny.collate([rows[j] for j in range(i, i + 8)])).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    result = run(lambda m, p: Plain(m), tiny.tiny_classifier(), tmp_path / "a")
    assert result.nnz == 500
    assert any((d.values != 0).any() for d in result.adapter.values())
    with pytest.raises(TypeError, match="has no add_callback"):
        run(lambda m, p: Plain(m), tiny.tiny_classifier(), tmp_path / "b", l1=0.1)
