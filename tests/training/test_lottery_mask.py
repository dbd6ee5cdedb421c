"""What a lottery ticket trains: how many entries, which, nested and grown."""

from __future__ import annotations

import logging

import pytest
import torch

import sparseft
from sparseft.selection import candidates_of
from sparseft.training.parameters import Trainables


def test_the_mask_is_the_exact_top_k_and_everything_else_stays(run, tiny, make, tmp_path):
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


@pytest.mark.parametrize(
    ("selector", "scope"),
    [("magnitude", "tensor"), ("magnitude", "row"), ("random", "global"), ("random", "row")],
)
def test_any_selector_and_scope_gives_the_exact_count(run, tiny, make, tmp_path, selector, scope):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    result = run(make(steps=2), model, tmp_path, nnz=2500, selector=selector, scope=scope)
    assert result.nnz == result.adapter.nnz == 2500
    assert result.adapter.metadata.method == f"lottery_ticket/{selector}"
    assert tiny.same_bits(before, tiny.bits(model))


def test_several_budgets_share_phase_one_and_nest(run, tiny, make, tmp_path):
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


def test_density_counts_candidate_entries(run, tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    candidates = sum(
        p.numel()
        for n, p in model.named_parameters()
        if "LayerNorm" not in n and not n.startswith("classifier.")
    )
    result = run(make(), model, tmp_path, nnz=None, density=0.1)
    assert result.nnz == round(0.1 * candidates)
    assert result.adapter.metadata.density == pytest.approx(0.1, abs=1e-4)


def test_iterations_grow_the_mask_and_keep_what_was_chosen(run, tiny, make, tmp_path):
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


def test_a_later_iteration_starts_its_sparse_phase_from_the_earlier_values(
    run, tiny, make, tmp_path
):
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


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        (None, ["cls.*"]),
        (None, "bert.embeddings.*"),
        (["cls.predictions.decoder.weight", "*query*"], ["*bias"]),
        (["bert.*"], ["cls.predictions.decoder.*"]),
    ],
)
def test_patterns_mean_what_they_mean_to_select_also_for_tied_names(tiny, include, exclude):
    model = tiny.tiny_masked_lm()
    parts = Trainables.of(model, include=include, exclude=exclude, full_params=())
    wanted = candidates_of(model, include, exclude).parameters
    assert parts.candidates.keys() == wanted.keys()
    tied = "bert.embeddings.word_embeddings.weight"
    assert (tied in wanted) == (include is not None and "bert.*" not in include)


def test_a_tied_weight_excluded_by_its_other_name_stays_frozen(tiny, caplog):
    """The promise of exclude is about the weight, whatever name the pattern knows it by."""
    model = tiny.tiny_masked_lm()
    other, tied = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    with caplog.at_level(logging.INFO):
        parts = Trainables.of(model, include=None, exclude=[other], full_params=())
    assert tied in parts.frozen
    assert any(tied in r.getMessage() and other in r.getMessage() for r in caplog.records)


def test_fewer_moved_than_nnz_is_said(run, tiny, make, tmp_path, caplog):
    """Rows of the embedding whose words never came in a batch cannot move."""
    model = tiny.tiny_classifier()
    embedding = "bert.embeddings.word_embeddings.weight"
    nnz = model.get_parameter(embedding).numel()
    with caplog.at_level(logging.WARNING):
        result = run(
            make(steps=1), model, tmp_path, nnz=nnz, include=[embedding], exclude=(), full_params=()
        )
    assert result.nnz == nnz
    dense = sparseft.training.state.TensorFile(result.dense_path)
    moved = int((dense[embedding] != model.get_parameter(embedding)).sum())
    assert 0 < moved < nnz
    [said] = [r.getMessage() for r in caplog.records if "asked for" in r.getMessage()]
    assert f"{nnz:,} entries were asked for" in said
    assert f"only {moved:,} with a score above 0" in said
