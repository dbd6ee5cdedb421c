"""lottery_ticket over plain loops: masks, rewinding, what is frozen, L1, sources, resume."""

from __future__ import annotations

import json
import math

import pytest
import torch

import sparseft
from sparseft import Adapter, SparseDiff
from sparseft.errors import (
    DataError,
    MaskError,
    NonFiniteLossError,
    ResumeError,
    UnknownNameError,
)
from sparseft.training import LoopTrainer, lottery_ticket

EXCLUDE = ("*LayerNorm*",)
HEAD = ("classifier.*",)


@pytest.fixture
def make(tiny, rows):
    """Factory of factories: ``make(**options of LoopTrainer)`` -> make_trainer."""

    def factory(**options):
        on_phase = options.pop("on_phase", None)
        data = options.pop("dataset", rows)
        defaults = {"steps": 6, "batch_size": 8, "lr": 1e-3, "collate": tiny.collate}

        def make_trainer(model, phase):
            if on_phase is not None:
                on_phase(model, phase)
            return LoopTrainer(
                model,
                data,
                output_dir=phase.output_dir,
                seed=phase.seed,
                **{**defaults, **options},
            )

        return make_trainer

    return factory


def run(make_trainer, model, folder, **options):
    defaults = {"nnz": 500, "exclude": EXCLUDE, "full_params": HEAD}
    return lottery_ticket(make_trainer, model, output_dir=folder, **{**defaults, **options})


