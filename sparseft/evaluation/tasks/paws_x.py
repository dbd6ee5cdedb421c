"""PAWS-X: are two sentences paraphrases, in seven languages.

Layout of the release (``x-final.tar.gz``, github.com/google-research-datasets/paws/pawsx)::

    LANGUAGE/{translated_train,dev_2k,test_2k}.tsv    id  sentence1  sentence2  label
    en/train.tsv                                      English training pairs

Some translations are the placeholder ``NS`` or empty; the release asks to drop them, so they are
(which is why the languages differ in size).
"""

from __future__ import annotations

from pathlib import Path

from sparseft.data.classification import Example, load_classification
from sparseft.data.hub import HubSource
from sparseft.evaluation.task import Task, find_folder, register_task

__all__ = ["PawsX"]

FILES = {
    "train": ("translated_train.tsv", "train.tsv"),
    "valid": ("dev_2k.tsv",),
    "test": ("test_2k.tsv",),
}
PLACEHOLDERS = ("", "NS")


@register_task("paws_x", reference="https://github.com/google-research-datasets/paws")
class PawsX(Task):
    """Is the second sentence a paraphrase of the first (1) or not (0)? Score: accuracy."""

    labels = ("0", "1")
    text_fields = ("sentence1", "sentence2")
    source_language = "en"
    layout = "ROOT/LANGUAGE/{translated_train,dev_2k,test_2k}.tsv: id, sentence1, sentence2, label"
    hub = HubSource(
        path="google-research-datasets/paws-x",
        text_fields=("sentence1", "sentence2"),
        label_names=("0", "1"),
        configs={code: code for code in ("de", "en", "es", "fr", "ja", "ko", "zh")},
    )

    def _folder(self, root: str | Path) -> Path:
        return find_folder(
            self.check_root(root),
            ("x-final", "pawsx", "paws_x", "pawsx/x-final", "paws_x/x-final"),
            lambda folder: any(any(folder.glob(f"*/{f}")) for fs in FILES.values() for f in fs),
        )

    def languages(self, root: str | Path, split: str = "test") -> list[str]:
        """Return the languages with a file for the split."""
        folder = self._folder(root)
        return sorted({f.parent.name for name in FILES[split] for f in folder.glob(f"*/{name}")})

    def _read(self, root: Path, language: str, split: str) -> list[Example]:
        base = self._folder(root) / language
        file = next(base / name for name in FILES[split] if (base / name).is_file())
        return load_classification(
            file,
            self.labels,
            text_fields=self.text_fields,
            skip=lambda row: any(row.get(f, "?").strip() in PLACEHOLDERS for f in self.text_fields),
        )
