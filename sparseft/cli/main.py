"""``sparseft``: finds the command, runs it, turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pkgutil
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

from sparseft._text import did_you_mean
from sparseft._version import __version__
from sparseft.errors import SparseFtError

__all__ = ["BAD_INPUT", "FAILURE", "INTERRUPTED", "OK", "TERMINATED", "build_parser", "main"]

OK, FAILURE, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

# The order of the help; commands that are not named here follow, by name.
_ORDER = (
    "demo",
    "train",
    "sweep",
    "eval",
    "compose",
    "diff",
    "convert",
    "inspect",
    "overlap",
    "bench",
    "profile",
)
# These keep their state on disk: the same command again goes on where it stopped.
_RESUMABLE = {"demo", "sweep", "train"}

_DESCRIPTION = """\
Sparse fine-tuning: train a chosen few percent of a model's weights, keep the change as a small
adapter, and compose adapters (a language + a task) into one model, exactly and reversibly."""

_EPILOG = """\
examples:
  sparseft demo                              the whole idea in 4 minutes on a laptop, no network
  sparseft train recipe.yaml                 task and language adapters, and their evaluation
  sparseft train recipe.yaml task.lr=1e-4    the same with one value of the recipe changed
  sparseft sweep recipe.yaml                 ways to choose masks, by density, with a paired test
  sparseft eval recipe.yaml                  score what that recipe trained
  sparseft convert OWNER/NAME swahili/       an adapter of composable-sft or PEFT, as ours
  sparseft inspect swahili/                  what an adapter file holds
  sparseft overlap swahili/ nli/             what several have in common

`sparseft COMMAND --help` says what a command reads and writes. Exit codes: 0 done, 1 failed,
2 bad input, 130 interrupted, 143 terminated (train, sweep and demo go on when the same command is
given again)."""

# What looks like an option and is a number: -1, -.5, and -5e-1, which argparse does not know.
_NEGATIVE = re.compile(r"-(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$|-(?:inf|nan)$")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest option or command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = _NEGATIVE

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\nSee {self.prog} --help.\n")


def _commands() -> dict[str, ModuleType]:
    package = importlib.import_module("sparseft.cli")
    names = [
        m.name
        for m in pkgutil.iter_modules(package.__path__)
        if m.name != "main" and not m.name.startswith("_")
    ]
    names.sort(key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))
    return {name: importlib.import_module(f"sparseft.cli.{name}") for name in names}


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser and those of the commands, by name."""
    parser = _Parser(
        prog="sparseft",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparseft {__version__}")
    debug = "print the traceback of an error, not only its message"
    parser.add_argument("--debug", action="store_true", help=debug)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in _commands().items():
        module.add_parser(subparsers)
        sub = subparsers.choices[name]
        sub.set_defaults(run=module.run)
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser, dict(subparsers.choices)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, commands = build_parser()
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and first not in commands:
        parser.error(
            f"no command {first!r}.{did_you_mean(first, commands)} Commands: {', '.join(commands)}."
        )
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        parser.exit(BAD_INPUT)
    command = commands[args.command]
    # argparse ends the list of overrides at the first option, so `RECIPE --only x key=value`
    # leaves key=value over.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if overrides and hasattr(args, "overrides"):
        args.overrides = [*(args.overrides or ()), *overrides]
        rest = [word for word in rest if word not in overrides]
    if rest:
        options = [o for a in command._actions for o in a.option_strings]
        near = did_you_mean(rest[0].split("=")[0], options)
        command.error(f"unknown argument {rest[0]!r}.{near}")
    return args


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _cleaned_up_when_terminated() -> Iterator[None]:
    """Let SIGTERM unwind the stack inside the block, so that temporary files are removed.

    A handler that somebody else has set stays; and only the main thread may set one.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the cleaning
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, again: str) -> int:
    """Return the exit code of a command, with its errors said in one message."""
    name = f"sparseft {args.command}"
    try:
        with _cleaned_up_when_terminated():
            return run(args)
    except SystemExit as stop:
        if stop.code != TERMINATED:
            raise
        _say(f"{name}: terminated.")
        return TERMINATED
    except KeyboardInterrupt:
        if args.command in _RESUMABLE:
            _say(f"\n{name}: interrupted. What is done is kept; to go on:\n  {again}")
        else:
            _say(f"\n{name}: interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except SparseFtError as error:
        if args.debug:
            traceback.print_exc()
        _say(f"{name}: {error}")
        # Those that say "what you gave is wrong" are ValueErrors or KeyErrors (sparseft.errors).
        return BAD_INPUT if isinstance(error, ValueError | KeyError) else FAILURE
    except OSError as error:
        if args.debug:
            traceback.print_exc()
        what = f"{error.filename}: " if error.filename else ""
        _say(f"{name}: {what}{str(error.strerror or error).rstrip('.')}.")
        # Without a number it is not the system's: somebody says that what was named is not to be
        # had (no such adapter, a hub that does not answer), as a SparseFtError would.
        named = error.errno is None or isinstance(error, FileNotFoundError)
        return BAD_INPUT if named else FAILURE
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        hint = "" if args.debug else " Run it again with --debug for the traceback."
        _say(f"{name}: unexpected {type(error).__name__}: {error}.{hint}")
        return FAILURE


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sparseft`` with the given words (those of the command line by default).

    Returns:
        0 done, 1 failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(words)
    except SystemExit as stop:  # --help, --version and errors of the parser
        return stop.code if isinstance(stop.code, int) else OK
    return _guarded(args.run, args, shlex.join(["sparseft", *words]))


if __name__ == "__main__":
    sys.exit(main())
