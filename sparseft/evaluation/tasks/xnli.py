"""XNLI: natural language inference in fifteen languages.

Layout of the release (github.com/facebookresearch/XNLI; two archives)::

    XNLI-1.0/xnli.{dev,test}.tsv                     all languages; 19 columns, of which language,
                                                     gold_label, sentence1, sentence2, pairID
    XNLI-MT-1.0/multinli/multinli.train.LANG.tsv     premise, hypo, label; English MultiNLI and its
                                                     machine translations

Dev and test are the same 2,490/5,010 pairs in each language. In the training files a contradiction
is written ``contradictory``.
"""

from __future__ import annotations

from pathlib import Path

from sparseft.data.classification import Example, load_classification
from sparseft.data.hub import HubSource
from sparseft.data.tables import read_table
from sparseft.evaluation.task import Task, find_folder, register_task

__all__ = ["Xnli"]

FILES = {"valid": "xnli.dev.tsv", "test": "xnli.test.tsv"}
CODES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")


@register_task("xnli", reference="https://github.com/facebookresearch/XNLI")
class Xnli(Task):
    """Does the second sentence follow from the first? Score: accuracy."""

    labels = ("entailment", "neutral", "contradiction")
    text_fields = ("sentence1", "sentence2")
    source_language = "en"
    layout = (
        "ROOT/xnli.{dev,test}.tsv of XNLI-1.0 and, for training, multinli.train.LANG.tsv "
        "of XNLI-MT-1.0"
    )
    hub = HubSource(
        path="facebook/xnli",
        text_fields=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
        configs={code: code for code in CODES},
    )

    def _folder(self, root: str | Path, split: str) -> Path:
        places: tuple[str, ...]
        if split == "train":
            places = ("multinli", "XNLI-MT-1.0/multinli", "XNLI-MT-1.0", "xnli", "xnli/multinli")
            pattern = "multinli.train.*.tsv"
        else:
            places, pattern = ("XNLI-1.0", "xnli", "xnli/XNLI-1.0"), FILES[split]
        return find_folder(self.check_root(root), places, lambda f: any(f.glob(pattern)))

    def languages(self, root: str | Path, split: str = "test") -> list[str]:
        """Return the languages with rows (dev, test) or a file of their own (training)."""
        folder = self._folder(root, split)
        if split == "train":
            return sorted(f.name.split(".")[2] for f in folder.glob("multinli.train.*.tsv"))
        file = folder / FILES[split]
        if not file.is_file():
            return []
        return sorted({str(row.get("language", "")) for _, row in read_table(file)} - {""})

    def _read(self, root: Path, language: str, split: str) -> list[Example]:
        folder = self._folder(root, split)
        if split != "train":
            return load_classification(
                folder / FILES[split],
                self.labels,
                text_fields=self.text_fields,
                label_field="gold_label",
                id_field="pairID",
                where={"language": language},
            )
        # Some machine translations are empty or missing.
        return load_classification(
            folder / f"multinli.train.{language}.tsv",
            self.labels,
            text_fields=("premise", "hypo"),
            id_field=None,
            aliases={"contradictory": "contradiction"},
            skip=lambda row: "" in (row.get("premise", "?").strip(), row.get("hypo", "?").strip()),
        )
