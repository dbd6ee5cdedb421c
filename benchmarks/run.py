"""Run benchmarks and write results with provenance.

    python benchmarks/run.py suite --out DIR         # a GPU: correctness, every case, memory
    python benchmarks/run.py suite --only 'sampled_grad/*' --minutes 3
    python benchmarks/run.py ops                     # every operation: `sparseft bench --op all`
    python benchmarks/run.py profile                 # memory of a step, predicted and measured
    python benchmarks/run.py ranks                   # 2 and 4 ranks measured, 7b-30b on paper
    python benchmarks/run.py compose                 # switching and loading adapters, XLM-R base
    python benchmarks/run.py compose --model small   # the same on a small encoder, a minute
    python benchmarks/run.py denoise                 # truncated SVDs of an encoder, 4 minutes
    python benchmarks/run.py select                  # the largest of 278 M differences, 3 minutes
    python benchmarks/run.py step                    # training steps, every way to train
    python benchmarks/run.py scaling                 # steps by batch, width and density
    python benchmarks/run.py mask                    # attached against a gradient mask, 15 minutes
    python benchmarks/run.py amp                     # mixed precision, 300 real steps, 30 minutes

Results go to results/ from a clean checkout and with all checks passed, else to results/scratch/;
python benchmarks/page.py then makes the page. Run it as a file, not with -m. The sides run in
turns; use an idle machine, or `--clock cpu` on a busy one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # loaded by its path, as tests do
    sys.path.append(str(HERE))

import amp_curves  # noqa: E402
import gpu_suite  # noqa: E402
import run_mask  # noqa: E402
import run_package  # noqa: E402
import run_ranks  # noqa: E402
import run_tables  # noqa: E402


def suite(arguments: list[str]) -> int:
    return gpu_suite.main(arguments, results=HERE / "results")


def ops(arguments: list[str]) -> int:
    return run_package.ops(arguments, results=HERE / "results")


def profile(arguments: list[str]) -> int:
    return run_package.profile(arguments, results=HERE / "results")


def ranks(arguments: list[str]) -> int:
    return run_ranks.main(arguments, results=HERE / "results")


def compose(arguments: list[str]) -> int:
    return run_tables.compose(arguments, results=HERE / "results")


def denoise(arguments: list[str]) -> int:
    return run_tables.denoise(arguments, results=HERE / "results")


def select(arguments: list[str]) -> int:
    return run_tables.select(arguments, results=HERE / "results")


def step(arguments: list[str]) -> int:
    return run_tables.step(arguments, results=HERE / "results")


def scaling(arguments: list[str]) -> int:
    return run_tables.scaling(arguments, results=HERE / "results")


def mask(arguments: list[str]) -> int:
    return run_mask.main(arguments, results=HERE / "results")


def amp(arguments: list[str]) -> int:
    return amp_curves.main(arguments, results=HERE / "results")


COMMANDS = (
    *("suite", "ops", "profile", "ranks", "step", "scaling", "mask", "amp"),
    *("compose", "denoise", "select"),
)


def main(arguments: list[str]) -> int:
    if arguments[:1] and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        return step(arguments)
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(arguments[:1]).command
    return globals()[command](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
