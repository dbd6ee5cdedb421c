"""SmSA: sentiment of Indonesian comments and reviews; the source task of NusaX-senti.

Layout of the release (github.com/IndoNLP/indonlu, ``dataset/smsa_doc-sentiment-prosa``): text, tab,
label, no header, lower-cased and tokenised, 11,000/1,260/500 rows::

    {train,valid,test}_preprocess.tsv

NusaX was translated from SmSA, so training on all of it leaks test sentences. The split
``train_leak_free`` reads ``trainvalid_minus_nusax_test.tsv`` where that file lies beside the
others: training and validation rows without the nearest neighbour of each NusaX test sentence.
"""

from __future__ import annotations

from pathlib import Path

from sparseft.data.classification import Example, load_classification
from sparseft.data.hub import HubSource
from sparseft.evaluation.task import Task, find_folder, register_task

__all__ = ["Smsa"]

FILES = {
    "train": "train_preprocess.tsv",
    "valid": "valid_preprocess.tsv",
    "test": "test_preprocess.tsv",
    "train_leak_free": "trainvalid_minus_nusax_test.tsv",
}


@register_task("smsa", reference="https://github.com/IndoNLP/indonlu")
class Smsa(Task):
    """Sentiment, labels in the order of NusaX-senti (the release's own order is reversed)."""

    labels = ("negative", "neutral", "positive")
    metric = "macro_f1"
    source_language = "ind"
    splits = tuple(FILES)
    layout = "ROOT/{train,valid,test}_preprocess.tsv, text<TAB>label without a header"
    hub = HubSource(
        path="indonlp/indonlu",
        configs={"ind": "smsa"},
        label_names=("positive", "neutral", "negative"),
    )

    def _folder(self, root: str | Path) -> Path:
        return find_folder(
            self.check_root(root),
            ("smsa", "smsa_doc-sentiment-prosa", "dataset/smsa_doc-sentiment-prosa"),
            lambda folder: any((folder / name).is_file() for name in FILES.values()),
        )

    def languages(self, root: str | Path, split: str = "test") -> list[str]:
        """Return Indonesian, if the split's file is there."""
        return ["ind"] if (self._folder(root) / FILES[split]).is_file() else []

    def _read(self, root: Path, language: str, split: str) -> list[Example]:
        return load_classification(
            self._folder(root) / FILES[split], self.labels, columns=("text", "label")
        )
