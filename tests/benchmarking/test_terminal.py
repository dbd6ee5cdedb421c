"""Tables in the terminal: wrong rows are red, columns that nobody fills are left out."""

from __future__ import annotations

import io

import pytest

from sparseft.benchmarking.suite_report import show_times
from sparseft.benchmarking.terminal import case_table, case_title, checks_text, share_text

SPREAD = {"median": 2e-3, "quartile1": 1.5e-3, "quartile3": 3e-3, "min": 1e-3}


def row(name, status="ok", **words):
    timed = {"clocks": {"wall": {"seconds": SPREAD, "ratio": dict.fromkeys(SPREAD, 1.5)}}}
    return {
        "name": name,
        "status": status,
        "checks": [],
        **(timed if status == "ok" else {}),
    } | words


def drawn(rows, *, colours=False, width=200):
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=colours, color_system="standard")
    console.print(case_table({"name": "x", "status": "ok", "contenders": rows}))
    return stream.getvalue()


def test_a_row_has_its_times_ratio_shares_and_checks():
    speed = {"GB/s": 12.34, "% of copy": 56.7, "TFLOP/s": 1.0}
    text = drawn([row("a", speed=speed, checks=[1, 2])])
    for cell in ("2 ms (1.5-3)", "1.500 (1.500-1.500)", "12.3 (56.7%)", " 1 ", "2 passed"):
        assert cell in text
    assert "TFLOP/s" in text
    assert "none" in drawn([row("a")])


def test_columns_that_nobody_fills_are_left_out():
    text = drawn([row("a"), row("b", speed={"GB/s": 1.0})])
    assert "GB/s" in text
    assert "TFLOP/s" not in text


def test_wrong_rows_are_red_and_say_why_without_times():
    wrong = row("b", "red", reason="error: 2, at most 1", ours=True)
    text = drawn([row("a", ours=True), wrong], colours=True)
    [line] = [x for x in text.splitlines() if "RED: error: 2, at most 1" in x]
    assert "\x1b[1;31m" in line
    assert "ms" not in line
    [fine] = [x for x in text.splitlines() if "none" in x]
    assert "\x1b[1;31m" not in fine
    assert "\x1b[1m" in fine  # ours


def test_of_a_traceback_the_last_line_is_shown():
    assert checks_text(row("a", "error", reason="Traceback\n  x\nRuntimeError: no")) == (
        "ERROR: RuntimeError: no"
    )


def test_a_baseline_that_did_not_run_leaves_no_ratio():
    text = drawn([row("a", clocks={"wall": {"seconds": SPREAD}})])
    assert "2 ms (1.5-3)" in text
    assert "1.500 (" not in text


def test_titles_say_what_happened():
    assert case_title({"name": "x", "status": "ok", "contenders": []}) == "x"
    assert case_title({"name": "x", "status": "red", "contenders": []}) == "x: RED"
    skipped = {"name": "x", "status": "skipped", "reason": "needs 3 GiB"}
    assert case_title(skipped) == "x: SKIPPED: needs 3 GiB"


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s (1.5-3)"), (2e-6, "2 us (1.5-3)"), (2e-9, "0.002 us (0.0015-")]
)
def test_the_unit_is_the_medians(seconds, text):
    scaled = {key: value / 2e-3 * seconds for key, value in SPREAD.items()}
    assert show_times(scaled).startswith(text)


def test_shares_are_shown_where_the_ceiling_is_known():
    assert (
        share_text({"GB/s": 1234.5, "% of copy": 3.21}, "GB/s", "% of copy") == "1.23e+03 (3.21%)"
    )
    assert share_text({"GB/s": 2.0}, "GB/s", "% of copy") == "2"
    assert share_text({}, "GB/s", "% of copy") == ""
