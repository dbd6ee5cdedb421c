"""The study end to end, with a small encoder and few steps: what it writes, resumes, shows.

The shipped encoder goes through the same in the slow lane; test_assets.py looks at it every time.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import sparseft
from sparseft.demo.encoder import (
    ASSETS,
    PROVENANCE,
    TOKENIZER,
    encoder_config,
    load_classifier,
    load_masked_lm,
    load_tokenizer,
    save_encoder,
)
from sparseft.demo.names import SOURCE, names
from sparseft.demo.pretrain import masked_lm_loss
from sparseft.demo.recipe import RECIPE, DemoRecipe, RunRecipe
from sparseft.demo.scoring import FULL_FT, SETTINGS, held_out_examples
from sparseft.demo.study import run_demo
from sparseft.demo.training import language_batches, language_loss, task_batches
from sparseft.demo.tune import override
from sparseft.errors import RecipeError
from sparseft.evaluation.report import Results


@pytest.fixture(scope="module")
def recipe() -> DemoRecipe:
    shipped = DemoRecipe.load()
    return dataclasses.replace(
        shipped,
        task=dataclasses.replace(shipped.task, epochs=1, batch_size=256, density=0.05),
        language=dataclasses.replace(
            shipped.language, steps=3, batch_size=8, phrases=40, density=0.05
        ),
        quick=RunRecipe(languages=("fi", "sw"), seeds=1),
        full=RunRecipe(languages=("qu",), seeds=1, densities=(0.01, 0.05)),
    )


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """The shipped tokenizer around an encoder a tenth of the shipped one's size, untrained."""
    from transformers import XLMRobertaForMaskedLM

    folder = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    config = encoder_config(len(load_tokenizer()), hidden=32, layers=1, heads=2)
    save_encoder(XLMRobertaForMaskedLM(config), folder)
    for file in (TOKENIZER, PROVENANCE):
        shutil.copy(ASSETS / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def demo(recipe, assets):
    """``demo(folder, **options of run_demo)`` with that encoder."""

    def run(folder: Path, **options):
        defaults = {"quiet": True, "recipe": recipe, "assets": assets, "workers": 1}
        return run_demo(output_dir=folder, **{**defaults, **options})

    return run


@pytest.fixture(scope="module")
def done(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder)


def test_scores_every_setting_in_every_language(done):
    _, result = done
    cells = {(r.setting, r.language) for r in result.results.rows if r.metric == "macro_f1"}
    settings = (*SETTINGS["plain"], *SETTINGS["denoised"], FULL_FT)
    assert cells == {(setting, code) for setting in settings for code in (SOURCE, "fi", "sw")}
    assert all(r.n == len(names(r.language, "test")) for r in result.results.rows)


def test_files_hold_what_was_found(done):
    folder, result = done
    assert [p.name for p in result.files] == ["results.json", "results.md", "results.png"]
    assert Results.load(folder / "results.json").rows == result.results.rows
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "task + language" in (folder / "results.md").read_text()
    record = json.loads((folder / "results.json").read_text())["provenance"]
    assert record["names_as_pretrained"] is True
    assert record["recipe"]["language"]["steps"] == 3
    assert record["peak_rss_bytes"] == result.peak_rss


def test_adapters_are_sparse_and_apply(done, assets):
    folder, result = done
    names = ("en", "fi", "sw", "task", "task-on-en")
    both = sorted(name + kind for name in names for kind in ("", "-denoised"))
    assert sorted(a.name for a in result.adapters) == both
    backbone = sum(p.numel() for p in load_classifier(assets).roberta.parameters())
    for file in result.adapters:
        assert file.path.is_file()
        assert file.file_bytes == file.path.stat().st_size
        assert file.nnz == pytest.approx(0.05 * backbone, abs=1)
    model = load_classifier(assets, seed=0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    saved = {a.name: sparseft.Adapter.load(a.path.parent) for a in result.adapters}
    assert saved["task-on-en"].metadata.parents == (saved["en"].digest,)
    assert saved["task-on-en-denoised"].metadata.parents == (saved["en-denoised"].digest,)
    assert not saved["task"].metadata.parents
    composer = sparseft.Composer(model, {"task": saved["task-on-en"], "fi": saved["fi"]})
    composer.apply(["task", "fi"])
    assert not torch.equal(model.classifier.out_proj.weight, before["classifier.out_proj.weight"])
    composer.revert()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_language_adapter_leaves_the_head_alone(done):
    _, result = done
    path = next(a.path for a in result.adapters if a.name == "fi")
    adapter = sparseft.Adapter.load(path.parent)
    assert all(name.startswith("roberta.") for name in adapter.diffs)
    assert not adapter.dense
    task = sparseft.Adapter.load(next(a.path for a in result.adapters if a.name == "task").parent)
    assert {name.split(".")[0] for name in task.dense} == {"classifier"}


def test_denoised_masks_come_from_the_same_dense_phase(done, recipe):
    folder, result = done
    runs = folder / "runs" / "quick-seed-0"
    for name in ("fi", "task"):
        theirs = runs / f"{name}-{recipe.denoise.slug}"
        assert (runs / name / "iteration-0" / "dense.safetensors").is_file()
        assert not (theirs / "iteration-0" / "dense.safetensors").exists()
    adapters = {a.name: sparseft.Adapter.load(a.path.parent) for a in result.adapters}
    assert adapters["fi"].metadata.method == "lottery_ticket/magnitude"
    about = adapters["fi-denoised"].metadata
    assert about.method == "lottery_ticket/deltas_svd"
    assert about.extra["selector_options"]["energy"] == recipe.denoise.level
    shared = {a.name: a.shared for a in result.adapters}
    assert shared["fi"] is None
    assert 0.05 < shared["fi-denoised"] < 1  # another mask, and not a random one
    pairs = (adapters["fi"].diffs, adapters["fi-denoised"].diffs)
    common = sum(
        len({*plain.indices.tolist()} & {*pairs[1][n].indices.tolist()})
        for n, plain in pairs[0].items()
        if n in pairs[1]
    )
    assert shared["fi-denoised"] == common / adapters["fi"].nnz


def test_sparse_phase_keeps_less(done):
    _, result = done
    dense, sparse = (result.state[f"language, {phase} phase"] for phase in ("dense", "sparse"))
    assert sparse.total < 0.5 * dense.total
    assert sparse.diff > 0
    assert dense.diff == 0


def test_a_second_run_trains_nothing_and_gives_the_same(done, demo, monkeypatch):
    folder, result = done
    before = {a.name: a.path.read_bytes() for a in result.adapters}

    def no_step(self, *args, **kwargs):
        raise AssertionError("an optimizer stepped")

    monkeypatch.setattr(torch.optim.AdamW, "step", no_step)
    again = demo(folder)
    assert again.results.rows == result.results.rows
    assert {a.name: a.path.read_bytes() for a in again.adapters} == before


def test_interrupted_run_goes_on_with_the_same_bits(done, demo, tmp_path, monkeypatch):
    _, result = done
    calls = 0
    step = torch.optim.AdamW.step

    def interrupt(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path)
    again = demo(tmp_path)
    assert again.results.rows == result.results.rows
    mine = {a.name: a.path.read_bytes() for a in again.adapters}
    assert mine == {a.name: a.path.read_bytes() for a in result.adapters}


def test_full_covers_densities(done, demo):
    folder, _ = done  # beside a quick run, as a user would
    result = demo(folder, full=True)
    assert _composed(result) == {(0, density) for density in (0.01, 0.05)}
    masks = [
        sparseft.Adapter.load(a.path.parent)
        for a in result.adapters
        if a.name == "qu" and a.seed == 0
    ]
    for name, diff in masks[0].diffs.items():
        assert set(diff.indices.tolist()) <= set(masks[1].diffs[name].indices.tolist())


@pytest.mark.slow
def test_full_covers_seeds(done, demo, recipe):
    folder, _ = done
    recipe = dataclasses.replace(recipe, full=dataclasses.replace(recipe.full, seeds=2))
    result = demo(folder, full=True, recipe=recipe)
    assert _composed(result) == {(seed, density) for seed in (0, 1) for density in (0.01, 0.05)}


def _composed(result) -> set[tuple[int, float | None]]:
    rows = [r for r in result.results.rows if r.setting == SETTINGS["denoised"][1]]
    return {(r.seed, r.density) for r in rows if r.metric == "macro_f1"}


def test_two_workers_give_the_bits_of_one(done, demo, tmp_path):
    _, result = done
    again = demo(tmp_path, workers=2)
    assert again.results.rows == result.results.rows
    assert again.state == result.state
    mine = {a.name: a.path.read_bytes() for a in again.adapters}
    assert mine == {a.name: a.path.read_bytes() for a in result.adapters}


def test_prints_the_table(done, demo, capsys):
    folder, _ = done
    demo(folder, quiet=False)
    out = capsys.readouterr().out
    for part in (
        "Finnish",
        "Swahili",
        "mean of targets",
        "fine-tuning",
        "Peak memory",
        "task + language over task:",
        "denoised task + language over task + language:",
    ):
        assert part in out


@pytest.mark.slow
def test_the_shipped_encoder_goes_through_the_study(recipe, tmp_path):
    result = run_demo(output_dir=tmp_path, quiet=True, recipe=recipe, workers=2)
    cells = {(r.setting, r.language) for r in result.results.rows}
    assert len(cells) == 15
    assert len(result.adapters) == 10
    shipped = sum(p.numel() for p in load_classifier().roberta.parameters())
    assert all(a.nnz == pytest.approx(0.05 * shipped, abs=1) for a in result.adapters)
    assert all(0 <= r.value <= 1 for r in result.results.rows)


def test_training_data_is_of_training_keys_and_the_right_language(recipe):
    tokenizer = load_tokenizer()
    own = set(names(SOURCE, "train").values())
    seen = [
        tokenizer.decode(row, skip_special_tokens=True)
        for batch in task_batches(tokenizer, recipe.task, seed=0)
        for row in batch["input_ids"]
    ]
    assert len(seen) == len(names(SOURCE, "train"))
    assert len(set(seen) - own) < 0.1 * len(own)  # NFKD rewrites a few
    assert not set(seen) & {e.text for e in held_out_examples(SOURCE)}
    batches = language_batches("fi", tokenizer, recipe.language, seed=0)
    assert len(batches) == recipe.language.steps
    again = language_batches("fi", tokenizer, recipe.language, seed=0)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))
    other = language_batches("fi", tokenizer, recipe.language, seed=1)
    assert not torch.equal(batches[0].targets, other[0].targets)


