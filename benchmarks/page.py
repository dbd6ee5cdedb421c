"""Fill the page of results: README.md from README.template.md and the files in results/.

    python benchmarks/page.py            # writes README.md and the plots it shows
    python benchmarks/page.py --check    # writes nothing, fails where something would change

Every figure on the page is read from a result file, by directives in double braces; a word with
spaces is quoted, and a name that ends in `?` says "not run" where its file is not there (or its
case was out of time; a plot then is left out); without the `?` that is an error, and so is a key
that is not there.

    let NAME WORDS...                          $NAME stands for the words from here on
    figure FILE CASE CONTENDER FIELD           time, seconds, ratio, speed (against the baseline);
                                               or a name among the contender's or the case's facts
    value FILE KEY...                          any number; key=value picks from a list
    score FILE SETTING DENSITY|- LANGUAGE|mean mean and deviation over seeds, x 100
    gain FILE DENSITY [LANGUAGE]               composed over not composed, x 100
    paired FILE BASELINE SETTING DENSITY FIELD mean (x 100), p_pairs, p_seeds
    table FILE [CASES]                         what was measured, whole; CASES: glob over names
    best FILE [CASES]                          ours beside the fastest of the others
    targets, steps, sweep, profile FILE        other tables
    precisions FILE                            the same, of `run.py amp`
    ranks FILE, paper FILE [FILE...]           the same, of `run.py ranks`: measured, predicted
    plot FILE KIND                             picture beside the file: speedup, density, roofline,
                                               scaling, memory, losses
    source FILE                                commit, machine, versions
    link FILE TEXT                             link to a result file

A word that begins with `%` is a format (`%.2f`), one with `*` a factor (`*1e-9`). headlines.md
holds what README.md at the root quotes from here, in the same way; a test compares them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # loaded by its path, as tests do
    sys.path.append(str(HERE))

import page_figures  # noqa: E402
import page_plots  # noqa: E402
import page_tables  # noqa: E402
from page_files import Files, PageError  # noqa: E402

NOT_RUN = "not run"
_DIRECTIVE = re.compile(r"\{\{(.*?)\}\}", flags=re.S)
# A line of nothing but `let` leaves no empty line behind.
_LET = re.compile(r"^\{\{let (.*?)\}\}\n", flags=re.S | re.M)


class Page:
    """One template and what its directives read.

    Args:
        results: folder of the result files.
        draw: whether `plot` draws; otherwise the picture must be there.
    """

    def __init__(self, results: Path, *, draw: bool = False) -> None:
        self.files = Files(results)
        self.draw = draw
        self.names: dict[str, list[str]] = {}
        self.plots: list[Path] = []

    def fill(self, template: str) -> str:
        """Return the template with its directives replaced.

        Raises:
            PageError: a directive that cannot be filled; the message has it.
        """
        self.names.clear()
        parts = _LET.split(template)
        # `let` counts from where it stands: text and definitions alternate.
        out = []
        for number, part in enumerate(parts):
            if number % 2:
                name, *words = shlex.split(part)
                self.names[name] = words
            else:
                out.append(_DIRECTIVE.sub(self._replace, part))
        # Plots that are left out leave no holes.
        return re.sub(r"\n{3,}", "\n\n", "".join(out))

    def _replace(self, match: re.Match[str]) -> str:
        try:
            return self._one(self._words(match[1]))
        except PageError as error:
            raise PageError(f"{match[0]}: {error}") from None

    def _words(self, text: str) -> list[str]:
        words: list[str] = []
        for word in shlex.split(text):
            if not word.startswith("$"):
                words.append(word)
            elif word[1:] in self.names:
                words += self.names[word[1:]]
            else:
                raise PageError(f"no `let {word[1:]}` before it")
        return words

    def _one(self, words: list[str]) -> str:
        name, words = words[0], words[1:]
        optional = name.endswith("?")
        name = name.rstrip("?")
        if not words:
            raise PageError("names no file")
        file, words = words[0], words[1:]
        if not self.files.exists(file):
            if optional:
                return "" if name == "plot" else NOT_RUN
            raise PageError(f"there is no results/{file}")
        if name == "plot":
            return self._plot(file, words)
        if name in page_tables.TABLES:
            return page_tables.TABLES[name](self.files, file, *words)
        if name not in page_figures.FIGURES:
            known = ", ".join(["let", "plot", *page_tables.TABLES, *page_figures.FIGURES])
            raise PageError(f"no directive {name!r}; there are: {known}")
        marks = [word for word in words if word[:1] in ("%", "*")]
        keys = [word for word in words if word[:1] not in ("%", "*")]
        found = page_figures.FIGURES[name](self.files, file, *keys)
        if found is None:
            if optional:
                return NOT_RUN
            raise PageError("was not measured")
        return _shown(found, marks)

    def _plot(self, file: str, words: Sequence[str]) -> str:
        if len(words) != 1 or words[0] not in page_plots.KINDS:
            raise PageError(f"wanted one kind of {', '.join(page_plots.KINDS)}")
        [kind] = words
        path = self.files.root / Path(file).with_name(f"{Path(file).stem}_{kind}.png")
        shown = f"results/{path.relative_to(self.files.root).as_posix()}"
        self.plots.append(path)
        if self.draw:
            page_plots.draw(self.files, file, kind, path)
        elif not path.is_file():
            raise PageError(f"there is no {shown}; run python benchmarks/page.py")
        return f"![{page_plots.KINDS[kind]}]({shown})"


def _shown(found: Any, marks: Sequence[str]) -> str:
    form = None
    for mark in marks:
        if mark.startswith("*"):
            found = found * float(mark[1:])
        else:
            form = mark
    if form is not None:
        return form % found
    return str(found) if isinstance(found, str) else page_figures.number(found)


def rendered(*, draw: bool = False, here: Path = HERE) -> tuple[str, str, list[Path]]:
    """Return (README.md, what the root's README must say, the plots shown)."""
    page = Page(here / "results", draw=draw)
    text = page.fill((here / "README.template.md").read_text(encoding="utf-8"))
    headlines = Page(here / "results").fill((here / "headlines.md").read_text(encoding="utf-8"))
    return text, headlines, page.plots


def missing_headlines(headlines: str, readme: str) -> list[str]:
    """Return the blocks of ``headlines`` that ``readme`` does not have, word for word."""
    have = {" ".join(block.split()) for block in blocks(readme)}
    return [block for block in blocks(headlines) if " ".join(block.split()) not in have]


def blocks(text: str) -> list[str]:
    """Return paragraphs and tables; code and comments are left out."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    return [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    options = parser.parse_args(arguments)
    target = HERE / "README.md"
    try:
        text, headlines, plots = rendered(draw=not options.check)
    except PageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    missing = missing_headlines(headlines, (HERE.parent / "README.md").read_text(encoding="utf-8"))
    for block in missing:
        print(f"README.md at the root should say:\n\n{block}\n")
    if options.check:
        if target.read_text(encoding="utf-8") != text:
            print("benchmarks/README.md is out of date: run python benchmarks/page.py")
            return 1
        return 1 if missing else 0
    target.write_text(text, encoding="utf-8")
    print(f"written: {target}, {len(plots)} plots")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
