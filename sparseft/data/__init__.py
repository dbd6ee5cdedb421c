"""Data in: masked-LM text, labelled tables, languages and their groups.

Here: reading files (or ``datasets``) into examples and batches, every error naming the file and
row. Not here: what a task is and how it is scored (``sparseft.evaluation``), training
(``sparseft.training``).
"""

from __future__ import annotations

from sparseft.data.classification import EncodedDataset, Example, encode, load_classification
from sparseft.data.hub import HubSource, load_hub_examples
from sparseft.data.languages import Languages, builtin_languages, load_languages
from sparseft.data.masking import MaskedLMCollator
from sparseft.data.tables import read_table
from sparseft.data.text import TextDataset, load_mlm_texts, read_lines, text_files

__all__ = [
    "EncodedDataset",
    "Example",
    "HubSource",
    "Languages",
    "MaskedLMCollator",
    "TextDataset",
    "builtin_languages",
    "encode",
    "load_classification",
    "load_hub_examples",
    "load_languages",
    "load_mlm_texts",
    "read_lines",
    "read_table",
    "text_files",
]
