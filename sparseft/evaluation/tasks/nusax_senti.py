"""NusaX-senti: sentiment in Indonesian, English and ten local languages of Indonesia.

Layout of the release (github.com/IndoNLP/nusax, ``datasets/sentiment``), 500/100/400 rows each::

    LANGUAGE/{train,valid,test}.csv      id,text,label      (LANGUAGE: acehnese, toba_batak, ...)
"""

from __future__ import annotations

from pathlib import Path

from sparseft.data.classification import Example, load_classification
from sparseft.data.hub import HubSource
from sparseft.data.languages import builtin_languages
from sparseft.evaluation.task import Task, find_folder, register_task

__all__ = ["NusaxSenti"]

# code -> folder in the release
FOLDERS = {
    "ace": "acehnese",
    "ban": "balinese",
    "bbc": "toba_batak",
    "bjn": "banjarese",
    "bug": "buginese",
    "eng": "english",
    "ind": "indonesian",
    "jav": "javanese",
    "mad": "madurese",
    "min": "minangkabau",
    "nij": "ngaju",
    "sun": "sundanese",
}


@register_task("nusax_senti", reference="https://github.com/IndoNLP/nusax")
class NusaxSenti(Task):
    """Sentiment of a sentence: negative, neutral or positive. Score: macro-F1."""

    labels = ("negative", "neutral", "positive")
    metric = "macro_f1"
    source_language = "ind"
    layout = "ROOT/LANGUAGE/{train,valid,test}.csv with the columns id,text,label"
    hub = HubSource(
        path="indonlp/NusaX-senti",
        configs={code: code for code in FOLDERS},
        label_names=("negative", "neutral", "positive"),
    )

    def _folder(self, root: str | Path) -> Path:
        return find_folder(
            self.check_root(root),
            ("sentiment", "datasets/sentiment", "nusax/sentiment", "nusax/datasets/sentiment"),
            lambda folder: any((folder / name).is_dir() for name in FOLDERS.values()),
        )

    def languages(self, root: str | Path, split: str = "test") -> list[str]:
        """Return the languages with a file for the split; folders may also be other languages."""
        known, found = builtin_languages(), set()
        codes = {folder: code for code, folder in FOLDERS.items()}
        for file in self._folder(root).glob(f"*/{split}.csv"):
            folder = file.parent.name
            is_known = folder in codes or any(known.same(folder, c) for c in known.names)
            found.add(codes.get(folder) or (known.code(folder) if is_known else folder))
        return sorted(found)

    def _read(self, root: Path, language: str, split: str) -> list[Example]:
        known = builtin_languages()
        folders = (FOLDERS.get(language, language), *known.spellings(language))
        base = self._folder(root)
        file = next(
            (f for name in folders if (f := base / name / f"{split}.csv").is_file()),
            base / folders[0] / f"{split}.csv",
        )
        return load_classification(file, self.labels)
