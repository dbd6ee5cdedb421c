"""`run.py mask`: a step attached against dense fine-tuning under a gradient mask, in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sparseft.benchmarking import (
    StepCase,
    markdown_table,
    measure_step,
    results_folder,
    write_results,
)

__all__ = ["main"]

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
    parser = argparse.ArgumentParser(prog="run.py mask", description=__doc__.splitlines()[0])
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


def main(arguments: list[str], *, results: Path) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    found = []
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
                found.append(result)
                print(markdown_table([row(result)], COLUMNS).splitlines()[-1], flush=True)
    table = markdown_table([row(r) for r in found], COLUMNS)
    passed = all(r["passed"] for r in found)
    path = write_results(
        results_folder(results, passed=passed), options.name, {"cases": found}, table
    )
    print(f"\n{table}\nwritten to {path}")
    return 0 if passed else 1
