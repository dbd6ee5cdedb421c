"""AmericasNLI: natural language inference in ten Indigenous languages of the Americas.

Layout of the release (github.com/abteen/americasnli, ``data/anli_final``), no training data::

    {dev,test}/LANGUAGE.tsv              id  language  premise  hypothesis  label
    {dev,test}/anli.{dev,test}.tsv       the same rows of all languages in one file

Either the files of the languages or the joint file suffice.
"""

from __future__ import annotations

from pathlib import Path

from sparseft.data.classification import Example, load_classification
from sparseft.data.hub import HubSource
from sparseft.data.tables import read_table
from sparseft.evaluation.task import Task, find_folder, register_task

__all__ = ["AmericasNli"]

CODES = ("aym", "bzd", "cni", "gn", "hch", "nah", "oto", "quy", "shp", "tar")
DIRS = {"valid": "dev", "test": "test"}


@register_task("americasnli", reference="https://github.com/abteen/americasnli")
class AmericasNli(Task):
    """Does the hypothesis follow from the premise? Labels in the order of XNLI on the hub."""

    labels = ("entailment", "neutral", "contradiction")
    text_fields = ("premise", "hypothesis")
    source_language = "es"
    splits = ("valid", "test")
    layout = "ROOT/{dev,test}/LANGUAGE.tsv: id, language, premise, hypothesis, label"
    hub = HubSource(
        path="nala-cub/americas_nli",
        text_fields=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
        configs={code: code for code in CODES},
    )

    def _folder(self, root: str | Path) -> Path:
        return find_folder(
            self.check_root(root),
            ("anli_final", "data/anli_final", "americasnli", "americasnli/data/anli_final"),
            lambda folder: any((folder / d).is_dir() for d in DIRS.values()),
        )

    def languages(self, root: str | Path, split: str = "test") -> list[str]:
        """Return the languages with a file of their own or rows in the joint file."""
        folder = self._folder(root) / DIRS[split]
        joint = folder / f"anli.{DIRS[split]}.tsv"
        found = {f.stem for f in folder.glob("*.tsv")} - {joint.stem}
        if joint.is_file():
            found |= {str(row.get("language", "")) for _, row in read_table(joint)} - {""}
        return sorted(found)

    def _read(self, root: Path, language: str, split: str) -> list[Example]:
        folder = self._folder(root) / DIRS[split]
        own = folder / f"{language}.tsv"
        return load_classification(
            own if own.is_file() else folder / f"anli.{DIRS[split]}.tsv",
            self.labels,
            text_fields=self.text_fields,
            where={"language": language},
        )
