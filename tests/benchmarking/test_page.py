"""The page of results says what the result files say, and so does the README that quotes it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sparseft.benchmarking.ceilings import Ceilings
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.records import dump_lines, made_by, make_records
from sparseft.benchmarking.suite import Case, Contender, Prepared, run_suite

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_page", HERE / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def filled(page: ModuleType) -> tuple[str, str, list[Path]]:
    return page.rendered()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two cases: one measured, with everything a row can be, and one that was out of time."""

    def build(device: torch.device) -> Prepared:
        contenders = {
            "theirs": Contender(lambda: sum(range(20_000)), density=None),
            "ours, 1%": Contender(list, [Check("same", 0.0, 0.0)], {"entries": 12_345}, ours=True),
            "absent": Contender(skipped="thing is not installed"),
        }
        contenders["ours, 1%"].bytes = contenders["ours, 1%"].flops = 1e3
        return Prepared(contenders, "theirs", facts={"size": 2.0})

    ceilings = Ceilings(copy=1e9, gemm={"fp32": 1e9})
    cases = [Case("made/up", build, "made", (1,), "fp32")]
    found = run_suite(cases, "cpu", rounds=3, ceilings=ceilings)
    found.append({"name": "made/late", "status": "not run", "reason": "the budget was spent"})
    made = made_by("cpu")
    document = {"provenance": made, "cases": found, "list": [{"a": {"b": True}, "c": 7}]}
    (tmp_path / "one.json").write_text(json.dumps(document))
    (tmp_path / "one.jsonl").write_text(dump_lines(make_records(found, made, ceilings)))
    return tmp_path


# The page that is committed.


def test_the_page_is_what_the_result_files_give(filled: tuple[str, str, list[Path]]):
    text, _, plots = filled
    assert (HERE / "README.md").read_text(encoding="utf-8") == text, "run python benchmarks/page.py"
    assert plots
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)


def test_no_figure_is_written_by_hand():
    """What carries a unit of measurement comes from a file; targets and byte limits are chosen."""
    template = (HERE / "README.template.md").read_text(encoding="utf-8")
    prose = re.sub(r"\{\{.*?\}\}", "", template, flags=re.S)
    chosen = {"20 x, 1 GB", "1 GB", "16 GB", "7 x as fast", "20 x as fast"}
    found = re.findall(r"\d[\d.]* ?(?:ms|us|ns|s|GB|MB|GB/s|TFLOP/s|x as fast)\b", prose)
    assert [figure for figure in found if figure not in chosen] == []
    assert re.findall(r"\d\.\d+ ± ", prose) == []


def test_readme_quotes_the_page(page: ModuleType, filled: tuple[str, str, list[Path]]):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = page.missing_headlines(filled[1], readme)
    assert missing == [], "README.md does not say this (headlines.md, with the files' figures)"
    quoted = {" ".join(block.split()) for block in page.blocks(filled[1])}
    for block in page.blocks(readme):
        words = re.sub(r"`[^`]*`|\]\([^)]*\)", "", block)
        if "](benchmarks/" in block and re.search(r"\d[\d.]* (?:s|ms|GB|x as)\b|\d\.\d|±", words):
            assert " ".join(block.split()) in quoted, f"not in benchmarks/headlines.md: {block}"


def test_a_changed_figure_is_noticed(page: ModuleType, filled: tuple[str, str, list[Path]]):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [quoted] = re.findall(r"on and off again take (0\.\d\d) of", filled[1])
    wrong = readme.replace(f"take {quoted} of", "take 0.99 of")
    assert wrong != readme
    assert len(page.missing_headlines(filled[1], wrong)) == 1


# Directives.


def test_figures_come_from_cases_and_from_lines(page: ModuleType, results: Path):
    for file in ("one.json", "one.jsonl"):
        fill = page.Page(results).fill
        made = f"{{{{let x {file} made/up}}}}\n"
        assert fill(made + '{{figure $x "ours, 1%" entries}}') == "12,345"
        assert fill(made + '{{figure $x "ours, 1%" size %.2f}}') == "2.00"
        ratio = float(fill(made + '{{figure $x "ours, 1%" ratio *1000 %.3f}}'))
        speed = float(fill(made + '{{figure $x "ours, 1%" speed %.6f}}'))
        assert speed == pytest.approx(1000 / ratio, rel=0.01)
        assert fill(made + "{{figure $x theirs time}}").endswith((" us", " ms"))
        assert float(fill(made + '{{figure $x "ours, 1%" GB/s %.9f}}')) > 0
    assert page.Page(results).fill("{{value one.json list a.b=true c}}") == "7"
    assert page.Page(results).fill("{{value one.json list 0 c *2 %.1f}}") == "14.0"