def test_the_mask_is_the_exact_top_k_and_everything_else_stays(tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    flags = [p.requires_grad for p in model.parameters()]
    result = run(make(), model, tmp_path)
    assert tiny.same_bits(before, tiny.bits(model))
    assert flags == [p.requires_grad for p in model.parameters()]

    assert result.nnz == result.adapter.nnz == 500
    assert set(result.adapter.dense) == {"classifier.weight", "classifier.bias"}
    assert not any("LayerNorm" in name for name in result.adapter)
    dense = sparseft.training.state.TensorFile(result.dense_path)
    moved = {
        n: (dense[n].float() - before[n].float()).abs()
        for n in dense
        if not n.startswith("classifier.")
    }
    assert not any("LayerNorm" in name for name in moved)
    inside = torch.cat([moved[n].flatten()[p.indices.long()] for n, p in result.masks.items()])
    outside = torch.cat(
        [
            m.flatten()[~result.masks[n].to_mask().flatten()] if n in result.masks else m.flatten()
            for n, m in moved.items()
        ]
    )
    assert inside.min() >= outside.max()
    assert inside.numel() + outside.numel() == sum(m.numel() for m in moved.values())


def test_phase_two_starts_from_theta0_and_freezes_what_is_outside_the_mask(tiny, make, tmp_path):
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


def test_the_adapter_applied_is_the_model_phase_two_ended_with(tiny, make, tmp_path):
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


def test_several_budgets_share_phase_one_and_nest(tiny, make, tmp_path):
    model, phases = tiny.tiny_classifier(), []
    many = run(
        make(on_phase=lambda m, p: phases.append((p.name, p.nnz))),
        model,
        tmp_path / "many",
        nnz=[50, 1000, 200],
    )
    assert phases == [("dense", None), ("sparse", 50), ("sparse", 1000), ("sparse", 200)]
    assert [r.nnz for r in many] == [50, 1000, 200]
    by_size = sorted(many, key=lambda r: r.nnz)
    for small, large in zip(by_size, by_size[1:], strict=False):
        for name, pattern in small.masks.items():
            if pattern.nnz:
                assert not (pattern.to_mask() & ~large.masks[name].to_mask()).any()
    alone = run(make(), tiny.tiny_classifier(), tmp_path / "one", nnz=200)
    assert alone.adapter.digest == many[2].adapter.digest


def test_density_counts_candidate_entries(tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    candidates = sum(
        p.numel()
        for n, p in model.named_parameters()
        if "LayerNorm" not in n and not n.startswith("classifier.")
    )
    result = run(make(), model, tmp_path, nnz=None, density=0.1)
    assert result.nnz == round(0.1 * candidates)
    assert result.adapter.metadata.density == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("phase_index", [0, 1])
def test_l1_shrinks_the_diff_of_its_phase_and_leaves_the_logged_loss_true(
    tiny, make, tmp_path, phase_index
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


def test_a_source_adapter_lies_beneath_and_is_left_out_of_the_diff(tiny, make, tmp_path):
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


def test_a_masked_lm_adapter_fits_a_classifier_of_the_same_encoder(tiny, make, tmp_path):
    """The tied embedding is named after the encoder, wherever the head is registered."""

    class Tokens(torch.utils.data.Dataset):
        inner = tiny.Rows()

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, i):
            row = self.inner[i]
            return {**row, "labels": row["input_ids"]}

    lm = tiny.tiny_masked_lm()
    result = run(
        make(dataset=Tokens()), lm, tmp_path, exclude=("*LayerNorm*", "cls.*"), full_params=()
    )
    assert "bert.embeddings.word_embeddings.weight" in result.adapter
    assert all(name.startswith("bert.") for name in result.adapter)
    classifier = tiny.tiny_classifier()
    classifier.bert.load_state_dict(lm.bert.state_dict(), strict=False)
    composer = sparseft.Composer(classifier, {"language": result.adapter})
    composer.apply(["language"])
    composer.revert()


def test_iterations_grow_the_mask_and_keep_what_was_chosen(tiny, make, tmp_path):
    model, masks, begins = tiny.tiny_classifier(), [], []
    before = tiny.bits(model)

    def on_phase(model, phase):
        begins.append({n: p.detach().clone() for n, p in model.named_parameters()})
        if phase.name == "sparse":
            masks.append(phase.attachment.patterns)

    result = run(make(on_phase=on_phase), model, tmp_path, nnz=301, iterations=3)
    assert [sum(p.nnz for p in m.values()) for m in masks] == [100, 200, 301]
    for old, new in zip(masks, masks[1:], strict=False):
        for name, pattern in old.items():
            assert not (pattern.to_mask() & ~new[name].to_mask()).any(), name
    assert result.nnz == result.adapter.nnz == 301
    # A later iteration begins where the last ended, in both of its phases.
    assert tiny.same_bits(before, tiny.bits(model))
    shared = [n for n in begins[2] if n in begins[3]]
    assert all(torch.equal(begins[2][n], before[n]) for n in shared if "LayerNorm" in n)
    assert any(not torch.equal(begins[2][n], before[n]) for n in shared)


def test_a_later_iteration_starts_its_sparse_phase_from_the_earlier_values(tiny, make, tmp_path):
    leaves = []

    def on_phase(model, phase):
        if phase.name == "sparse":
            leaves.append({n: v.detach().clone() for n, v in phase.attachment.leaves.items()})

    first = run(make(), tiny.tiny_classifier(), tmp_path / "a", nnz=100, seed=1)
    run(
        make(on_phase=on_phase),
        tiny.tiny_classifier(),
        tmp_path / "b",
        nnz=200,
        iterations=2,
        seed=1,
    )
    assert all((v == 0).all() for v in leaves[0].values())
    got = torch.cat([v[v != 0] for v in leaves[1].values()]).sort().values
    trained = torch.cat([d.values for d in first.adapter.values()])
    torch.testing.assert_close(got, trained[trained != 0].sort().values, rtol=0, atol=0)


def test_a_finished_run_is_not_run_again(tiny, make, tmp_path):
    first = run(make(), tiny.tiny_classifier(), tmp_path)

    def never(model, phase):
        raise AssertionError("a finished phase was built again")

    again = run(never, tiny.tiny_classifier(), tmp_path)
    assert again.adapter.digest == first.adapter.digest
    assert again.history == first.history
    assert {h["phase"] for h in again.history} == {
        "iteration-0/dense",
        "iteration-0/sparse-nnz-500",
    }


def test_heads_initialised_anew_do_not_change_a_continued_run(tiny, make, tmp_path):
    def model(head_seed):
        m = tiny.tiny_classifier()
        torch.manual_seed(head_seed)
        torch.nn.init.normal_(m.classifier.weight)
        return m

    class Stop(Exception):
        pass

    def stop_in_sparse(m, phase):
        if phase.name == "sparse":
            raise Stop

    whole = run(make(), model(1), tmp_path / "a")
    with pytest.raises(Stop):
        run(make(on_phase=stop_in_sparse), model(1), tmp_path / "b")
    resumed = run(make(), model(2), tmp_path / "b")
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_an_error_leaves_the_model_as_it_was(tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    for where in ("dense", "sparse"):

        def interrupt(m, phase, where=where):
            if phase.name == where:
                with torch.no_grad():
                    m.bert.pooler.dense.weight.add_(1) if where == "dense" else None
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(make(on_phase=interrupt), model, tmp_path)
        assert tiny.same_bits(before, tiny.bits(model)), where
        assert all(p.requires_grad for p in model.parameters())
    run(make(), model, tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: was 0, now 1"),
        ({"nnz": 501}, r"nnz: was \[500\], now \[501\]"),
        ({"l1": 0.1}, "l1: was"),
        ({"exclude": ()}, "candidates: was"),
    ],
)
def test_continuing_with_other_settings_names_the_keys(tiny, make, tmp_path, change, named):
    run(make(), tiny.tiny_classifier(), tmp_path)
    with pytest.raises(ResumeError, match=named):
        run(make(), tiny.tiny_classifier(), tmp_path, **change)
    assert run(make(), tiny.tiny_classifier(), tmp_path, resume=False, **change).adapter.nnz


def test_continuing_on_another_base_or_with_another_trainer_is_refused(tiny, make, tmp_path):
    class Stop(Exception):
        pass

    class Crash:
        def on_pre_optimizer_step(self, *, step, model, optimizer):
            raise Stop

    def crashing(model, phase):
        trainer = make()(model, phase)
        trainer.add_callback(Crash())
        return trainer

    with pytest.raises(Stop):
        run(crashing, tiny.tiny_classifier(), tmp_path)
    with pytest.raises(ResumeError, match="base: was"):
        run(make(), tiny.tiny_classifier(seed=1), tmp_path)
    with pytest.raises(ResumeError, match=r"'iteration-0/dense'.*\n  steps: was 6, now 7"):
        run(make(steps=7), tiny.tiny_classifier(), tmp_path)


def test_a_nan_loss_says_the_phase_step_and_checkpoint(tiny, make, tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(None)
        return model(**batch).loss * (math.nan if len(calls) == 10 else 1.0)

    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    with pytest.raises(NonFiniteLossError, match="step 3 of 6") as caught:
        run(make(loss_fn=loss, save_every=2), model, tmp_path)
    assert "sparse-nnz-500/checkpoint-00000002.pt" in str(caught.value)
    assert tiny.same_bits(before, tiny.bits(model))
    resumed = run(make(save_every=2), model, tmp_path)
    whole = run(make(save_every=2), tiny.tiny_classifier(), tmp_path / "whole")
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_a_full_disk_while_saving_keeps_the_old_adapter(tiny, make, tmp_path, monkeypatch):
    result = run(make(), tiny.tiny_classifier(), tmp_path)
    old = result.path.read_bytes()
    import os

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        result.adapter.save(result.path)
    monkeypatch.undo()
    assert result.path.read_bytes() == old
    assert [p.name for p in result.path.parent.iterdir()] == ["adapter.safetensors"]


def test_bad_input_is_named(tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    with pytest.raises(DataError, match="empty"):
        run(make(dataset=[]), model, tmp_path / "e")
    with pytest.raises(MaskError, match="either nnz or density"):
        run(make(), model, tmp_path, density=0.1)
    with pytest.raises(MaskError, match=r"nnz=100,000,000 is outside 1 \.\.\. "):
        run(make(), model, tmp_path, nnz=100_000_000)
    with pytest.raises(MaskError, match=r"density must be in \(0, 1\], got 1\.5"):
        run(make(), model, tmp_path, nnz=None, density=1.5)
    with pytest.raises(UnknownNameError, match=r"'\*LayrNorm\*'"):
        run(make(), model, tmp_path, exclude=("*LayrNorm*",))
    with pytest.raises(MaskError, match="no parameter is left"):
        run(make(), model, tmp_path, include=("*LayerNorm*",))
    with pytest.raises(ValueError, match="l1 must be"):
        run(make(), model, tmp_path, l1=-1.0)
    with pytest.raises(ValueError, match="list of nnz"):
        run(make(), model, tmp_path, nnz=[1, 2], iterations=2)
    with pytest.raises(TypeError, match="make_trainer returned NoneType"):
        run(lambda m, p: None, model, tmp_path / "n")


def test_a_trainer_without_callbacks_works_until_it_is_asked_for_l1(tiny, rows, tmp_path):
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


def test_the_adapter_file_holds_no_path_and_no_time(tiny, make, tmp_path):
    folder = tmp_path / "somewhere-particular"
    a = run(make(), tiny.tiny_classifier(), folder, metadata={"data": {"rows": 48}})
    b = run(make(), tiny.tiny_classifier(), tmp_path / "b", metadata={"data": {"rows": 48}})
    assert a.path.read_bytes() == b.path.read_bytes()
    assert b"somewhere-particular" not in a.path.read_bytes()
    assert a.adapter.metadata.extra["data"] == {"rows": 48}
    assert a.adapter.metadata.method == "lottery_ticket/magnitude"
    state = json.loads((folder / "state.json").read_text())
    assert state["phases"]["iteration-0/dense"]["status"] == "done"


def test_density_one_trains_every_candidate_as_dense_fine_tuning_does(tiny, make, tmp_path):
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


def test_theta0_may_be_a_file_of_the_base_that_is_not_copied(tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    base = tmp_path / "base"
    model.save_pretrained(base)
    file = base / "model.safetensors"
    plain = run(make(), model, tmp_path / "plain")
    shared = run(make(), model, tmp_path / "shared", theta0=file)
    assert shared.path.read_bytes() == plain.path.read_bytes()
    size = {f: (tmp_path / f / "theta0.safetensors").stat().st_size for f in ("plain", "shared")}
    assert size["shared"] < size["plain"] / 10

    class Stop(Exception):
        pass

    def stop_in_sparse(m, phase):
        if phase.name == "sparse":
            raise Stop

    with pytest.raises(Stop):
        run(make(on_phase=stop_in_sparse), model, tmp_path / "stopped", theta0=file)
    with pytest.raises(ResumeError, match="pass the same theta0"):
        run(make(), model, tmp_path / "stopped")
    tiny.tiny_classifier(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ResumeError, match="another file or another base"):
        run(make(), model, tmp_path / "stopped", theta0=tmp_path / "other" / "model.safetensors")
    again = run(make(), model, tmp_path / "stopped", theta0=file)
    assert again.path.read_bytes() == plain.path.read_bytes()


def test_several_processes_are_refused(tiny, make, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="runs in one process"):
        run(make(), tiny.tiny_classifier(), tmp_path)


@pytest.mark.parametrize(
    ("selector", "scope"),
    [("magnitude", "tensor"), ("magnitude", "row"), ("random", "global"), ("random", "row")],
)
def test_any_selector_and_scope_gives_the_exact_count(tiny, make, tmp_path, selector, scope):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    result = run(make(steps=2), model, tmp_path, nnz=2500, selector=selector, scope=scope)
    assert result.nnz == result.adapter.nnz == 2500
    assert result.adapter.metadata.method == f"lottery_ticket/{selector}"
    assert tiny.same_bits(before, tiny.bits(model))
