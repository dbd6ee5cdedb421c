"""Run benchmark cases and write results with provenance.

    python benchmarks/run.py                         # the committed table, 15 minutes on one core
    python benchmarks/run.py --batch 16 --density 0.01 --rounds 5
    python benchmarks/run.py --model path/to/encoder
    python benchmarks/run.py suite --out DIR         # kernels and steps on a GPU
    python benchmarks/run.py suite --only 'sampled_grad/*' --minutes 3
    python benchmarks/run.py compose                 # switching and loading adapters, XLM-R base
    python benchmarks/run.py compose --model small   # the same on a small encoder, a minute
    python benchmarks/run.py denoise                 # truncated SVDs of an encoder, 4 minutes
    python benchmarks/run.py select                  # the largest of 278 M differences, 3 minutes

Run it as a file, not with -m. The sides run in turns; use an idle machine, or `--clock cpu` on
a busy one. The table of training steps can also be asked for as `run.py step`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from sparseft.benchmarking import (
    StepCase,
    compose_cases,
    denoise_cases,
    markdown_table,
    measure_step,
    results_folder,
    run_suite,
    select_case,
    suite_cases,
    suite_markdown,
    suite_source,
    suite_table,
    write_results,
)
from sparseft.benchmarking.suite import Case

HERE = Path(__file__).resolve().parent
COLUMNS = {
    "task": "task",
    "batch": "batch x length",
    "density": "density",
    "optimizer": "AdamW",
    "baseline": "dense + mask (ms)",
    "ours": "attached (ms)",
    "ratio": "time ratio (quartiles)",
    "state": "state ratio",
    "passed": "same weights",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="encoder to load; left out: random weights, 12 x 384")
    parser.add_argument("--task", nargs="+", default=["classification", "mlm"])
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 4, 1])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--density", nargs="+", type=float, default=[0.001, 0.01, 0.1])
    parser.add_argument("--optimizer", choices=["torch", "sparse"], default="torch")
    parser.add_argument("--fused", action="store_true", help="fused torch AdamW on both sides")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, one thread"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="training_step", help="name of the result files")
    return parser.parse_args(arguments)


def row(result: dict) -> dict[str, str]:
    case, ratio = result["case"], result["ratio"]
    fused = "fused" if case["fused"] else "torch default"
    return {
        "task": case["task"],
        "batch": f"{case['batch']} x {case['length']}",
        "density": f"{case['density']:.1%}",
        "optimizer": "SparseAdamW" if case["optimizer"] == "sparse" else fused,
        "baseline": f"{result['baseline_seconds']['median'] * 1e3:.0f}",
        "ours": f"{result['ours_seconds']['median'] * 1e3:.0f}",
        "ratio": f"{ratio['median']:.3f} ({ratio['quartile1']:.3f}-{ratio['quartile3']:.3f})",
        "state": f"{result['state_ratio']:.2%}",
        "passed": "yes" if result["passed"] else "NO",
    }


def parse_suite(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py suite", description="Kernels and training steps against their competitors."
    )
    parser.add_argument("--out", type=Path, help="folder of the results; left out: results/")
    parser.add_argument("--only", default="*", help="glob over names of cases")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no case after so long")
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds of a case, at most")
    parser.add_argument("--case-seconds", type=float, default=12.0, help="rounds end after so long")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu: the same code on tiny shapes, a smoke test",
    )
    parser.add_argument("--commit", help="of the code, where it is a copy without its checkout")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--name", default="suite", help="name of the result files")
    return parser.parse_args(arguments)


def suite(arguments: list[str]) -> int:
    options = parse_suite(arguments)
    device = torch.device(options.device)
    tiny = device.type == "cpu"
    cases = suite_cases(tiny=tiny)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    extra = suite_source(device, tiny=tiny, commit=options.commit)

    def write(results: list[dict], folder: Path) -> Path:
        return write_results(
            folder, options.name, {"suite": extra, "cases": results}, suite_markdown(results, extra)
        )

    def progress(results: list[dict]) -> None:
        done = results[-1]
        print(f"{done['status']:5} {done['took_seconds']:6.1f} s  {done['name']}", flush=True)
        # After each case: a run that is cut off leaves what it has.
        write(results, options.out or HERE / "results" / "scratch")

    results = run_suite(
        cases,
        device,
        only=options.only,
        minutes=options.minutes,
        rounds=options.rounds,
        case_seconds=options.case_seconds,
        progress=progress,
    )
    passed = all(result["status"] in ("ok", "not run") for result in results)
    folder = options.out or results_folder(HERE / "results", passed=passed and not tiny)
    print(f"\n{suite_markdown(results, extra)}\nwritten to {write(results, folder)}")
    return 0 if passed else 1


def parse_compose(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py compose",
        description="Switching, re-weighting and loading adapters against composable-sft.",
    )
    parser.add_argument("--model", default="xlmr_base", choices=["xlmr_base", "small", "tiny"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--density", type=float, default=0.0276, help="of each adapter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="*", help="glob over names of cases, e.g. '*switch*'")
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds of a case, at most")
    parser.add_argument("--case-seconds", type=float, default=60.0, help="rounds end after so long")
    parser.add_argument("--out", type=Path, help="folder of the results; left out: results/")
    parser.add_argument("--name", default="compose", help="name of the result files")
    return parser.parse_args(arguments)


def compose(arguments: list[str]) -> int:
    options = parse_compose(arguments)
    return one_table(options, compose_cases(options.model, options.dtype, density=options.density))


def parse_selection(command: str, arguments: list[str]) -> argparse.Namespace:
    what = {
        "denoise": "Denoising an encoder's matrices against loops of SVDs.",
        "select": "Choosing the largest differences against composable-sft's list and partition.",
    }
    parser = argparse.ArgumentParser(prog=f"run.py {command}", description=what[command])
    parser.add_argument("--model", default="xlmr_base", choices=["xlmr_base", "small", "tiny"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, one thread"
    )
    parser.add_argument("--only", default="*", help="glob over names of cases")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of a case, at most")
    parser.add_argument("--case-seconds", type=float, default=40.0, help="rounds end after so long")
    parser.add_argument("--out", type=Path, help="folder of the results; left out: results/")
    parser.add_argument("--name", default=command, help="name of the result files")
    return parser.parse_args(arguments)


def denoise(arguments: list[str]) -> int:
    options = parse_selection("denoise", arguments)
    return one_table(options, denoise_cases(options.model, rank=options.rank, clock=options.clock))


def select(arguments: list[str]) -> int:
    options = parse_selection("select", arguments)
    return one_table(options, [select_case(options.model, rank=options.rank, clock=options.clock)])


def one_table(options: argparse.Namespace, cases: list[Case]) -> int:
    """Run cases and write all their contenders in one table."""
    torch.set_num_threads(options.threads)
    tiny = options.model == "tiny"
    extra = suite_source(torch.device(options.device), tiny=tiny)

    def progress(results: list[dict]) -> None:
        done = results[-1]
        print(f"{done['status']:5} {done['took_seconds']:6.1f} s  {done['name']}", flush=True)

    results = run_suite(
        cases,
        options.device,
        only=options.only,
        minutes=float("inf"),
        rounds=options.rounds,
        case_seconds=options.case_seconds,
        progress=progress,
    )
    passed = all(result["status"] == "ok" for result in results)
    table = suite_table(results, extra)
    folder = options.out or results_folder(HERE / "results", passed=passed and not tiny)
    path = write_results(folder, options.name, {"suite": extra, "cases": results}, table)
    print(f"\n{table}\nwritten to {path}")
    return 0 if passed else 1


def step(arguments: list[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    results = []
    for task in options.task:
        for batch in options.batch:
            for density in options.density:
                case = StepCase(
                    task=task,
                    batch=batch,
                    length=options.length,
                    density=density,
                    optimizer=options.optimizer,
                    fused=options.fused,
                    seed=options.seed,
                )
                result = measure_step(
                    case, model=options.model, rounds=options.rounds, clock=options.clock
                )
                results.append(result)
                print(markdown_table([row(result)], COLUMNS).splitlines()[-1], flush=True)
    table = markdown_table([row(r) for r in results], COLUMNS)
    passed = all(r["passed"] for r in results)
    path = write_results(
        results_folder(HERE / "results", passed=passed), options.name, {"cases": results}, table
    )
    print(f"\n{table}\nwritten to {path}")
    return 0 if passed else 1


def main(arguments: list[str]) -> int:
    commands = {"suite": suite, "compose": compose, "denoise": denoise, "select": select}
    if arguments[:1] and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return step(arguments[1:] if arguments[:1] == ["step"] else arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
