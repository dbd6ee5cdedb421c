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


_LABELS = ("negative", "neutral", "positive")


def sentences(n: int, shift: int = 0) -> list[tuple[str, str]]:
    return [
        (f"w{(i * 7 + shift) % 50} w{i % 11} w{(3 * i) % 40} w{i % 5}", _LABELS[i % 3])
        for i in range(n)
    ]


@pytest.fixture
def recipe_data(tmp_path: Path, tiny_base: Path) -> dict:
    for folder, shift in (("indonesian", 0), ("balinese", 3), ("sundanese", 5)):
        path = tmp_path / "data" / "nusax" / "sentiment" / folder
        path.mkdir(parents=True)
        lines = [f"{i},{t},{label}" for i, (t, label) in enumerate(sentences(9, shift))]
        (path / "test.csv").write_text("id,text,label\n" + "\n".join(lines) + "\n")
    train = tmp_path / "data" / "smsa.tsv"
    train.write_text("".join(f"{t}\t{label}\n" for t, label in sentences(30)))
    for language in ("ban", "ind"):
        text = "\n".join(t for t, _ in sentences(40, len(language)))
        (tmp_path / "data" / f"{language}.txt").write_text(text + "\n")
    common = {
        "steps": 3,
        "batch_size": 4,
        "max_length": 12,
        "lr": 1e-3,
        "density": 0.1,
        "save_every": 2,
        "log_every": 1,
    }
    return {
        "name": "tiny",
        "data_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "model": {"base": str(tiny_base), "device": "cpu"},
        "task": {
            **common,
            "name": "nusax_senti",
            "source": "ind",
            "train_file": "smsa.tsv",
            "columns": ["text", "label"],
            "seeds": [0, 1],
            "exclude": ["*LayerNorm*"],
        },
        "language": {
            **common,
            "texts": {"ban": "ban.txt"},
            "exclude": ["*LayerNorm*", "cls.*"],
        },
        "evaluation": {
            "data": "nusax/sentiment",
            "languages": ["ind", "ban", "sun"],
            "max_length": 12,
        },
    }


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
