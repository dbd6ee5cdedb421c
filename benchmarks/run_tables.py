"""`run.py step`, `scaling`, `compose`, `denoise`, `select`: cases of the package, a table each."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sparseft.benchmarking import (
    compose_cases,
    denoise_cases,
    results_folder,
    run_suite,
    select_case,
    suite_source,
    suite_table,
    write_results,
)
from sparseft.benchmarking.suite import Case

__all__ = ["compose", "denoise", "scaling", "select", "step"]

_GOOD = ("ok", "skipped")


# Layers, width, words: the encoder of the committed CPU figures, and a decoder about as large.
_STEP_MODELS = {
    "mlm": "12x384x25000",
    "classification": "12x384x25000",
    "causal": "6x512x16000",
}


def _add_run_options(
    parser: argparse.ArgumentParser, name: str, *, rounds: int, seconds: float
) -> None:
    """Add what every table takes: where it runs, how long, and where its results go."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="*", help="glob over names of cases, e.g. '*switch*'")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds of a case at most")
    parser.add_argument("--case-seconds", type=float, default=seconds, help="rounds end after that")
    parser.add_argument("--out", type=Path, help="folder of the results; left out: results/")
    parser.add_argument("--name", default=name, help="name of the result files")


def _add_clock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clock", choices=["wall", "cpu"], help="cpu: processor time, one thread")


def parse_step(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py step",
        description="A training step: ours, dense, gradient mask, LoRA, SHiRA, frozen.",
    )
    parser.add_argument("--task", nargs="+", default=list(_STEP_MODELS), choices=_STEP_MODELS)
    parser.add_argument("--model", metavar="LAYERSxHIDDENxVOCAB", help="left out: the task's own")
    parser.add_argument("--batch", nargs="+", type=int, default=[16])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--density", nargs="+", type=float, default=[0.001, 0.01, 0.1])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    _add_clock(parser)
    _add_run_options(parser, "step", rounds=11, seconds=300.0)
    return parser.parse_args(arguments)


def step(arguments: list[str], *, results: Path) -> int:
    from sparseft.benchmarking.cases.training_step import step_case
    from sparseft.benchmarking.planning import parse_shape

    options = parse_step(arguments)
    cases = [
        step_case(
            task,
            (*parse_shape(options.model or _STEP_MODELS[task]), batch, options.length),
            tuple(options.density),
            options.dtype,
        )
        for task in options.task
        for batch in options.batch
    ]
    return one_table(options, cases, results)


def parse_scaling(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py scaling",
        description="Training steps by batch, model width and density, every way to train.",
    )
    parser.add_argument("--task", default="classification", choices=_STEP_MODELS)
    parser.add_argument("--size", default="cpu", choices=["cuda", "cpu", "tiny"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    _add_clock(parser)
    _add_run_options(parser, "scaling", rounds=7, seconds=60.0)
    return parser.parse_args(arguments)


def scaling(arguments: list[str], *, results: Path) -> int:
    from sparseft.benchmarking.scaling import scaling_cases

    options = parse_scaling(arguments)
    cases = scaling_cases(options.task, options.size, options.dtype)
    return one_table(options, cases, results, tiny=options.size == "tiny")


def parse_compose(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py compose",
        description="Switching, re-weighting and loading adapters against composable-sft.",
    )
    parser.add_argument("--model", default="xlmr_base", choices=["xlmr_base", "small", "tiny"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--density", type=float, default=0.0276, help="of each adapter")
    _add_run_options(parser, "compose", rounds=21, seconds=60.0)
    return parser.parse_args(arguments)


def compose(arguments: list[str], *, results: Path) -> int:
    options = parse_compose(arguments)
    cases = compose_cases(options.model, options.dtype, density=options.density)
    return one_table(options, cases, results)


def parse_selection(command: str, arguments: list[str]) -> argparse.Namespace:
    what = {
        "denoise": "Denoising an encoder's matrices against loops of SVDs.",
        "select": "Choosing the largest differences against composable-sft's list and partition.",
    }
    parser = argparse.ArgumentParser(prog=f"run.py {command}", description=what[command])
    parser.add_argument("--model", default="xlmr_base", choices=["xlmr_base", "small", "tiny"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, one thread"
    )
    _add_run_options(parser, command, rounds=11, seconds=40.0)
    return parser.parse_args(arguments)


def denoise(arguments: list[str], *, results: Path) -> int:
    options = parse_selection("denoise", arguments)
    cases = denoise_cases(options.model, rank=options.rank, clock=options.clock)
    return one_table(options, cases, results)


def select(arguments: list[str], *, results: Path) -> int:
    options = parse_selection("select", arguments)
    cases = [select_case(options.model, rank=options.rank, clock=options.clock)]
    return one_table(options, cases, results)


def one_table(
    options: argparse.Namespace, cases: list[Case], root: Path, *, tiny: bool = False
) -> int:
    """Run cases and write all their contenders in one table."""
    torch.set_num_threads(options.threads)
    tiny = tiny or getattr(options, "model", None) == "tiny"
    extra = suite_source(torch.device(options.device), tiny=tiny)

    def progress(results: list[dict]) -> None:
        done = results[-1]
        print(f"{done['status']:5} {done['took_seconds']:6.1f} s  {done['name']}", flush=True)

    found = run_suite(
        cases,
        options.device,
        only=options.only,
        minutes=float("inf"),
        rounds=options.rounds,
        case_seconds=options.case_seconds,
        progress=progress,
        clock=getattr(options, "clock", None),
    )
    passed = all(result["status"] in _GOOD for result in found)
    table = suite_table(found, extra)
    folder = options.out or results_folder(root, passed=passed and not tiny)
    path = write_results(folder, options.name, {"suite": extra, "cases": found}, table)
    print(f"\n{table}\nwritten to {path}")
    return 0 if passed else 1