def test_what_was_not_run_says_so(page: ModuleType, results: Path):
    fill = page.Page(results).fill
    assert fill("{{figure? gpu.json case us ratio}}, {{table? gpu.json}}") == "not run, not run"
    assert fill("{{figure? one.json made/late us ratio}}") == "not run"
    assert fill("{{figure? one.json made/up absent time}}") == "not run"
    assert fill("a\n\n{{plot? gpu.jsonl speedup}}\n\nb") == "a\n\nb"


@pytest.mark.parametrize(
    ("directive", "message"),
    [
        ("{{figure gpu.json case us ratio}}", "there is no results/gpu.json"),
        ("{{figure one.json made/down us ratio}}", "no case 'made/down'; there are: made/up"),
        ("{{figure one.json made/up us ratio}}", "no contender 'us'; there are: theirs, ours"),
        ("{{figure? one.json made/up theirs sped}}", "no fact 'sped'; there are: time"),
        ("{{figure one.json made/late us ratio}}", "was not measured"),
        ("{{value one.json provenance commit}}", "no key 'commit'; there are: sparseft"),
        ("{{value one.json provenance versions}}", "no single value"),
        ("{{value one.json list c=8 c}}", "0 of 1 elements have c=8"),
        ("{{chart one.json}}", "no directive 'chart'; there are: let, plot"),
        ("{{figure $x us ratio}}", "no `let x` before it"),
        ("{{plot one.jsonl pie}}", "wanted one kind of speedup"),
        ("{{plot one.jsonl speedup}}", "run python benchmarks/page.py"),
        ("{{table one.json no/*}}", "no case fits 'no/\\*'"),
    ],
)
def test_a_directive_that_cannot_be_filled_is_an_error(
    page: ModuleType, results: Path, directive: str, message: str
):
    with pytest.raises(ValueError, match=message) as caught:
        page.Page(results).fill(directive)
    assert directive in str(caught.value)


def test_tables_have_every_row_and_say_why_one_has_no_time(page: ModuleType, results: Path):
    from_cases, from_lines = (
        page.Page(results).fill(f"{{{{table {file}}}}}") for file in ("one.json", "one.jsonl")
    )
    assert from_cases == from_lines
    assert "| made/up | absent | skipped: thing is not installed |" in from_cases
    assert "| made/late |  | not run: the budget was spent |" in from_cases
    assert "GB/s (of a copy)" in from_cases
    assert " %) |" in from_cases


def test_ours_is_held_against_the_fastest_of_the_others(page: ModuleType, results: Path):
    def row(name, seconds, **more):
        clock = {"median": seconds, "quartile1": seconds, "quartile3": seconds, "min": seconds}
        samples = [seconds, seconds * 1.5, seconds]
        more = {"status": "ok", "density": None, "ours": False, "facts": {}} | more
        return {"name": name, "clocks": {"wall": {"seconds": clock, "samples": samples}}} | more

    rows = [
        row("slow", 8.0),
        row("fast, 1%", 4.0, density=0.01),
        row("faster, 10%", 1.0, density=0.1),
        row("copy of the same bytes", 0.5),
        row("ours, 1%", 2.0, density=0.01, ours=True, speed={"GB/s": 3.0, "% of copy": 12.0}),
        row("ours, 10%", 3.0, density=0.1, ours=True),
    ]
    cases = [{"name": "op", "status": "ok", "baseline": "slow", "facts": {}, "contenders": rows}]
    cases.append({"name": "late", "status": "not run", "reason": "no time"})
    (results / "best.json").write_text(json.dumps({"cases": cases}))
    lines = page.Page(results).fill("{{best best.json}}").splitlines()[2:]
    assert lines == [
        "| op | ours, 1% | 2 s | fast, 1% | 4 s | 0.500 (0.500-0.500) | 3 (12 %) |  |",
        "| op | ours, 10% | 3 s | faster, 10% | 1 s | 3.000 (3.000-3.000) |  |  |",
        "| late |  | not run: no time |  |  |  |  |  |",
    ]


def test_plots_are_drawn_the_same_again(page: ModuleType, results: Path):
    drawing = page.Page(results, draw=True)
    shown = drawing.fill("{{plot one.jsonl speedup}}")
    assert shown == "![Times the speed of each case's baseline](results/one_speedup.png)"
    first = (results / "one_speedup.png").read_bytes()
    drawing.fill("{{plot one.jsonl speedup}}")
    assert (results / "one_speedup.png").read_bytes() == first
    assert b"tIME" not in first
    with pytest.raises(ValueError, match="nothing for a plot of density"):
        drawing.fill("{{plot one.jsonl density}}")
