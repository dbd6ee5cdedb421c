"""What a task is, and the registry of tasks: one file each in ``sparseft/evaluation/tasks``."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

from sparseft._text import did_you_mean
from sparseft.data.classification import Example
from sparseft.data.hub import HubSource, load_hub_examples
from sparseft.data.languages import Languages, builtin_languages
from sparseft.errors import DataError, UnknownNameError

__all__ = ["HUB_PREFIX", "SPLITS", "Task", "find_folder", "get_task", "register_task", "task_names"]

SPLITS = ("train", "valid", "test")
# A data root written `hf:` or `hf:NAME` goes through the datasets library instead of local files.
HUB_PREFIX = "hf:"


class Task(ABC):
    """Sequence classification in several languages, from files in their original layout.

    A subclass states the class variables and reads one language and split in ``_read``; the
    language and the split arrive checked.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    labels: ClassVar[tuple[str, ...]]
    text_fields: ClassVar[tuple[str, ...]] = ("text",)
    metric: ClassVar[str] = "accuracy"
    source_language: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = SPLITS
    layout: ClassVar[str]  # what a data root looks like, for error messages
    hub: ClassVar[HubSource | None] = None

    @abstractmethod
    def languages(self, root: str | Path, split: str = "test") -> list[str]:
        """Return the codes of the languages with data for the split under the root, sorted."""

    @abstractmethod
    def _read(self, root: Path, language: str, split: str) -> list[Example]:
        """Return the examples of a language that is known to have data for the split."""

    def load(
        self,
        root: str | Path,
        language: str,
        split: str = "test",
        *,
        languages: Languages | None = None,
    ) -> list[Example]:
        """Return the examples of one language and split, in file order.

        Args:
            root: folder with the files; ``"hf:"`` loads through ``datasets`` from the task's home
                on the hub, ``"hf:NAME"`` from another data set or folder with the same columns.
            language: code, name or folder name.
            split: one of ``splits``.
            languages: names and groups; None takes the built-in ones.

        Raises:
            DataError: no such split; a language without data (those that have some are named);
                a damaged file (file, line and reason are named); no rows.
        """
        known = languages or builtin_languages()
        if split not in self.splits:
            raise DataError(
                f"task {self.name} has no split {split!r}; it has {', '.join(self.splits)}."
                f"{did_you_mean(split, self.splits)}"
            )
        if str(root).startswith(HUB_PREFIX):
            return self._load_hub(str(root), language, split, known)
        found = self.languages(root, split)
        match = next((code for code in found if known.same(code, language)), None)
        if match is None:
            have = ", ".join(f"{c} ({known.name(c)})" for c in found)
            raise DataError(
                f"task {self.name}: no {split} data for language {language!r} in {root}; there is "
                f"{have or 'none for any language'}.{did_you_mean(language, found)}"
            )
        examples = self._read(Path(root), match, split)
        if not examples:
            raise DataError(f"task {self.name}: {match} {split} in {root} is empty.")
        return examples

    def _load_hub(self, root: str, language: str, split: str, known: Languages) -> list[Example]:
        if self.hub is None:
            raise DataError(
                f"task {self.name} has no home on the hub; give a folder: {self.layout}"
            )
        # The hub's code may be any spelling (`en` for our `eng`): the configs of the source say.
        code = next((c for c in self.hub.configs if known.same(c, language)), language)
        return load_hub_examples(
            self.hub,
            self.labels,
            path=root.removeprefix(HUB_PREFIX) or None,
            language=code,
            split=split,
        )

    def check_root(self, root: str | Path) -> Path:
        """Return the root as a path.

        Raises:
            DataError: the folder does not exist.
        """
        path = Path(root)
        if not path.is_dir():
            raise DataError(
                f"task {self.name}: no folder {path}. Give the data root: {self.layout}"
            )
        return path


_TASKS: dict[str, Task] = {}
T = TypeVar("T", bound=type[Task])


def register_task(name: str, *, reference: str) -> Callable[[T], T]:
    """Register a task under a name, with the address of its data or paper.

    Example::

        @register_task("mine", reference="https://...")
        class Mine(Task):
            labels = ("no", "yes")
            ...
    """

    def add(cls: T) -> T:
        if name in _TASKS and type(_TASKS[name]).__qualname__ != cls.__qualname__:
            raise UnknownNameError(f"a task named {name!r} is registered already; choose another.")
        cls.name, cls.reference = name, reference
        _TASKS[name] = cls()
        return cls

    return add


def _load_all() -> None:
    package = importlib.import_module("sparseft.evaluation.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def task_names() -> list[str]:
    """Return the names of all tasks, sorted."""
    _load_all()
    return sorted(_TASKS)


def get_task(name: str | Task) -> Task:
    """Return the task of a name (a task is returned as it is).

    Raises:
        UnknownNameError: no such task; the message lists all and the nearest.
    """
    if isinstance(name, Task):
        return name
    names = task_names()
    if name not in _TASKS:
        raise UnknownNameError(
            f"unknown task {name!r}.{did_you_mean(name, names)} Tasks: {', '.join(names)}."
        )
    return _TASKS[name]


def find_folder(root: Path, candidates: Sequence[str], holds: Callable[[Path], bool]) -> Path:
    """Return the first of ``root`` and its sub-folders ``candidates`` for which ``holds`` is true.

    The same root then serves a task whether it points at the release, at its repository, or at a
    folder of several releases. Where none fits, the root itself is returned.
    """
    for folder in (root, *(root / c for c in candidates)):
        if folder.is_dir() and holds(folder):
            return folder
    return root
