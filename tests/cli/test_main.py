"""The command line itself: finding commands, exit codes, messages."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparseft._version import __version__
from sparseft.cli import main as cli
from sparseft.errors import DataError, NonFiniteLossError, RecipeError, UnknownNameError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch):
    """Commands ``probe`` and ``train`` that do what the test says."""

    def install(action):
        def module(name):
            def add_parser(subparsers):
                parser = subparsers.add_parser(name, help="a probe")
                parser.add_argument("recipe", nargs="?")
                parser.add_argument("overrides", nargs="*")

            return SimpleNamespace(add_parser=add_parser, run=action)

        monkeypatch.setattr(cli, "_commands", lambda: {n: module(n) for n in ("probe", "train")})

    return install


def raises(error):
    def action(args):
        raise error

    return action


def test_help_is_quick_and_teaches(capsys):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sparseft", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    took = time.perf_counter() - began
    assert done.returncode == 0
    for word in ("demo", "train", "eval", "compose", "inspect", "examples:", "Exit codes"):
        assert word in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    heavy = {"torch", "transformers", "datasets", "matplotlib", "numpy", "babel"}
    assert not imported & heavy
    assert took < 5, "0.15 s on an idle core; this machine may be busy"


@pytest.mark.parametrize("name", ["demo", "train", "eval", "compose", "inspect"])
def test_every_command_has_help_with_examples_and_results(name, capsys):
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"sparseft {name}" in out
    assert "examples:" in out
    assert "what comes out" in out or name == "inspect", "inspect writes nothing"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"sparseft {__version__}"


def test_no_command_shows_the_help_and_is_bad_input(capsys):
    assert cli.main([]) == 2
    assert "examples:" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["evla", "x"]) == 2
    err = capsys.readouterr().err
    assert "no command 'evla'. Did you mean 'eval'" in err
    assert "Traceback" not in err


def test_unknown_option_names_the_nearest(capsys):
    assert cli.main(["eval", "--langauges", "ban"]) == 2
    assert "Did you mean '--languages'" in capsys.readouterr().err


def test_overrides_may_follow_options(command):
    seen = {}
    command(lambda args: seen.update(vars(args)) or 0)
    assert cli.main(["probe", "r.yaml", "a.b=1", "--debug", "c=2"]) == 0
    assert seen["recipe"] == "r.yaml"
    assert seen["overrides"] == ["a.b=1", "c=2"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("file x, row 3: odd"), 2),
        (RecipeError("unknown key"), 2),
        (UnknownNameError("no 'a'"), 2),
        (NonFiniteLossError("loss is nan at step 7"), 1),
        (FileNotFoundError(2, "No such file or directory", "x.yaml"), 2),
        (OSError(28, "No space left on device", "out/adapter.safetensors"), 1),
        (ConnectionResetError(104, "Connection reset by peer", "socket"), 1),
        (ConnectionError("no adapter 'a/b': the hub does not answer"), 2),
        (PermissionError("adapter 'a/b' is gated"), 2),
        (FileExistsError("out exists already"), 2),
        (ZeroDivisionError("division by zero"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_errors_are_one_message_and_a_code(command, capsys, error, code):
    command(raises(error))
    assert cli.main(["probe"]) == code
    err = capsys.readouterr().err
    assert err.startswith("sparseft probe: ")
    assert (getattr(error, "strerror", None) or str(error)) in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    if isinstance(error, OSError) and error.filename:
        assert error.filename in err


def test_debug_shows_the_traceback(command, capsys):
    command(raises(DataError("odd")))
    assert cli.main(["probe", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert cli.main(["--debug", "probe"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupted_says_how_to_go_on(command, capsys):
    command(raises(KeyboardInterrupt()))
    assert cli.main(["train", "a b.yaml", "lr=1"]) == 130
    assert "sparseft train 'a b.yaml' lr=1" in capsys.readouterr().err
    assert cli.main(["probe"]) == 130
    assert "interrupted." in capsys.readouterr().err


def test_runs_uninstalled_from_the_checkout():
    """`python -S -m sparseft` sees no installed sparseft, only the checkout."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "sparseft", "--version"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        cwd="/",
        timeout=60,
    )
    assert done.stdout.strip() == f"sparseft {__version__}", done.stderr


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m sparseft --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["", "demo", "train", "eval", "compose", "inspect"])
def test_help_fits_a_page_and_its_examples_can_be_copied(name, capsys, monkeypatch):
    """Every example, its continued lines joined, is a command line that the parser takes."""
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([*([name] if name else []), "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    examples = re.sub(r"\\\n\s*", "", out.partition("examples:\n")[2].partition("\n\n")[0])
    lines = [line for line in examples.splitlines() if line.startswith("  sparseft ")]
    assert lines
    for line in lines:
        words = shlex.split(line.strip().partition("  ")[0])  # a comment stands further right
        args = cli._parse(words[1:])
        assert name in ("", args.command)


def test_eval_example_with_adapters_names_a_folder_to_write(capsys):
    assert cli.main(["eval", "--help"]) == 0
    examples = capsys.readouterr().out.replace("\\\n", " ")
    [line] = [line for line in examples.splitlines() if "--adapter task=" in line]
    args = cli._parse(shlex.split(line)[1:])
    assert (args.setting, str(args.out)) == (["task", "task+language"], "scores")
    assert len(args.adapter) == 3


def test_only_the_recipe_is_required(capsys):
    assert cli.main(["train"]) == 2
    err = capsys.readouterr().err
    assert "required: RECIPE\n" in err
    assert "KEY=VALUE" not in err


def test_nothing_is_guessed_for_a_path_elsewhere(tmp_path, capsys, monkeypatch):
    (tmp_path / "sw").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    missing = str(tmp_path / "swa")
    commands = (
        ["inspect", missing],
        ["compose", "--adapter", missing, "--out", "x.safetensors"],
        ["eval", "--base", "b", "--task", "nusax_senti", "--data", str(tmp_path),
         "--adapter", f"task={missing}"],
    )  # fmt: skip
    for words in commands:
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert f"no adapter at {missing}: the path does not exist" in err
        assert "Did you mean" not in err
    monkeypatch.chdir(tmp_path)
    for words in (["inspect", missing], ["inspect", "swa"]):
        assert cli.main(words) == 2
        assert "Did you mean 'sw'?" in capsys.readouterr().err


def test_sigterm_unwinds_and_the_handler_is_taken_back(command, capsys):
    cleaned = []

    def action(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # an impatient caller: the cleaning goes on
            cleaned.append(True)

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    command(action)
    assert cli.main(["probe"]) == 143
    assert cleaned == [True]
    assert capsys.readouterr().err == "sparseft probe: terminated.\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_program_around_stays(command):
    command(lambda args: 0 if signal.getsignal(signal.SIGTERM) is mine else 1)

    def mine(number, frame):
        """Belongs to somebody else."""

    old = signal.signal(signal.SIGTERM, mine)
    try:
        assert cli.main(["probe"]) == 0
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, old)


def test_a_command_may_run_in_a_thread(command):
    command(lambda args: 0)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["probe"])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("number", ["-1", "-0.5", "-.5", "-5.", "-5e-1", "-.5e1", "-1E+2"])
def test_numbers_below_zero_are_no_options(number):
    args = cli._parse(
        ["compose", "--adapter", "a", "b", "--coeff", number, "1e0", "--out", "x.safetensors"]
    )
    assert args.coeff == [float(number), 1.0]
