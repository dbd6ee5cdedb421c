"""Fixtures of the training tests: a tiny BERT, its data, a folder a recipe can name as its base."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparseft.training import LoopTrainer, lottery_ticket

_spec = importlib.util.spec_from_file_location("_tiny", Path(__file__).with_name("_tiny.py"))
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The functions of ``_tiny.py`` (test folders are not importable under importlib mode)."""
    return _tiny


@pytest.fixture
def rows():
    return _tiny.Rows()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny masked LM with a word-level tokenizer, as a recipe names it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-base")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{i}" for i in range(_tiny.VOCAB - len(special))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    ).save_pretrained(folder)
    _tiny.tiny_masked_lm(seed=3).save_pretrained(folder)
    return folder


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


@pytest.fixture
def run() -> Callable[..., Any]:
    """``run(make_trainer, model, folder, **options of lottery_ticket)``, with a head and norms."""

    def ticket(make_trainer, model, folder, **options):
        defaults = {"nnz": 500, "exclude": ("*LayerNorm*",), "full_params": ("classifier.*",)}
        return lottery_ticket(make_trainer, model, output_dir=folder, **{**defaults, **options})

    return ticket
