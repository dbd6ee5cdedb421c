"""Runs that share a dense phase, denoised masks, and selectors that need no dense phase."""

from __future__ import annotations

import pytest
import torch

from sparseft import Denoise, select
from sparseft.errors import MaskError, OptionError, ResumeError, UnknownNameError
from sparseft.training import LoopTrainer, dense_phase
from sparseft.training.state import TensorFile

HEAD = {"exclude": ("*LayerNorm*",), "full_params": ("classifier.*",)}


@pytest.fixture
def phases():
    """Names of the phases that trained."""
    return []


@pytest.fixture
def make_noted(make, phases):
    """A factory like ``make``'s whose trainers note when they train."""

    def factory(**options):
        inner = make(**options)

        def make_trainer(model, phase):
            trainer = inner(model, phase)
            train = trainer.train

            def noted(*args, **kwargs):
                phases.append(phase.name)
                return train(*args, **kwargs)

            trainer.train = noted
            return trainer

        return make_trainer

    return factory


def values(adapter):
    out = {n: (d.indices.tolist(), d.values.tolist()) for n, d in adapter.diffs.items()}
    return {**out, **{n: t.tolist() for n, t in adapter.dense.items()}}


def test_a_shared_dense_phase_gives_what_a_run_of_its_own_gives(
    run, tiny, make_noted, phases, tmp_path
):
    model = tiny.tiny_classifier()
    alone = run(make_noted(), model, tmp_path / "alone")
    file = dense_phase(make_noted(), model, output_dir=tmp_path / "phase1", **HEAD)
    phases.clear()
    shared = run(make_noted(), model, tmp_path / "shared", phase1=file)
    assert phases == ["sparse"]
    assert values(shared.adapter) == values(alone.adapter)
    assert shared.dense_path == file
    assert [e["phase"] for e in shared.history] == [e["phase"] for e in alone.history]
    # Another run is a dense phase to share, too, also from a head that starts elsewhere.
    other = tiny.tiny_classifier()
    with torch.no_grad():
        other.classifier.weight.add_(1.0)
    again = run(make_noted(), other, tmp_path / "again", phase1=tmp_path / "alone")
    assert values(again.adapter) == values(alone.adapter)


def test_a_dense_phase_goes_on_from_what_it_finds(tiny, make_noted, phases, tmp_path):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    first = dense_phase(make_noted(), model, output_dir=tmp_path, **HEAD).read_bytes()
    assert dense_phase(make_noted(), model, output_dir=tmp_path, **HEAD).read_bytes() == first
    assert phases == ["dense"]
    assert all(torch.equal(value, tiny.bits(model)[n]) for n, value in before.items())


def test_what_cannot_be_shared_is_refused(run, tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        run(make(), model, tmp_path / "a", phase1=tmp_path / "nothing")
    dense_phase(make(steps=1), model, output_dir=tmp_path / "phase1", seed=1, **HEAD)
    with pytest.raises(ValueError, match="the same folder"):
        run(make(), model, tmp_path / "phase1", seed=1, phase1=tmp_path / "phase1", resume=False)
    assert (tmp_path / "phase1/iteration-0/dense.safetensors").is_file()
    with pytest.raises(ResumeError, match=r"other settings(.|\n)*seed: was 1, now 0"):
        run(make(), model, tmp_path / "b", phase1=tmp_path / "phase1")
    with pytest.raises(ResumeError, match="l1 of phase 1: was 0.0, now 0.5"):
        run(make(), model, tmp_path / "c", phase1=tmp_path / "phase1", seed=1, l1=0.5)
    run(make(steps=1), model, tmp_path / "d", phase1=tmp_path / "phase1", seed=1, l1=(0.0, 0.5))
    with pytest.raises(ValueError, match="dense phase of its own each; got 'magnitude' with"):
        run(make(), model, tmp_path / "e", phase1=tmp_path / "phase1", iterations=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "globl"}, MaskError, "'globl'.*'global'"),
        ({"selector": "deltas_svd", "selector_options": {"rnk": 4}}, UnknownNameError, "'rank'"),
        ({"selector": "deltas_svd"}, OptionError, "exactly one"),
        ({"selector": "fishr"}, UnknownNameError, "'fisher'"),
        ({"selector": "file"}, OptionError, "needs path"),
        ({"denoise": {"rank": 4}}, OptionError, "wanted a sparseft.Denoise"),
        ({"denoise": Denoise}, OptionError, "wanted a sparseft.Denoise"),
        (
            {"denoise": Denoise(rank=4), "selector_options": {"energy": 0.9}},
            OptionError,
            "'energy', which denoise gives too",
        ),
        ({"selector": "n:m"}, MaskError, "keeps [0-9,]+ entries by itself"),
    ],
)
def test_wrong_ways_to_choose_are_refused_before_anything_trains(
    run, tiny, make_noted, phases, tmp_path, options, error, message
):
    with pytest.raises(error, match=message):
        run(make_noted(), tiny.tiny_classifier(), tmp_path, **options)
    assert not phases