def test_recipe_is_checked(tmp_path: Path):
    text = RECIPE.read_text()
    bad = tmp_path / "recipe.yaml"
    bad.write_text(text.replace("mask_rate:", "mask_ratio:"))
    with pytest.raises(RecipeError, match="mask_ratio.*mask_rate"):
        DemoRecipe.load(bad)
    bad.write_text(text.replace("rule: energy", "rule: enrgy"))
    with pytest.raises(RecipeError, match="Did you mean 'energy'"):
        DemoRecipe.load(bad)
    bad.write_text(text.replace("residual: 0.1", "residual: 1.1"))
    with pytest.raises(RecipeError, match="residual is 1.1"):
        DemoRecipe.load(bad)
    with pytest.raises(RecipeError, match="'de'"):
        RunRecipe(languages=("de",), seeds=1)
    assert DemoRecipe.load().quick.languages[:4] == ("fi", "tr", "sw", "qu")
    assert len(DemoRecipe.load().full.languages) == 10


def test_tuning_overrides_are_checked():
    recipe = override(DemoRecipe.load(), ["language.lr=1e-3", "language.steps=7"])
    assert (recipe.language.lr, recipe.language.steps) == (1e-3, 7)
    assert recipe.task == DemoRecipe.load().task
    for bad, message in (
        ("language.rate=1", "rate"),
        ("lnguage.lr=1", "language"),
        ("lr", "part."),
    ):
        with pytest.raises(RecipeError, match=message):
            override(recipe, [bad])


def test_language_loss_moves_only_rows_of_pieces_that_occur(recipe):
    """What the softmax's normaliser pulls on every row must not reach the mask."""
    model, tokenizer = load_masked_lm(), load_tokenizer()
    batch = language_batches("fi", tokenizer, recipe.language, seed=0)[0]
    torch.testing.assert_close(language_loss(model, batch), masked_lm_loss(model, batch))
    language_loss(model, batch).backward()
    rows = model.get_input_embeddings().weight.grad.abs().sum(dim=1).nonzero().flatten()
    assert set(rows.tolist()) <= set(batch.input_ids.unique().tolist())
    model.zero_grad()
    masked_lm_loss(model, batch).backward()
    tied = model.get_input_embeddings().weight.grad.abs().sum(dim=1)
    assert int((tied > 0).sum()) > 10 * len(rows)  # the reason for all this
