"""What the study compares, and the scores: macro-F1 and accuracy on held-out names.

* ``task``: the task diff alone, learned on the bare encoder;
* ``task + language``: the task diff learned on top of the English language diff, which is swapped
  for the target's (LT-SFT, section 3);
* ``denoised task``, ``denoised task + language``: the same with masks chosen by denoised
  differences, of the task and of every language (DeFT-X);
* ``full fine-tuning``: all weights trained on the task, on the bare encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft.composition import Composer
from sparseft.data.classification import Example
from sparseft.demo.names import CATEGORIES, SOURCE, Split, names
from sparseft.demo.parts import Found, Kind
from sparseft.evaluation.evaluate import predict_logits
from sparseft.evaluation.metrics import accuracy, macro_f1
from sparseft.evaluation.report import Results

__all__ = ["FULL_FT", "SETTINGS", "Scorer", "held_out_examples"]

SETTINGS: dict[Kind, tuple[str, str]] = {
    "plain": ("task", "task + language"),
    "denoised": ("denoised task", "denoised task + language"),
}
FULL_FT = "full fine-tuning"
_EVAL_BATCH = 64


def held_out_examples(language: str, split: Split = "test") -> list[Example]:
    """Return a language's names of the test (or dev) keys, labelled."""
    return [
        Example(id=f"{key.category}/{key.key}", text=text, label=CATEGORIES.index(key.category))
        for key, text in names(language, split).items()
    ]


@dataclass(frozen=True)
class Scorer:
    """Scores one seed's adapters in every language, into the results.

    Args:
        results: where the scores go.
        tokenizer: the demo's.
        examples: language -> labelled names.
        split: of the names.
        seed: of the adapters.
        language_coeff: of a target's diff.
    """

    results: Results
    tokenizer: Any
    examples: Mapping[str, Sequence[Example]]
    split: Split
    seed: int
    language_coeff: float

    def kinds(
        self,
        classifier: nn.Module,
        densities: Sequence[float],
        *,
        alone: Found,
        on_source: Found,
        languages: Mapping[str, Found],
    ) -> None:
        """Score the task diffs alone and on top of languages, of both kinds, at every density.

        Args:
            classifier: the encoder with the head the task diffs began from; as it was afterwards.
            densities: of the diffs, in the order in which every `Found` lists them.
            alone: task diffs learned on the bare encoder.
            on_source: task diffs learned on top of the English language diff.
            languages: language -> its diffs.
        """
        for number, density in enumerate(densities):
            for kind, (task, composed) in SETTINGS.items():
                composer = Composer(classifier, {"task": alone[kind][number].adapter})
                composer.apply({"task": 1.0})
                for code in languages:
                    self.add(classifier, task, code, density)
                composer.revert()
                adapters = {code: found[kind][number].adapter for code, found in languages.items()}
                adapters["task"] = on_source[kind][number].adapter
                composer = Composer(classifier, adapters)
                for code in languages:
                    # learned on top of the whole source diff, hence coefficient 1 there
                    coeff = 1.0 if code == SOURCE else self.language_coeff
                    composer.switch({"task": 1.0, code: coeff})
                    self.add(classifier, composed, code, density)
                composer.revert()

    def full_fine_tuning(self, classifier: nn.Module, path: Path) -> None:
        """Score the result of a dense phase, which stays in the classifier."""
        from safetensors.torch import load_file

        with torch.no_grad():
            for name, tensor in load_file(path).items():
                classifier.get_parameter(name).copy_(tensor)
        for code in self.examples:
            self.add(classifier, FULL_FT, code, None)

    def add(self, model: nn.Module, setting: str, language: str, density: float | None) -> None:
        """Score the model as it is in one language."""
        examples = self.examples[language]
        logits = predict_logits(
            model, self.tokenizer, examples, batch_size=_EVAL_BATCH, max_length=62
        )
        targets, predictions = [e.label for e in examples], logits.argmax(-1).tolist()
        scores: Sequence[tuple[str, Callable[..., float]]] = (
            ("macro_f1", macro_f1),
            ("accuracy", accuracy),
        )
        for metric, score in scores:
            self.results.add(
                setting=setting,
                language=language,
                seed=self.seed,
                metric=metric,
                value=score(targets, predictions),
                task="category of a CLDR name",
                n=len(examples),
                split=self.split,
                density=density,
            )