def test_until_masks_are_chosen_the_way_to_choose_may_change(
    run, tiny, make_noted, phases, tmp_path
):
    model = tiny.tiny_classifier()
    wrong = {"selector": "tiles", "selector_options": {"fraction": 7}}
    with pytest.raises(OptionError, match="fraction is 7"):
        run(make_noted(), model, tmp_path, **wrong)
    assert phases == ["dense"]
    right = {"selector": "tiles", "selector_options": {"fraction": 0.5}}
    result = run(make_noted(), model, tmp_path, **right)
    assert phases == ["dense", "sparse"]
    assert result.nnz == 500
    with pytest.raises(ResumeError, match=r"nnz: was(.|\n)*with phase1="):
        run(make_noted(), model, tmp_path, nnz=400, **right)


def test_a_structure_says_its_own_number(run, tiny, make, tmp_path):
    options = {"selector": "n:m", "selector_options": {"n": 1, "m": 8}, "nnz": None}
    result = run(make(steps=1), tiny.tiny_classifier(), tmp_path, **options)
    assert result.nnz == result.adapter.nnz > 500


def test_denoise_is_the_selector_of_denoised_differences(run, tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    result = run(make(), model, tmp_path, denoise=Denoise(rank=2, residual=0.05))
    tuned = tiny.tiny_classifier()
    theta1 = TensorFile(result.dense_path)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in theta1:
                parameter.copy_(theta1[name])
    options = {"rank": 2, "residual": 0.05, "include": list(result.masks)}
    wanted = select(tuned, "deltas_svd", nnz=500, base=tiny.tiny_classifier(), **options)
    assert result.masks.equals(wanted)
    plain = select(tuned, nnz=500, base=tiny.tiny_classifier(), include=list(result.masks))
    assert not result.masks.equals(plain)
    about = result.adapter.metadata
    assert about.method == "lottery_ticket/deltas_svd"
    assert about.extra["selector_options"]["rank"] == 2
    with pytest.raises(OptionError, match="is for selector 'deltas_svd'"):
        run(make(), model, tmp_path / "b", denoise=Denoise(rank=2), selector="random")


def test_several_sizes_of_a_denoised_mask_nest_and_are_scored_once(
    run, tiny, make, tmp_path, monkeypatch
):
    import sparseft.training.mask_choice as mask_choice

    calls = []
    plain = mask_choice.select
    monkeypatch.setattr(
        mask_choice, "select", lambda *a, **k: calls.append(k["nnz"]) or plain(*a, **k)
    )
    model = tiny.tiny_classifier()
    results = run(
        make(steps=2), model, tmp_path, nnz=[100, 400], denoise=Denoise(energy=0.5, residual=0.0)
    )
    assert calls == [[100, 400]]
    small, large = (r.masks for r in results)
    for name, pattern in small.items():
        assert torch.isin(pattern.indices, large[name].indices).all()
    assert small.nnz == 100


@pytest.mark.parametrize(
    ("selector", "options"),
    [
        ("low_rank", {"rank": 2}),
        ("random", {}),
        ("weight_magnitude", {}),
        ("fisher", {"max_batches": 2}),
        ("gradient", {"max_batches": 2}),
        ("tiles", {"score": "weight_magnitude", "fraction": 0.5}),
        ("rows", {"score": "fisher", "max_batches": 2}),
    ],
)
def test_selectors_that_look_at_no_difference_run_no_dense_phase(
    run, tiny, make_noted, phases, tmp_path, selector, options
):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    result = run(make_noted(), model, tmp_path, selector=selector, selector_options=options)
    assert phases == ["sparse"]
    assert result.dense_path is None
    assert result.nnz == 500
    assert all(torch.equal(value, tiny.bits(model)[n]) for n, value in before.items())


def test_gradients_are_those_of_the_trainers_own_batches(run, tiny, rows, make, tmp_path):
    options = {"selector": "fisher", "selector_options": {"max_batches": 3}}
    result = run(make(), tiny.tiny_classifier(), tmp_path, **options)
    seen = []

    def make_trainer(model, phase):
        trainer = make()(model, phase)
        seen.append(trainer)
        return trainer

    run(make_trainer, tiny.tiny_classifier(), tmp_path / "again", **options)
    selecting = seen[0]
    assert isinstance(selecting, LoopTrainer)
    wanted = select(
        tiny.tiny_classifier(),
        "fisher",
        nnz=500,
        batches=list(selecting.batches())[:3],
        include=list(result.masks),
    )
    assert result.masks.equals(wanted)


def test_a_trainer_without_batches_is_named(run, tiny, tmp_path):
    class Plain:
        def train(self, resume_from_checkpoint=None):
            return None

    with pytest.raises(TypeError, match=r"Plain has no batches\(\)"):
        run(lambda model, phase: Plain(), tiny.tiny_classifier(), tmp_path, selector="fisher")


def test_options_of_another_selector_are_named(run, tiny, make, tmp_path):
    with pytest.raises(UnknownNameError, match="no option 'rnk'"):
        run(
            make(), tiny.tiny_classifier(), tmp_path, selector="low_rank",
            selector_options={"rnk": 2},
        )  # fmt: skip
